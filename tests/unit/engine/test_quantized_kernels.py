"""Compiled products on quantised weights say what torch says on the same codes, for every format and row count."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from flyball.engine.config import EngineConfig
from flyball.engine.core import EngineCore
from flyball.engine.cpu.build import KernelsUnavailable, load_kernels
from flyball.engine.cpu.quantized import check_quantized, pack
from flyball.engine.quantization.formats import QuantizationConfig, QuantizationType
from flyball.engine.quantization.linear import QuantizedLinear
from flyball.engine.quantization.walk import quantize_model
from flyball.engine.request import SamplingParams

KINDS = list(QuantizationType)


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    """The library; skips where it cannot be built."""
    try:
        return load_kernels()
    except KernelsUnavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(100, 96), (64, 256)])
def test_each_product_is_torchs(kernels: ctypes.CDLL, kind: QuantizationType, n: int, k: int) -> None:
    """One row, two, those that are widened first, and more than one block; a last group that is shorter."""
    torch.manual_seed(n)
    config = QuantizationConfig(quantization_type=kind, group_size=64)
    layer = QuantizedLinear.from_linear(nn.Linear(k, n, bias=False), config)
    weight, kept = pack(kernels, (layer,))
    for rows in (1, 2, 3, 7, 33, 130):
        x = torch.randn(rows, k).bfloat16()
        y = torch.empty(rows, n)
        kernels.fq_linear(x.data_ptr(), rows, k, ctypes.addressof(weight), n, y.data_ptr(), 2)
        wanted = layer(x.float())
        assert (y - wanted).norm() < 4e-3 * wanted.norm()
    assert kept


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_every_code_is_what_it_stands_for(kernels: ctypes.CDLL, kind: str) -> None:
    """All 256 bytes, one a column of K, multiplied by a unit vector each: fp8's small numbers and zeros too."""
    config = QuantizationConfig(quantization_type=QuantizationType(kind))
    layer = QuantizedLinear.from_linear(nn.Linear(256, 16, bias=False), config)
    codes = torch.arange(256, dtype=torch.uint8).clone()
    if kind == "fp8":
        codes[codes & 127 == 127] = 0  # not a number
    layer.codes = codes.view(layer.parts["codes"].dtype).expand(16, 256).contiguous()
    layer.scales = torch.ones(16)
    weight, kept = pack(kernels, (layer,))
    for rows in (1, 256):
        x = torch.eye(256)[:rows].bfloat16()
        y = torch.empty(rows, 16)
        kernels.fq_linear(x.data_ptr(), rows, 256, ctypes.addressof(weight), 16, y.data_ptr(), 1)
        assert torch.equal(y, layer.parts["codes"].float().T[:rows])
    assert kept


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bfloat16 layers that the kernels know."""
    folder = tmp_path_factory.mktemp("bf16")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=90, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=128, eos_token_id=None, bos_token_id=None,
        tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_is_the_torch_steps(kernels: ctypes.CDLL, checkpoint: Path, kind: str) -> None:
    """First logits of prompts in one step agree with transformers' code on the same quantised layers, head included."""
    del kernels
    prompts = [list(range(1, 30)), [7, 8, 9], [4]]
    logits = []
    for how in ("compiled", "torch"):
        core = EngineCore(EngineConfig(model=checkpoint, quantization=kind, quantize_head=True, kernels=how, threads=1))  # type: ignore[arg-type]
        assert core.runner.kernels == how
        for i, prompt in enumerate(prompts):
            core.add(f"{i}", prompt, SamplingParams(max_tokens=3))
        plan = core.scheduler.schedule(core.runtime, 0.0)
        logits.append(core.runner.forward(plan.parts).float())
    loose = 0.03  # activations are rounded to bfloat16 elsewhere
    assert (logits[0] - logits[1]).norm() < loose * logits[1].norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_alone_and_in_company(kernels: ctypes.CDLL, kind: QuantizationType) -> None:
    """Bit for bit, at every row count, so that drafts are verified with the very numbers of one token a step."""
    torch.manual_seed(5)
    layer = QuantizedLinear.from_linear(nn.Linear(160, 112, bias=False), QuantizationConfig(quantization_type=kind))
    weight, kept = pack(kernels, (layer,))
    x = torch.randn(130, 160).bfloat16()
    alone = torch.empty(130, 112)
    for row in range(130):
        kernels.fq_linear(x[row].data_ptr(), 1, 160, ctypes.addressof(weight), 112, alone[row].data_ptr(), 1)
    for rows in (*range(2, 14), 64, 97, 130):
        y = torch.empty(rows, 112)
        kernels.fq_linear(x.data_ptr(), rows, 160, ctypes.addressof(weight), 112, y.data_ptr(), 2)
        assert torch.equal(y, alone[:rows]), rows
    assert kept


@pytest.mark.parametrize("how", ["compiled", "torch"])
def test_weights_are_counted_to_the_byte(kernels: ctypes.CDLL, checkpoint: Path, how: str) -> None:
    """Codes, scales, 8 bits for the output layer and the embedding, norms and rotary tables: nothing else stays."""
    del kernels
    core = EngineCore(EngineConfig(model=checkpoint, quantization="int4", quantize_head=True, kernels=how, threads=1))  # type: ignore[arg-type]
    layers, vocab, hidden, inner, groups = 2, 90, 64, 80, 1
    rows = {"qkv": 128, "o": 64, "gate_up": 160, "down": 64}
    codes = sum(n * (inner if name == "down" else hidden) // 2 for name, n in rows.items())
    scales = 4 * groups * sum(rows.values())
    eight = vocab * (hidden + 4)
    kept = core.runner.weight_bytes
    if how == "compiled":
        padded = 96 * (hidden + 4)  # columns come in panels of 16
        tables = 2 * 128 * 32 * 4
        assert kept == layers * (codes + scales + 2 * hidden * 4) + eight + padded + hidden * 4 + tables
    else:
        rotary = sum(b.nbytes for b in core.runner.model.model.rotary_emb.buffers())
        assert kept - rotary == layers * (codes + scales + 2 * hidden * 2) + 2 * eight + hidden * 2
    assert core.runner.parameters == 2 * vocab * hidden + layers * (2 * codes + 2 * hidden) + hidden


def test_alone_and_in_company_the_same_tokens(kernels: ctypes.CDLL, checkpoint: Path) -> None:
    """int8_dynamic scales each row by itself: an answer does not depend on who else is in the step, bit for bit."""
    del kernels
    core = EngineCore(EngineConfig(model=checkpoint, quantization="int8_dynamic", threads=1))
    params = SamplingParams(max_tokens=6, temperature=0.0)
    prompts = [[i, i + 1, i + 2] for i in range(12)]
    together = core.generate(prompts, params)
    assert [core.generate([prompt], params)[0] for prompt in prompts] == together


def test_what_the_kernels_do_not_know_is_named(checkpoint: Path) -> None:
    """Zero points and layers of two formats that share an input run in torch, with the reason."""
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    quantize_model(model, QuantizationConfig(symmetric=False))
    with pytest.raises(KernelsUnavailable, match="zero points"):
        check_quantized(model)
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    quantize_model(model, QuantizationConfig(), skip=("lm_head", "k_proj"))
    with pytest.raises(KernelsUnavailable, match="one format"):
        check_quantized(model)
