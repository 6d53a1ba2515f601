"""From a model to its quantised self: every linear layer but those that are named, with the error of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from flyball.core.errors import InvalidInput
from flyball.engine.quantization.embedding import QuantizedEmbedding, quantize_embedding
from flyball.engine.quantization.formats import QuantizationConfig, QuantizationType
from flyball.engine.quantization.linear import QuantizedLinear

DEFAULT_SKIP = ("lm_head",)  # embeddings and norms are no linear layers and are never touched


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError:
    """What quantising one layer lost."""

    name: str
    shape: tuple[int, int]
    bits_per_weight: float
    relative_error: float  # Frobenius norm of what was lost over that of the weight; 0 where the weight is 0
    max_error: float  # largest of any one weight


@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """Every layer that was quantised, in order, and the names of linear layers that were skipped."""

    layers: tuple[LayerError, ...]
    skipped: tuple[str, ...]

    @property
    def relative_error(self) -> float:
        """Mean over the layers, each counted by its weights."""
        weights = [layer.shape[0] * layer.shape[1] for layer in self.layers]
        lost = sum(w * layer.relative_error for w, layer in zip(weights, self.layers, strict=True))
        return lost / sum(weights)

    @property
    def bits_per_weight(self) -> float:
        """Mean over all quantised weights."""
        weights = [layer.shape[0] * layer.shape[1] for layer in self.layers]
        return sum(w * layer.bits_per_weight for w, layer in zip(weights, self.layers, strict=True)) / sum(weights)


Make = Callable[[str, nn.Linear], QuantizedLinear]


def quantize_model(
    model: nn.Module,
    config: QuantizationConfig,
    *,
    skip: Sequence[str] = DEFAULT_SKIP,
    make: Make | None = None,
) -> QuantizationReport:
    """Replace linear layers in place by quantised ones; `skip` holds names, ends of names, or patterns with `*`.

    `make` builds a layer in another way than by rounding, as calibration does. Raises InvalidInput where nothing is
    left to quantise.
    """
    layers, skipped = [], []
    for name, owner, attribute, linear in list(linear_layers(model)):
        if is_skipped(name, skip):
            skipped.append(name)
            continue
        made = make(name, linear) if make else QuantizedLinear.from_linear(linear, config)
        layers.append(layer_error(name, linear.weight, made))
        setattr(owner, attribute, made)
    if not layers:
        raise InvalidInput(f"no linear layer is left to quantise after skipping {', '.join(skip) or 'none'}")
    return QuantizationReport(tuple(layers), tuple(skipped))


def quantize_loaded(model: nn.Module, quantization: str, *, head: bool) -> QuantizationReport:
    """Quantise a model under the defaults of a format; `head` takes in the output layer and the embedding, as int8.

    The output layer decides between neighbours, so that it is kept in 8 bits also where all else has 4; so is the
    embedding, of which a step reads some rows only: it counts as memory, not as time.
    Raises InvalidInput for a model that is quantised already.
    """
    already = quantization_of(model)
    if already is not None:
        raise InvalidInput(f"this model's weights are in {already} already; leave quantization={quantization} out")
    config = QuantizationConfig(quantization_type=QuantizationType(quantization))
    report = quantize_model(model, config)
    if not head:
        return report
    kind = QuantizationType(quantization)
    kind = kind if kind is QuantizationType.INT8_DYNAMIC else QuantizationType.INT8
    body = ("model.*", "transformer.*")
    quantize_embedding(model)
    top = quantize_model(model, QuantizationConfig(quantization_type=kind), skip=body)
    return QuantizationReport(report.layers + top.layers, ())


def parameter_count(model: nn.Module) -> int:
    """Weights of a model, however many bits each is kept in."""
    narrow = [m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear)]
    narrow += [m.codes.numel() for m in model.modules() if isinstance(m, QuantizedEmbedding)]
    return sum(narrow) + sum(p.numel() for p in model.parameters())


def quantization_of(model: nn.Module) -> str | None:
    """The format of a model's weights, by the first layer that has one; None: not quantised."""
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            return str(layer.config.quantization_type)
    described = quantization_config(getattr(model, "config", None))
    return described.get("quant_method")


def quantization_config(config: object) -> dict[str, Any]:
    """What a checkpoint's configuration says of how its weights are kept; empty: nothing."""
    described = getattr(config, "quantization_config", None) or {}
    return described if isinstance(described, dict) else described.to_dict()


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Linear]]:
    """Name, owner, attribute and layer of each `nn.Linear`, in the model's order."""
    for prefix, owner in model.named_modules():
        for attribute, child in owner.named_children():
            if type(child) is nn.Linear:
                yield f"{prefix}.{attribute}" if prefix else attribute, owner, attribute, child


def is_skipped(name: str, skip: Sequence[str]) -> bool:
    """Whether a layer's name, its end, or its whole under a pattern, is among those to skip."""
    return any(name == s or name.endswith(f".{s}") or fnmatchcase(name, s) for s in skip)


def layer_error(name: str, weight: Tensor, made: QuantizedLinear) -> LayerError:
    """How far a quantised layer's weight is from the weight."""
    lost, norm, worst = 0.0, 0.0, 0.0
    step = max(1, 2**20 // made.in_features)
    for start in range(0, made.out_features, step):
        rows = slice(start, start + step)
        wide = weight[rows].detach().float()
        gap = wide - made.dequantize(rows)
        lost += float(gap.square().sum(dtype=torch.float64))
        norm += float(wide.square().sum(dtype=torch.float64))
        worst = max(worst, float(gap.abs().max()))
    return LayerError(
        name=name,
        shape=(made.out_features, made.in_features),
        bits_per_weight=made.bits_per_weight,
        relative_error=(lost / norm) ** 0.5 if norm else 0.0,
        max_error=worst,
    )


def replace_by_empty(model: nn.Module, configs: Mapping[str, QuantizationConfig]) -> None:
    """Put layers without content in the place of those named, to load saved ones into."""
    found = {name: (owner, attribute, linear) for name, owner, attribute, linear in linear_layers(model)}
    for name, config in configs.items():
        if name not in found:
            raise InvalidInput(f"the quantised checkpoint names {name}, which this model has not; save it anew")
        owner, attribute, linear = found[name]
        bias = linear.bias is not None
        setattr(owner, attribute, QuantizedLinear(linear.in_features, linear.out_features, bias=bias, config=config))
