"""Quantised layers, models and files; the article's items 29 and 30."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flyball.core.errors import InvalidInput
from flyball.engine.config import EngineConfig
from flyball.engine.core import EngineCore
from flyball.engine.model_runner import load_model
from flyball.engine.quantization.embedding import quantize_embedding
from flyball.engine.quantization.files import load_quantized, save_quantized
from flyball.engine.quantization.formats import QuantizationConfig, QuantizationType
from flyball.engine.quantization.gptq import Moments, calibrate, gptq, load_for_calibration, text_windows
from flyball.engine.quantization.integer import Int4Quantizer
from flyball.engine.quantization.linear import QuantizedLinear
from flyball.engine.quantization.walk import quantize_loaded, quantize_model
from flyball.engine.request import SamplingParams

KINDS = list(QuantizationType)
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
PROMPT = [5, 9, 40, 77, 3]


def config(kind: str, **more: Any) -> QuantizationConfig:
    """A configuration with small groups."""
    return QuantizationConfig(quantization_type=QuantizationType(kind), group_size=16, **more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_article_29_a_quantised_layer_is_a_linear_layer_of_any_type(kind: str, dtype: torch.dtype) -> None:
    """Half-precision inputs crashed the article's forward; the answer is x times what the codes stand for."""
    torch.manual_seed(0)
    linear = nn.Linear(40, 24).to(dtype)
    layer = QuantizedLinear.from_linear(linear, config(kind))
    x = torch.randn(2, 3, 40).to(dtype)
    got = layer(x)
    assert got.dtype == dtype
    assert got.shape == (2, 3, 24)
    assert linear.bias is not None
    wanted = F.linear(x.float(), layer.dequantize(), linear.bias.float())
    loose = 0.05 if kind == "int8_dynamic" else 0.02 if dtype == torch.bfloat16 else 0.004
    assert (got.float() - wanted).norm() < loose * wanted.norm()


def test_article_29_what_is_saved_can_be_loaded_and_no_whole_weight_is_made() -> None:
    """`load_state_dict` restores a layer made empty; a forward holds one tile of rows at a time."""
    linear = nn.Linear(2048, 4096, bias=False)
    layer = QuantizedLinear.from_linear(linear, config("int4"))
    empty = QuantizedLinear(2048, 4096, bias=False, config=config("int4"))
    empty.load_state_dict(layer.state_dict())
    x = torch.randn(1, 2048)
    assert torch.equal(empty(x), layer(x))
    assert layer.weight_bytes < 0.4 * linear.weight.nbytes
    seen: list[int] = []
    whole = layer.dequantize

    def watch(rows: slice = slice(None)) -> torch.Tensor:
        seen.append(whole(rows).nbytes)
        return whole(rows)

    layer.dequantize = watch  # type: ignore[method-assign]  # looked at, not replaced
    layer(x)
    assert max(seen) <= 4 * 2**20
    assert len(seen) == 8


def test_dynamic_int8_is_the_integer_product() -> None:
    """Rows of x become int8 with a scale of their own, the sum is exact, then both scales are applied."""
    torch.manual_seed(1)
    layer = QuantizedLinear.from_linear(nn.Linear(64, 16, bias=False), config("int8_dynamic"))
    x = torch.randn(5, 64)
    x[2] = 0
    scale = x.abs().amax(1, keepdim=True) / 127
    codes = torch.where(scale > 0, (x / scale).round(), x).long()
    wanted = (codes @ layer.parts["codes"].long().T).double() * scale.double() * layer.parts["scales"].double()
    assert torch.allclose(layer(x).double(), wanted, rtol=1e-5, atol=1e-6)


def test_article_30_a_model_is_walked_with_the_error_of_each_layer(checkpoint: Path) -> None:
    """Every linear layer but lm_head, none else; errors are those of the weights; patterns skip more."""
    model = load_for_calibration(checkpoint)
    before = {n: p.clone() for n, p in model.named_parameters()}
    report = quantize_model(model, config("int4"), skip=("lm_head", "*.down_proj"))
    assert len(report.layers) == 2 * 6
    assert set(report.skipped) == {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"}
    assert type(model.lm_head) is nn.Linear
    for layer in report.layers:
        made = model.get_submodule(layer.name)
        weight = before[f"{layer.name}.weight"]
        gap = made.dequantize() - weight
        assert layer.relative_error == pytest.approx(float(gap.norm() / weight.norm()), rel=1e-4)
        assert layer.max_error == pytest.approx(float(gap.abs().max()), rel=1e-4)
    assert 0.02 < report.relative_error < 0.15
    with pytest.raises(InvalidInput, match="left to quantise"):
        quantize_model(model, config("int4"), skip=("lm_head", "*.down_proj"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_folder_serves_what_was_saved(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    """The engine loads it and says the same as one that quantises at its start; its metadata tell the format."""
    made = QuantizationConfig(quantization_type=QuantizationType(kind))
    model = load_for_calibration(checkpoint)
    quantize_model(model, made)
    out = tmp_path / "out"
    save_quantized(model, checkpoint, out)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "flyball"
    loaded = EngineCore(EngineConfig(model=out, threads=1, num_blocks=32))
    fresh = EngineCore(EngineConfig(model=checkpoint, threads=1, num_blocks=32, quantization=kind))  # type: ignore[arg-type]
    assert loaded.runner.describe()["quantization"] == kind
    assert loaded.generate([PROMPT], GREEDY) == fresh.generate([PROMPT], GREEDY)
    with pytest.raises(InvalidInput, match="not empty"):
        save_quantized(model, checkpoint, out)


def test_int8_hardly_changes_the_logits_and_takes_the_head_when_told(checkpoint: Path) -> None:
    """Through the whole engine path: close to the float model; `quantize_head` takes in the output layer."""
    plain = load_for_calibration(checkpoint)
    ids = torch.tensor([PROMPT])
    wanted = plain(ids).logits
    quantize_model(plain, config("int8"), skip=())
    assert isinstance(plain.lm_head, QuantizedLinear)
    assert (plain(ids).logits - wanted).norm() < 0.05 * wanted.norm()
    core = EngineCore(EngineConfig(model=checkpoint, threads=1, num_blocks=32, quantization="int4", quantize_head=True))
    assert core.runner.model.lm_head.config.quantization_type == "int8"


def test_a_quantised_embedding_gives_its_rows_and_goes_to_disk(checkpoint: Path, tmp_path: Path) -> None:
    """Each row is off by at most half its own step; a folder holds it; a table of another kind is left alone."""
    model = load_for_calibration(checkpoint)
    table = model.get_input_embeddings().weight.clone()
    quantize_loaded(model, "int4", head=True)
    ids = torch.tensor([[3, 7], [0, 3]])
    rows, wanted = model.get_input_embeddings()(ids), table[ids]
    assert bool(((rows - wanted).abs() <= wanted.abs().amax(-1, keepdim=True) / 254 * 1.001).all())
    save_quantized(model, checkpoint, tmp_path / "out")
    loaded = EngineCore(EngineConfig(model=tmp_path / "out", threads=1, num_blocks=32))
    fresh = EngineCore(
        EngineConfig(model=checkpoint, threads=1, num_blocks=32, quantization="int4", quantize_head=True)
    )
    assert loaded.generate([PROMPT], GREEDY) == fresh.generate([PROMPT], GREEDY)
    assert not quantize_embedding(model)


def test_what_is_quantised_already_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """Twice quantised, or by a method whose kernels are missing: one sentence says so."""
    model = load_for_calibration(checkpoint)
    quantize_model(model, config("int8"))
    save_quantized(model, checkpoint, tmp_path / "q")
    with pytest.raises(InvalidInput, match="already"):
        EngineCore(EngineConfig(model=tmp_path / "q", threads=1, quantization="int4"))
    with pytest.raises(InvalidInput, match="already"):
        load_for_calibration(tmp_path / "q")
    described = json.loads((tmp_path / "q/config.json").read_text())
    for method in ("gptq", "awq"):
        described["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
        (tmp_path / "q/config.json").write_text(json.dumps(described))
        with pytest.raises(InvalidInput, match=method):
            load_model(tmp_path / "q", "auto", "cpu")


def test_a_file_that_does_not_fit_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """Missing tensors are named, not left as they happened to be in memory."""
    model = load_for_calibration(checkpoint)
    quantize_model(model, config("int8"))
    save_quantized(model, checkpoint, tmp_path / "q")
    described = json.loads((tmp_path / "q/config.json").read_text())["quantization_config"]
    described["groups"][0]["layers"].append("lm_head")
    with pytest.raises(InvalidInput, match="lm_head"):
        load_quantized(tmp_path / "q", load_for_calibration(checkpoint), described)


def test_calibration_keeps_products_better_than_rounding() -> None:
    """GPTQ on inputs that hang together: a third less error in what the layer says, none of it in the codes' range."""
    torch.manual_seed(2)
    inputs = torch.randn(512, 12) @ torch.randn(12, 150) + 0.1 * torch.randn(512, 150)
    weight = torch.randn(64, 150)
    seen = Moments(150)
    seen.see(inputs)
    quantizer = Int4Quantizer(group_size=32)

    def lost(parts: dict[str, torch.Tensor]) -> float:
        return float((inputs @ (quantizer.dequantize(parts, 150) - weight).T).norm())

    assert lost(gptq(weight, seen.hessian, quantizer)) < 0.6 * lost(quantizer.quantize(weight))


def test_calibration_walks_the_decoder(checkpoint: Path, tmp_path: Path) -> None:
    """The same layers as by rounding, from a text file; it refuses other formats and too little text."""
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat and went. " * 60)
    model = load_for_calibration(checkpoint)
    report = calibrate(model, config("int4"), text_windows(checkpoint, text, 2))
    assert len(report.layers) == 14
    assert isinstance(model.model.layers[1].mlp.down_proj, QuantizedLinear)
    with pytest.raises(InvalidInput, match="int4"):
        calibrate(model, config("nf4"), [])
    text.write_text("too short")
    with pytest.raises(InvalidInput, match="more text"):
        text_windows(checkpoint, text, 2)
