"""Where the models that ship with the package lie."""

from __future__ import annotations

from pathlib import Path

from flyball.core.errors import InvalidInput

_FOLDER = Path(__file__).parent.parent / "data" / "tiny"


def bundled_model_path(part: str = "target") -> Path:
    """Folder of the bundled `target` or `draft` model in Hugging Face format."""
    path = _FOLDER / part
    if not (path / "config.json").is_file():
        raise InvalidInput(f"this installation holds no bundled {part} model; name a model folder instead")
    return path


def bundled_medusa_path() -> Path | None:
    """Folder of the bundled model's Medusa heads; None where this installation holds none."""
    path = _FOLDER / "medusa"
    return path if path.is_dir() else None
