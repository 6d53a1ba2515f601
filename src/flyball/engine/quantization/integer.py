"""Integers with scales: int8 a row, int4 a group of columns.

Symbols as in `formats`; w weight, s scale, z zero point, q code: w is about s * (q - z), off by at most s / 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flyball.engine.quantization.formats import ALL, Parts, checked, grouped, pack_nibbles, ungrouped, unpack_nibbles


def scale_and_zero(weight: Tensor, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the last dimension, which is kept with size 1.

    Asymmetric ranges are widened to hold 0, so that the zero point is a code and zeros stay zeros. Where all weights
    are 0 the scale is 1.
    """
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = weight.abs().amax(-1, keepdim=True) / top
        zero = torch.zeros_like(scale)
    else:
        low = weight.amin(-1, keepdim=True).clamp_max(0)
        high = weight.amax(-1, keepdim=True).clamp_min(0)
        scale = (high - low) / (2**bits - 1)
        zero = (-low / _nonzero(scale)).round()
    return _nonzero(scale), zero


def _nonzero(scale: Tensor) -> Tensor:
    """Scales whose reciprocal is a number: 1 in place of 0 and of the subnormal."""
    return torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Quantizer:
    """One scale a row; asymmetric also one zero point a row.

    >>> q = Int8Quantizer()
    >>> q.dequantize(q.quantize(torch.tensor([[0.0, 0.5, -1.27]])), 3)
    tensor([[ 0.0000,  0.5000, -1.2700]])
    """

    symmetric: bool = True

    def empty(self, rows: int, columns: int) -> dict[str, Tensor]:
        """Tensors of the right shapes and types, to load saved ones into."""
        kind = torch.int8 if self.symmetric else torch.uint8
        parts = {"codes": torch.empty(rows, columns, dtype=kind), "scales": torch.empty(rows)}
        return parts if self.symmetric else parts | {"zeros": torch.empty(rows, dtype=torch.uint8)}

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Codes [N, K], scales [N] float32 and, if asymmetric, zeros [N] uint8."""
        weight = checked(weight)
        scale, zero = scale_and_zero(weight, 8, symmetric=self.symmetric)
        codes = (weight / scale).round() + zero
        if self.symmetric:
            return {"codes": codes.clamp(-127, 127).to(torch.int8), "scales": scale[:, 0]}
        return {
            "codes": codes.clamp(0, 255).to(torch.uint8), "scales": scale[:, 0], "zeros": zero[:, 0].to(torch.uint8),
        }  # fmt: skip

    def dequantize(self, parts: Parts, columns: int, rows: slice = ALL) -> Tensor:  # noqa: ARG002  # codes tell
        """Some rows of what the parts stand for, float32 [.., K]."""
        values = parts["codes"][rows].float()
        if not self.symmetric:
            values -= parts["zeros"][rows].float()[:, None]
        return values * parts["scales"][rows][:, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Quantizer:
    """One scale a group; two codes a byte, kept as code + 8 where symmetric."""

    group_size: int = 128
    symmetric: bool = True

    def empty(self, rows: int, columns: int) -> dict[str, Tensor]:
        """Tensors of the right shapes and types, to load saved ones into."""
        groups = -(-columns // self.group_size)
        parts = {
            "codes": torch.empty(rows, -(-columns // 2), dtype=torch.uint8),
            "scales": torch.empty(rows, groups, dtype=torch.float32),
        }
        return parts if self.symmetric else parts | {"zeros": torch.empty(rows, groups, dtype=torch.uint8)}

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Codes [N, ceil(K / 2)] uint8, scales [N, G] float32 and, if asymmetric, zeros [N, G] uint8."""
        weight = checked(weight)
        groups = grouped(weight, self.group_size)
        scale, zero = self.grid(groups)
        return self.parts(ungrouped(self.codes(groups, scale, zero), weight.shape[1]), scale[..., 0], zero[..., 0])

    def grid(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and code of zero for groups [.., g], each [.., 1]."""
        scale, zero = scale_and_zero(weight, 4, symmetric=self.symmetric)
        return scale, zero + 8 if self.symmetric else zero

    def codes(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest codes on a grid, float."""
        return ((weight / scale).round() + zero).clamp(1 if self.symmetric else 0, 15)

    def parts(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
        """As kept: codes [N, K], scales and zeros [N, G]."""
        kept = {"codes": pack_nibbles(codes.to(torch.uint8)), "scales": scales.contiguous()}
        return kept if self.symmetric else kept | {"zeros": zeros.to(torch.uint8)}

    def dequantize(self, parts: Parts, columns: int, rows: slice = ALL) -> Tensor:
        """Some rows of what the parts stand for, float32 [.., K]."""
        groups = grouped(unpack_nibbles(parts["codes"][rows], columns).float(), self.group_size)
        zeros = 8.0 if self.symmetric else parts["zeros"][rows].float()[..., None]
        return ungrouped((groups - zeros) * parts["scales"][rows][..., None], columns)
