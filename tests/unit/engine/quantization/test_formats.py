"""Quantisers: bounds, odd shapes, exact codes; the article's items 25 to 28, each a test that fails on its code."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flyball.core.errors import InvalidInput
from flyball.engine.quantization.floating import (
    NF4_LEVELS,
    Fp8Quantizer,
    Nf4Quantizer,
    double_dequantize,
    double_quantize,
    dynamic_levels,
)
from flyball.engine.quantization.formats import (
    QuantizationConfig,
    QuantizationType,
    Quantizer,
    pack_nibbles,
    quantizer_of,
    unpack_nibbles,
)
from flyball.engine.quantization.integer import Int4Quantizer, Int8Quantizer

QUANTIZERS: dict[str, Quantizer] = {
    "int8": Int8Quantizer(),
    "int8 asymmetric": Int8Quantizer(symmetric=False),
    "int4": Int4Quantizer(group_size=32),
    "int4 asymmetric": Int4Quantizer(group_size=32, symmetric=False),
    "fp8": Fp8Quantizer(),
    "nf4": Nf4Quantizer(block_size=32),
    "nf4 double": Nf4Quantizer(block_size=32, double_quant=True),
}
INTEGERS = [name for name in QUANTIZERS if name.startswith("int")]


def back(quantizer: Quantizer, weight: Tensor) -> Tensor:
    """What is left of a weight."""
    return quantizer.dequantize(quantizer.quantize(weight), weight.shape[1])


def steps(quantizer: Any, weight: Tensor) -> Tensor:
    """The scale that each weight is under, [N, K]."""
    scales = quantizer.quantize(weight)["scales"]
    if scales.dim() == 1:
        return scales[:, None].expand_as(weight)
    return scales.repeat_interleave(quantizer.group_size, 1)[:, : weight.shape[1]]


@pytest.mark.parametrize("name", INTEGERS)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    size=st.floats(1e-6, 1e6),
    shift=st.floats(-3, 3),
    seed=st.integers(0, 2**31),
)
def test_no_weight_moves_by_more_than_half_a_step(
    name: str, rows: int, columns: int, size: float, shift: float, seed: int
) -> None:
    """O12: rounding to the nearest of the grid, whatever the shape, the magnitude and the skew."""
    weight = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + shift) * size
    quantizer = QUANTIZERS[name]
    gap = (back(quantizer, weight) - weight).abs()
    assert bool((gap <= steps(quantizer, weight) * 0.5 * (1 + 1e-5) + 1e-6 * weight.abs()).all())


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_constants_and_outliers_stay_numbers(name: str, dtype: torch.dtype) -> None:
    """O12: an all-zero row is kept exactly, a constant and an outlier within the format's step."""
    weight = torch.zeros(4, 67, dtype=dtype)
    weight[1] = 0.03
    weight[2, 5] = 2.0
    weight[3] = torch.linspace(5, 6, 67)
    kept = back(QUANTIZERS[name], weight)
    assert bool(kept.isfinite().all())
    double = "double" in name  # the offset of the scales rounds a zero scale a little
    assert kept[0].abs().max() == 0 or double
    assert kept[2, 5] == pytest.approx(2.0, rel=0.02)
    assert (kept[3] - weight[3].float()).abs().max() < 0.6


@pytest.mark.parametrize("name", QUANTIZERS)
def test_any_rows_come_back_alone(name: str) -> None:
    """A tile of rows is what the whole has there; loading into empty parts fits shapes and types."""
    quantizer, weight = QUANTIZERS[name], torch.randn(9, 45)
    parts = quantizer.quantize(weight)
    assert torch.equal(quantizer.dequantize(parts, 45, slice(2, 7)), quantizer.dequantize(parts, 45)[2:7])
    for key, empty in quantizer.empty(9, 45).items():
        assert (empty.shape, empty.dtype) == (parts[key].shape, parts[key].dtype)


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(0, 4), torch.ones(2, 2, dtype=torch.int32),
                                 torch.tensor([[1.0, torch.nan]])])  # fmt: skip
def test_what_is_no_finite_matrix_is_refused(bad: Tensor) -> None:
    """Codes of not-a-number would be silent nonsense."""
    with pytest.raises(InvalidInput):
        Int8Quantizer().quantize(bad)


def test_a_configuration_is_checked_at_birth() -> None:
    """A combination without meaning is an error, not ignored."""
    for fields in ({"quantization_type": "int3"}, {"group_size": 0}, {"use_double_quant": True},
                   {"quantization_type": "fp8", "symmetric": False}, {"compute_dtype": "int8"}):  # fmt: skip
        with pytest.raises(InvalidInput):
            QuantizationConfig(**fields)
    assert QuantizationConfig(quantization_type="nf4").quantization_type is QuantizationType.NF4  # type: ignore[arg-type]


def test_article_25_an_outlier_costs_its_own_row_only_and_zeros_are_no_nan() -> None:
    """The article's one scale for the tensor loses 0.2 of a weight with one outlier; a scale a row loses 0.02."""
    torch.manual_seed(0)
    weight = torch.randn(1024, 1024) * 0.02
    weight[3, 7] = 2.0
    lost = (back(Int8Quantizer(), weight) - weight).norm() / weight.norm()
    scale = weight.abs().max() / 127
    whole = ((weight / scale).round() * scale - weight).norm() / weight.norm()
    assert lost < 0.015
    assert whole > 0.2  # what the article does
    assert torch.equal(back(Int8Quantizer(), torch.zeros(4, 4)), torch.zeros(4, 4))


def test_article_26_zero_points_are_codes_and_constants_are_kept() -> None:
    """[5, 6] gave a zero point of -1275 and a constant a division by 0; now 0 is always in the range."""
    quantizer = Int8Quantizer(symmetric=False)
    parts = quantizer.quantize(torch.tensor([[5.0, 6.0], [4.0, 4.0], [-4.0, -4.0]]))
    assert parts["zeros"].dtype == torch.uint8
    assert parts["zeros"].tolist() == [0, 0, 255]
    assert torch.allclose(
        quantizer.dequantize(parts, 2), torch.tensor([[5.0, 6.0], [4.0, 4.0], [-4.0, -4.0]]), atol=0.02
    )
    skewed = torch.rand(8, 256) + 1
    assert (back(quantizer, skewed) - skewed).norm() < 0.8 * (back(Int8Quantizer(), skewed) - skewed).norm()


@pytest.mark.parametrize("columns", [160, 97, 1, 128])
def test_article_27_groups_end_with_their_row(columns: int) -> None:
    """Any shape; what is in one row changes nothing in another (the article's groups ran over, or raised)."""
    torch.manual_seed(1)
    weight = torch.randn(6, columns)
    quantizer = Int4Quantizer(group_size=128)
    alone = torch.cat([back(quantizer, row[None]) for row in weight])
    assert torch.equal(back(quantizer, weight), alone)
    codes = torch.randint(0, 16, (5, columns), dtype=torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes), columns), codes)


def test_article_28_every_declared_format_works_and_loses_what_its_bits_allow() -> None:
    """fp8, nf4 and double quantisation raised; now 8 bits lose under .03 and 4 bits under .13 of normal weights."""
    torch.manual_seed(2)
    weight = torch.randn(256, 512) * 0.02
    for kind in QuantizationType:
        quantizer = quantizer_of(QuantizationConfig(quantization_type=kind))
        lost = float((back(quantizer, weight) - weight).norm() / weight.norm())
        assert lost < (0.13 if kind in {"int4", "nf4"} else 0.03), kind
    double = Nf4Quantizer(block_size=64, double_quant=True)
    sizes = sum(t.nbytes for t in double.quantize(weight).values()) * 8 / weight.numel()
    assert sizes < 4.15
    single, both = back(Nf4Quantizer(block_size=64), weight), back(double, weight)
    assert (both - weight).norm() < 1.01 * (single - weight).norm()


def test_fp8_codes_are_those_of_torch() -> None:
    """O12: the scaled weight cast by torch, exactly; the row's largest becomes 448."""
    weight = torch.randn(8, 33)
    parts = Fp8Quantizer().quantize(weight)
    wanted = (weight / (weight.abs().amax(1, keepdim=True) / 448)).to(torch.float8_e4m3fn)
    assert torch.equal(parts["codes"].float(), wanted.float())
    assert bool((parts["codes"].float().abs().amax(1) == 448).all())


def bitsandbytes() -> Any:
    """The library, whose import warns of kernels it cannot find here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(
            "bitsandbytes.functional", reason="bitsandbytes is not installed", exc_type=ImportError
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [64, 128])
def test_nf4_is_bitsandbytes_nf4(dtype: torch.dtype, block: int) -> None:
    """O12: the same codes, maxima and dequantised weights as bitsandbytes on the CPU, bit for bit."""
    bnb = bitsandbytes()
    torch.manual_seed(3)
    weight = (torch.randn(48, 256) * 0.02).to(dtype)
    packed, state = bnb.quantize_4bit(weight, blocksize=block, quant_type="nf4")
    quantizer = Nf4Quantizer(block_size=block)
    parts = quantizer.quantize(weight)
    theirs = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), -1).flatten().reshape(weight.shape)
    assert torch.equal(unpack_nibbles(parts["codes"], 256), theirs)
    assert torch.equal(parts["scales"].flatten(), state.absmax)
    assert torch.equal(quantizer.dequantize(parts, 256).to(dtype), bnb.dequantize_4bit(packed, state))
    assert torch.tensor(NF4_LEVELS).tolist() == pytest.approx(state.code.tolist(), abs=1e-7)


def test_double_quantisation_is_bitsandbytes() -> None:
    """O12: same levels, maxima and mean; the same codes but where its search ends one beside the nearest level."""
    bnb = bitsandbytes()
    torch.manual_seed(4)
    weight = torch.randn(96, 512) * 0.02
    _, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    parts = double_quantize(Nf4Quantizer(block_size=64).quantize(weight)["scales"])
    levels = torch.tensor(dynamic_levels())
    assert torch.equal(levels, state.state2.code)
    assert torch.equal(parts["scale_maxima"], state.state2.absmax)
    assert float(parts["scale_offset"]) == float(state.offset)
    ours, theirs = parts["scale_codes"].flatten().int(), state.absmax.int()
    assert (ours - theirs).abs().max() <= 1
    assert (ours != theirs).float().mean() < 0.02
    scales = Nf4Quantizer(block_size=64).quantize(weight)["scales"]
    their_scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert (double_dequantize(parts) - scales).abs().max() <= (their_scales.reshape(scales.shape) - scales).abs().max()
