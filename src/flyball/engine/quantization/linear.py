"""A linear layer whose weight is kept quantised, and computed with wherever it stands."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flyball.core.errors import InvalidInput
from flyball.engine.quantization.formats import COMPUTE_DTYPES, QuantizationConfig, QuantizationType, quantizer_of

_TILE_BYTES = 4 * 2**20  # of float32 weights that exist at one time


class QuantizedLinear(nn.Module):
    """`y = x @ dequantize(weight).T + bias`; codes and scales are buffers, so `load_state_dict` restores them.

    The weight is made whole again a tile of rows at a time. Under int8_dynamic each row of x, too, becomes int8 with
    a scale of its own.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, config: QuantizationConfig) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.config = config
        self.quantizer = quantizer_of(config)
        self._names = []
        for name, tensor in self.quantizer.empty(out_features, in_features).items():
            self._names.append(name)
            self.register_buffer(name, tensor)
        self.bias: nn.Parameter | None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: QuantizationConfig) -> QuantizedLinear:
        """Quantise a layer; its bias is kept as it is, its weight is not kept."""
        return cls.from_parts(linear, config, quantizer_of(config).quantize(linear.weight))

    @classmethod
    def from_parts(cls, linear: nn.Linear, config: QuantizationConfig, parts: dict[str, Tensor]) -> QuantizedLinear:
        """The layer in place of one whose weight was quantised already."""
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, config=config)
        for name in made._names:
            wanted = getattr(made, name)
            if parts[name].shape != wanted.shape or parts[name].dtype != wanted.dtype:
                raise InvalidInput(
                    f"{name} of shape {list(parts[name].shape)} and {parts[name].dtype} do not fit a "
                    f"{config.quantization_type} layer that wants {list(wanted.shape)} and {wanted.dtype}"
                )
            made.register_buffer(name, parts[name])
        if linear.bias is not None:
            made.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        return made

    @property
    def parts(self) -> dict[str, Tensor]:
        """Codes and scales by name."""
        return {name: cast(Tensor, getattr(self, name)) for name in self._names}

    @property
    def weight_bytes(self) -> int:
        """Memory of codes and scales."""
        return sum(tensor.nbytes for tensor in self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        """Memory of codes and scales in bits a weight."""
        return 8 * self.weight_bytes / (self.in_features * self.out_features)

    def dequantize(self, rows: slice = slice(None)) -> Tensor:
        """Some rows of the weight, float32."""
        return self.quantizer.dequantize(self.parts, self.in_features, rows)

    def forward(self, x: Tensor) -> Tensor:
        """Map [.., in_features] to [.., out_features], in the type of x."""
        if x.shape[-1] != self.in_features:
            raise InvalidInput(f"an input of {x.shape[-1]} features: this layer takes {self.in_features}")
        dtype = COMPUTE_DTYPES[self.config.compute_dtype] if self.config.compute_dtype else x.dtype
        dynamic = self.config.quantization_type is QuantizationType.INT8_DYNAMIC
        rows = quantized_rows(x) if dynamic else x
        tile = max(1, _TILE_BYTES // (4 * self.in_features))
        out = x.new_empty((*x.shape[:-1], self.out_features), dtype=torch.float32 if dynamic else dtype)
        for start in range(0, self.out_features, tile):
            here = slice(start, start + tile)
            out[..., here] = F.linear(rows.to(out.dtype), self.dequantize(here).to(out.dtype))
        if self.bias is not None:
            out += self.bias.to(out.dtype)
        return out.to(x.dtype)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.config.quantization_type}, bits={self.bits_per_weight:.2f}"
        )


def quantized_rows(x: Tensor) -> Tensor:
    """What int8 with one scale a row keeps of activations [.., K], float32; a row of zeros stays so."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale > 0, (wide / scale).round() * scale, wide)
