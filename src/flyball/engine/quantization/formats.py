"""Which formats there are, and how a weight matrix is kept in each: codes and scales, named tensors.

Symbols: N rows (output features), K columns (input features), g columns of a group, G = ceil(K / g) groups of a row.
A group never spans rows; the last one of a row may be shorter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import Tensor

from flyball.core.errors import InvalidInput

Parts = Mapping[str, Tensor]
ALL = slice(None)
COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class QuantizationType(StrEnum):
    """The formats by name."""

    INT8_DYNAMIC = "int8_dynamic"  # int8 weights, activations to int8 as they come, integer products
    INT8 = "int8"  # int8 weights, products in floating point
    INT4 = "int4"
    FP8 = "fp8"  # e4m3
    NF4 = "nf4"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationConfig:
    """How weights are quantised."""

    quantization_type: QuantizationType = QuantizationType.INT8
    group_size: int = 128  # columns that share a scale, int4 and nf4; int8 and fp8 have one scale a row
    symmetric: bool = True  # int8 and int4: zero is code 0; else a zero point a scale, which fits skewed weights
    use_double_quant: bool = False  # nf4: the scales themselves in 8 bits
    compute_dtype: str | None = None  # of products; None: the type of what comes in

    def __post_init__(self) -> None:
        try:
            kind = QuantizationType(self.quantization_type)
        except ValueError:
            raise InvalidInput(
                f"quantization_type={self.quantization_type!r}: give one of {', '.join(QuantizationType)}"
            ) from None
        object.__setattr__(self, "quantization_type", kind)
        if self.group_size < 1:
            raise InvalidInput(f"group_size={self.group_size}: give a count of columns of at least 1")
        if self.use_double_quant and kind is not QuantizationType.NF4:
            raise InvalidInput(f"use_double_quant is for nf4, not for {kind}; leave it out")
        if not self.symmetric and kind not in {QuantizationType.INT8, QuantizationType.INT4}:
            raise InvalidInput(f"symmetric=False is for int8 and int4, not for {kind}; leave it out")
        if self.compute_dtype is not None and self.compute_dtype not in COMPUTE_DTYPES:
            raise InvalidInput(f"compute_dtype={self.compute_dtype!r}: give one of {', '.join(COMPUTE_DTYPES)}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self) | {"quantization_type": str(self.quantization_type)}


class Quantizer(Protocol):
    """One way to keep a matrix; holds no state but its settings."""

    def empty(self, rows: int, columns: int) -> dict[str, Tensor]:
        """Tensors of the right shapes and types, to load saved ones into."""

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Codes and scales of a floating-point matrix [N, K], on its device."""

    def dequantize(self, parts: Parts, columns: int, rows: slice = ALL) -> Tensor:
        """Some rows of what the parts stand for, float32 [.., K]."""


def quantizer_of(config: QuantizationConfig) -> Quantizer:
    """The quantiser of a configuration."""
    from flyball.engine.quantization.floating import Fp8Quantizer, Nf4Quantizer
    from flyball.engine.quantization.integer import Int4Quantizer, Int8Quantizer

    match config.quantization_type:
        case QuantizationType.INT8 | QuantizationType.INT8_DYNAMIC:
            return Int8Quantizer(symmetric=config.symmetric)
        case QuantizationType.INT4:
            return Int4Quantizer(group_size=config.group_size, symmetric=config.symmetric)
        case QuantizationType.FP8:
            return Fp8Quantizer()
        case QuantizationType.NF4:
            return Nf4Quantizer(block_size=config.group_size, double_quant=config.use_double_quant)


def checked(weight: Tensor) -> Tensor:
    """A matrix in float32; raises InvalidInput for what is no finite matrix."""
    if weight.dim() != 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise InvalidInput(f"a weight of shape {list(weight.shape)} and {weight.dtype}: give a floating-point matrix")
    wide = weight.detach().float()
    if not bool(wide.isfinite().all()):
        raise InvalidInput("the weight holds infinity or what is no number; it cannot be quantised, check the model")
    return wide


def grouped(weight: Tensor, size: int) -> Tensor:
    """A matrix [N, K] as [N, G, size], zeros after each row's last column."""
    rows, columns = weight.shape
    groups = -(-columns // size)
    if groups * size != columns:
        weight = torch.nn.functional.pad(weight, (0, groups * size - columns))
    return weight.reshape(rows, groups, size)


def ungrouped(values: Tensor, columns: int) -> Tensor:
    """The inverse of `grouped`."""
    return values.flatten(1)[:, :columns]


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes 0 to 15 [N, K] as bytes [N, ceil(K / 2)]: the even column in the low half."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_nibbles`, uint8 [N, K]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :columns]
