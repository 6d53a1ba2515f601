"""Formats whose codes are not evenly spaced: fp8 (e4m3) and NF4 with, if wanted, its scales in 8 bits as well.

NF4 is the 4-bit format of QLoRA (Dettmers et al. 2023, arXiv:2305.14314, appendix E): 16 levels at quantiles of a
normal distribution, one absolute maximum a block. Double quantisation keeps these maxima, less their mean, in the
8-bit dynamic tree format of Dettmers et al. 2021 (arXiv:2110.02861), blocks of 256.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from flyball.engine.quantization.formats import ALL, Parts, checked, grouped, pack_nibbles, ungrouped, unpack_nibbles

FP8_MAX = 448.0  # largest finite e4m3 number
SCALE_BLOCK = 256  # scales that share a maximum under double quantisation

# fmt: off
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on


@dataclass(frozen=True, slots=True)
class Fp8Quantizer:
    """e4m3 numbers with one scale a row, which puts the row's largest at 448."""

    def empty(self, rows: int, columns: int) -> dict[str, Tensor]:
        """Tensors of the right shapes and types, to load saved ones into."""
        return {"codes": torch.empty(rows, columns, dtype=torch.float8_e4m3fn), "scales": torch.empty(rows)}

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Codes [N, K] float8_e4m3fn and scales [N] float32."""
        weight = checked(weight)
        top = weight.abs().amax(-1)
        scales = torch.where(top < torch.finfo(torch.float32).tiny * FP8_MAX, torch.ones_like(top), top / FP8_MAX)
        codes = (weight / scales[:, None]).clamp(-FP8_MAX, FP8_MAX)
        return {"codes": codes.to(torch.float8_e4m3fn), "scales": scales}

    def dequantize(self, parts: Parts, columns: int, rows: slice = ALL) -> Tensor:  # noqa: ARG002  # codes tell
        """Some rows of what the parts stand for, float32 [.., K]."""
        return parts["codes"][rows].float() * parts["scales"][rows][:, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Nf4Quantizer:
    """16 normal quantiles times one absolute maximum a block."""

    block_size: int = 64
    double_quant: bool = False

    def empty(self, rows: int, columns: int) -> dict[str, Tensor]:
        """Tensors of the right shapes and types, to load saved ones into."""
        groups = -(-columns // self.block_size)
        codes = torch.empty(rows, -(-columns // 2), dtype=torch.uint8)
        if not self.double_quant:
            return {"codes": codes, "scales": torch.empty(rows, groups)}
        return {
            "codes": codes,
            "scale_codes": torch.empty(rows, groups, dtype=torch.uint8),
            "scale_maxima": torch.empty(-(-rows * groups // SCALE_BLOCK)),
            "scale_offset": torch.empty(()),
        }

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Codes [N, ceil(K / 2)] uint8 and scales [N, G] float32, or what `double_quantize` makes of them."""
        weight = checked(weight)
        groups = grouped(weight, self.block_size)
        scales = groups.abs().amax(-1)
        levels = torch.tensor(NF4_LEVELS, device=weight.device)
        safe = torch.where(scales < torch.finfo(torch.float32).tiny, torch.ones_like(scales), scales)
        codes = torch.bucketize(groups / safe[..., None], (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
        kept = {"codes": pack_nibbles(ungrouped(codes, weight.shape[1]))}
        return kept | (double_quantize(scales) if self.double_quant else {"scales": scales})

    def scales(self, parts: Parts) -> Tensor:
        """The scale of each block [N, G], float32."""
        return double_dequantize(parts) if self.double_quant else parts["scales"]

    def dequantize(self, parts: Parts, columns: int, rows: slice = ALL) -> Tensor:
        """Some rows of what the parts stand for, float32 [.., K]."""
        codes = parts["codes"]
        levels = torch.tensor(NF4_LEVELS, device=codes.device)
        values = levels[unpack_nibbles(codes[rows], columns).int()]
        scales = self.scales(parts)[rows]
        return ungrouped(grouped(values, self.block_size) * scales[..., None], columns)


def double_quantize(scales: Tensor) -> dict[str, Tensor]:
    """Scales [N, G] less their mean as 8-bit codes, with one maximum for 256 of them in row order."""
    offset = scales.mean()
    blocks = grouped((scales - offset).reshape(1, -1), SCALE_BLOCK)[0]
    maxima = blocks.abs().amax(-1)
    safe = torch.where(maxima > 0, maxima, torch.ones_like(maxima))
    levels = torch.tensor(dynamic_levels(), device=scales.device)
    codes = torch.bucketize(blocks / safe[:, None], (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    codes = codes.flatten()[: scales.numel()].reshape(scales.shape)
    return {"scale_codes": codes, "scale_maxima": maxima, "scale_offset": offset}


def double_dequantize(parts: Parts) -> Tensor:
    """The scales that `double_quantize` kept, float32 [N, G]."""
    codes = parts["scale_codes"]
    levels = torch.tensor(dynamic_levels(), device=codes.device)
    blocks = grouped(levels[codes.int()].reshape(1, -1), SCALE_BLOCK)[0] * parts["scale_maxima"][:, None]
    return blocks.flatten()[: codes.numel()].reshape(codes.shape) + parts["scale_offset"]


@cache
def dynamic_levels() -> tuple[float, ...]:
    """The 256 levels of the 8-bit dynamic tree: per decade from 1e-6 to 1 twice as many, evenly spread; 0 and 1."""
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        for level in ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)).tolist():
            levels += [level, -level]
    return tuple(sorted(levels))
