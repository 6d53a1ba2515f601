"""The options that size an engine; `serve` and `config explain` share them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

Model = Annotated[Path | None, typer.Argument(help="Folder of a Hugging Face checkpoint; default: the bundled model.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"], typer.Option(help="Type of weights and KV; auto: the checkpoint's.")
]
MaxNumSeqs = Annotated[int, typer.Option(help="Most sequences at once; the live knob moves below it.")]
MaxNumBatchedTokens = Annotated[int, typer.Option(help="Most tokens in one step; the live knob moves below it.")]
MaxModelLen = Annotated[
    int | None, typer.Option(help="Most tokens of one request; default: the model's positions.", min=1)
]
KvCacheMib = Annotated[int, typer.Option(help="Upper bound of the KV cache in MiB.", min=1)]
BlockSize = Annotated[int, typer.Option(help="Tokens in one KV block.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads of the engine; default: all cores.", min=1)]
Quantization = Annotated[
    Literal["int8_dynamic", "int8", "int4", "fp8", "nf4"] | None,
    typer.Option(help="Keep the weights of linear layers in this format; default: as the checkpoint has them."),
]
QuantizeHead = Annotated[bool, typer.Option(help="Quantise the output layer and the embedding as well, in int8.")]
DraftModel = Annotated[
    Path | None,
    typer.Option(help="Folder of a small model with the same tokenizer, which guesses tokens; the bundled model's own "
                 "is taken by itself."),
]  # fmt: skip
MedusaHeads = Annotated[
    Path | None,
    typer.Option(help="Folder of Medusa heads of the model; the bundled model's are taken by itself."),
]
SpecMethod = Annotated[
    Literal["off", "ngram", "draft", "medusa"],
    typer.Option(help="Who guesses tokens, which the model verifies; the live knob of the same name changes it."),
]

_FIELDS = {"kv_cache_mib": "kv_cache_bytes"}  # where an option has another name, in another unit, than the field


def given(context: typer.Context) -> dict[str, str]:
    """What set which field of the engine's configuration: the option or the variable; defaults are left out."""
    sources: dict[str, str] = {}
    for parameter in context.command.params:
        name = parameter.name or ""
        source = getattr(context.get_parameter_source(name), "name", "")
        field = _FIELDS.get(name, name)
        if source == "COMMANDLINE":
            sources[field] = parameter.opts[0] if parameter.param_type_name == "option" else "argument"
        elif source == "ENVIRONMENT":
            sources[field] = f"environment {parameter.envvar}"
    return sources


def engine_config(model: Path | None, *, kv_cache_mib: int, **fields: Any) -> Any:  # noqa: ANN401  # imported late
    """The engine's configuration; raises InvalidInput for a folder that holds no complete checkpoint.

    The bundled model's draft and heads are loaded with it when guessing is asked for.
    """
    from flyball.engine.config import EngineConfig

    if model is None and fields.get("spec_method") in {"draft", "medusa"}:
        from flyball.engine.bundled import bundled_medusa_path, bundled_model_path

        fields["draft_model"] = fields.get("draft_model") or bundled_model_path("draft")
        fields["medusa_heads"] = fields.get("medusa_heads") or bundled_medusa_path()
    return EngineConfig(model=model_folder(model), kv_cache_bytes=kv_cache_mib * 2**20, **fields)


def model_folder(model: Path | None) -> Path:
    """The checkpoint, looked at before torch is loaded."""
    from flyball.core.errors import InvalidInput

    if model is None:
        from flyball.engine.bundled import bundled_model_path

        return bundled_model_path()
    if not model.is_dir():
        raise InvalidInput(
            f"there is no folder {model}; give the folder of a Hugging Face checkpoint, or none for the bundled model"
        )
    for part, files in (
        ("config.json", ("config.json",)),
        ("tokenizer", ("tokenizer.json", "tokenizer.model", "vocab.json")),
    ):
        if not any((model / file).is_file() for file in files):
            raise InvalidInput(f"{model} holds no {part}; give the folder of a complete Hugging Face checkpoint")
    return model
