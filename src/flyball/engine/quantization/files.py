"""Quantised models on disk: a Hugging Face folder whose `config.json` says how each layer is kept.

Weights lie in one `model.safetensors`, codes and scales beside what was not quantised; its metadata repeats the
configuration. Readers that do not know the method refuse the folder rather than read codes as weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from flyball.core.errors import InvalidInput
from flyball.engine.quantization.embedding import QuantizedEmbedding
from flyball.engine.quantization.formats import QuantizationConfig
from flyball.engine.quantization.linear import QuantizedLinear
from flyball.engine.quantization.walk import replace_by_empty

METHOD = "flyball"
WEIGHTS = "model.safetensors"
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.gguf", "*.pth")


def describe_layers(model: nn.Module) -> dict[str, Any]:
    """What `config.json` says: the configurations that occur, and which layers are kept under each."""
    groups: list[dict[str, Any]] = []
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            config = layer.config.to_dict()
            group = next((g for g in groups if g["config"] == config), None)
            if group is None:
                groups.append({"config": config, "layers": [name]})
            else:
                group["layers"].append(name)
    embedding = any(isinstance(layer, QuantizedEmbedding) for layer in model.modules())
    return {"quant_method": METHOD, "groups": groups, "int8_embedding": embedding}


def layer_configs(described: Mapping[str, Any]) -> dict[str, QuantizationConfig]:
    """The configuration of each quantised layer; raises InvalidInput for what `describe_layers` did not write."""
    try:
        return {
            name: QuantizationConfig(**group["config"]) for group in described["groups"] for name in group["layers"]
        }
    except (KeyError, TypeError) as error:
        raise InvalidInput(
            f"the quantization_config of this checkpoint cannot be read ({error!r}); quantise the model anew"
        ) from error


def save_quantized(model: nn.Module, source: Path, out: Path) -> int:
    """Write a model that `quantize_model` changed, with all of `source` but its weights; returns bytes of weights.

    Raises InvalidInput where `out` is not a new or empty folder.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InvalidInput(f"{out} is a file or a folder that is not empty; name a new folder for the quantised model")
    shutil.copytree(source, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_WEIGHT_FILES))
    described = describe_layers(model)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = described
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    kept: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not any(tensor.data_ptr() == other.data_ptr() and tensor.shape == other.shape for other in kept.values()):
            kept[name] = tensor.contiguous()
    save_file(kept, out / WEIGHTS, metadata={"format": "pt", "quantization": json.dumps(described)})
    return sum(tensor.nbytes for tensor in kept.values())


def load_quantized(path: Path, model: Any, described: Mapping[str, Any]) -> None:  # noqa: ANN401  # untyped library
    """Fill a model of the right architecture, whatever its weights are, from a folder that `save_quantized` wrote."""
    replace_by_empty(model, layer_configs(described))
    if described.get("int8_embedding"):
        table = model.get_input_embeddings()
        model.set_input_embeddings(QuantizedEmbedding(table.num_embeddings, table.embedding_dim, table.weight.dtype))
    try:
        with safe_open(path / WEIGHTS, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (OSError, SafetensorError) as error:
        raise InvalidInput(f"cannot read {path / WEIGHTS}: {error}; quantise the model anew") from error
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # a tied tensor was saved once
        missing = [name for name in missing if name != "lm_head.weight" or not model.config.tie_word_embeddings]
    if missing or unexpected:
        what = f"lacks {missing[0]}" if missing else f"holds {unexpected[0]}, which the model has not"
        raise InvalidInput(f"{path / WEIGHTS} {what}; quantise the model anew")
