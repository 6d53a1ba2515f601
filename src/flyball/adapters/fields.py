"""Checked reading of what people write in JSON and YAML: every complaint names the field, its value and the fix."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from flyball.core.errors import InvalidInput

_LARGEST = 1e300  # whole numbers in JSON may be larger than any float
_Name = TypeVar("_Name", bound=str)


class Fields:
    """A mapping read from a file, asked for typed values; keys are found in any case.

    A missing or null value is the default, as in Go's JSON. Reading the same mapping twice gives the same answers.
    """

    def __init__(self, value: object, path: str) -> None:
        if not isinstance(value, Mapping):
            raise InvalidInput(f"{path} is {_short(value)}; give a mapping of fields")
        self._values = {str(key).lower(): item for key, item in value.items()}
        self._spelling = {str(key).lower(): str(key) for key in value}
        self.path = path

    def __contains__(self, key: str) -> bool:
        return self._values.get(key.lower()) is not None

    def _at(self, key: str) -> str:
        inside = self._spelling.get(key.lower(), key)
        return f"{self.path}.{inside}" if self.path else inside

    def _refuse(self, key: str, need: str) -> NoReturn:
        raise InvalidInput(f"{self._at(key)} is {_short(self._values.get(key.lower()))}; give {need}")

    def only(self, *keys: str) -> Fields:
        """Refuse fields of other names: in our own format one that is misspelt must not pass for one left out."""
        known = {key.lower() for key in keys}
        for key in self._values:
            if key not in known:
                raise InvalidInput(f"{self._at(key)} is not a known field; use {', '.join(keys)}")
        return self

    def number(self, key: str, default: float | None = 0.0, *, low: float = 0.0) -> float:
        """A finite number of at least `low`; a default of None makes it required."""
        value = self._values.get(key.lower())
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST or value < low:
            self._refuse(key, f"a number of at least {low:g}")
        return float(value)

    def whole(self, key: str, default: int = 0, *, low: int = 0) -> int:
        """A whole number of at least `low`."""
        value = self.number(key, default, low=low)
        if value != int(value):
            self._refuse(key, f"a whole number of at least {low}")
        return int(value)

    def text(self, key: str, default: str | None = "") -> str:
        """A text; a default of None makes it required, and not empty."""
        value = self._values.get(key.lower())
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or (default is None and not value.strip()):
            self._refuse(key, "a text" if default is not None else "a text that is not empty")
        return value

    def choice(self, key: str, names: Sequence[_Name]) -> _Name:
        """One of some names, in any case; the first if missing or empty."""
        value = self.text(key).lower()
        found = [name for name in names if name.lower() == value]
        if value and not found:
            self._refuse(key, f"one of {', '.join(names)}")
        return found[0] if found else names[0]

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self._values.get(key.lower())
        if value is None:
            return default
        if not isinstance(value, bool):
            self._refuse(key, "true or false")
        return value

    def inside(self, key: str) -> Fields:
        """A mapping within this one; empty if missing."""
        return Fields(self._values[key.lower()] if key in self else {}, self._at(key))

    def each(self, key: str) -> Iterator[Fields]:
        """The mappings of a list; none if missing."""
        for index, item in enumerate(self.items(key)):
            yield Fields(item, f"{self._at(key)}[{index}]")

    def items(self, key: str) -> list[Any]:
        """A list of anything; empty if missing."""
        value = self._values.get(key.lower())
        if value is None:
            return []
        if not isinstance(value, list):
            self._refuse(key, "a list")
        return value

    def entries(self) -> Iterator[tuple[str, Fields]]:
        """Every field as a mapping of its own, by its name as written."""
        for key, name in self._spelling.items():
            yield name, Fields(self._values[key], self._at(key))

    def names(self) -> Iterator[str]:
        """Of every field, as written."""
        yield from self._spelling.values()

    def numbers(self) -> Iterator[tuple[str, int]]:
        """Every field as a whole number, by its name as written."""
        for key, name in self._spelling.items():
            yield name, self.whole(key)


def _short(value: object) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_fields(path: Path) -> Fields:
    """The mapping in a JSON or YAML file."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror or error}; give a file that exists") from None
    except UnicodeDecodeError:
        raise InvalidInput(f"{path} is not a text file; give JSON or YAML in UTF-8") from None
    return Fields(_parse(text, path), str(path))


def _parse(text: str, path: Path) -> object:
    if path.suffix.lower() == ".json":
        return parse_json(text, str(path))
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = " ".join(str(error).split())
        raise InvalidInput(f"{path} is not valid YAML ({where}); correct or complete it") from None


def parse_json(text: str, name: str) -> object:
    """What a JSON text says; `name` stands for it in complaints."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{name} is not valid JSON ({error}); correct or complete it") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
