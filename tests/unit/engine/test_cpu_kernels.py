"""The compiled step equals the stock model's, within bfloat16's rounding, and is refused by name where it would not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from flyball.core import native
from flyball.core.errors import InvalidInput
from flyball.engine.config import EngineConfig
from flyball.engine.core import EngineCore
from flyball.engine.cpu import build
from flyball.engine.request import SamplingParams

SHAPE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
    "intermediate_size": 112, "max_position_embeddings": 128, "head_dim": 32, "tie_word_embeddings": False,
    "eos_token_id": None, "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
CONFIGS = {
    "llama with biases": LlamaConfig(**SHAPE, attention_bias=True),
    "llama, one head group of 6": LlamaConfig(**{**SHAPE, "num_key_value_heads": 1}),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=7),
}


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    """These tests need a compiler and AVX512-BF16."""
    try:
        build.load_kernels()
    except build.KernelsUnavailable as reason:
        pytest.skip(f"the compiled kernels cannot be used here: {reason}")


def saved(config: PretrainedConfig, path: Path) -> Path:
    """A random bfloat16 checkpoint with norms and biases that matter."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_compiled_step_is_as_near_to_float32_as_transformers_own_bfloat16(name: str, tmp_path: Path) -> None:
    """Prefill chunks and decodes mixed: errors against float32 are no larger than twice the stock bfloat16 model's."""
    path = saved(CONFIGS[name], tmp_path / "model")
    exact, stock = (AutoModelForCausalLM.from_pretrained(path, dtype=d).eval() for d in (torch.float32, torch.bfloat16))
    core = EngineCore(EngineConfig(model=path, block_size=4, max_num_seqs=8, max_num_batched_tokens=13, threads=1))
    assert core.runner.kernels == "compiled"
    prompts = [[(i * 37 + n) % 300 for i in range(n)] for n in (1, 5, 17, 30, 64)]
    for i, prompt in enumerate(prompts):
        core.add(str(i), prompt, SamplingParams(max_tokens=3, temperature=0.0))
    errors = []
    while core.busy:
        plan = core.scheduler.schedule(core.runtime, 0.0)
        logits = core.runner.forward(plan.parts)
        sampling = [part.request for part in plan.parts if part.samples]
        for request, row in zip(sampling, logits, strict=True):
            ids = torch.tensor([request.tokens(0, request.num_known)])
            with torch.no_grad():
                wanted, theirs = exact(ids).logits[0, -1], stock(ids).logits[0, -1].float()
            errors.append((float((row - wanted).abs().max()), float((theirs - wanted).abs().max())))
        for request, _ in core.scheduler.update(plan, [3] * len(sampling), core.runtime):
            if request.finish_reason is not None:
                del core.requests[request.id]
    ours, theirs = (max(column) for column in zip(*errors, strict=True))
    assert ours <= 2 * theirs, f"{ours} against {theirs}"


@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 2, 16), (1, 64, 33), (5, 30, 100), (6, 64, 64), (97, 48, 17), (130, 96, 80)]
)
def test_a_packed_linear_equals_a_plain_one(m: int, k: int, n: int) -> None:
    """Any row count and any number of columns, also where the last panel is not full."""
    library = build.load_kernels()
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, k, generator=generator).bfloat16()
    w = torch.randn(n, k, generator=generator).bfloat16()
    packed = torch.empty(library.fb_packed_elements(n, k), dtype=torch.bfloat16)
    library.fb_pack(w.data_ptr(), n, k, 0, packed.data_ptr(), 2)
    y = torch.full((m, n), float("nan"))
    library.fb_linear(x.data_ptr(), m, k, packed.data_ptr(), n, y.data_ptr(), 2)
    torch.testing.assert_close(y, x.float() @ w.float().T, atol=1e-3, rtol=1e-3)


def test_threads_more_than_cores_and_callers_at_once_change_no_bit() -> None:
    """Who computes a chunk does not matter: callers of several threads, with helpers that come late, get equal bits."""
    library = build.load_kernels()
    generator = torch.Generator().manual_seed(1)
    m, k, n = 7, 64, 640
    x = torch.randn(m, k, generator=generator).bfloat16()
    packed = torch.empty(library.fb_packed_elements(n, k), dtype=torch.bfloat16)
    w = torch.randn(n, k, generator=generator).bfloat16()
    library.fb_pack(w.data_ptr(), n, k, 0, packed.data_ptr(), 1)
    alone = torch.empty((m, n))
    library.fb_linear(x.data_ptr(), m, k, packed.data_ptr(), n, alone.data_ptr(), 1)

    def differing(threads: int) -> int:
        count = 0
        for _ in range(300):
            y = torch.full((m, n), float("nan"))
            library.fb_linear(x.data_ptr(), m, k, packed.data_ptr(), n, y.data_ptr(), threads)
            count += not torch.equal(y, alone)
        return count

    with ThreadPoolExecutor(3) as callers:
        assert list(callers.map(differing, (2, 5, 8))) == [0, 0, 0]
    library.fb_drain()


def test_a_model_that_the_kernels_do_not_know_runs_in_torch_and_says_why(tmp_path: Path) -> None:
    """No silent fallback: the reason is told, and asking for the kernels outright is refused in one sentence."""
    config = Gemma2Config(**{**SHAPE, "query_pre_attn_scalar": 32})
    path = saved(config, tmp_path / "gemma2")
    core = EngineCore(EngineConfig(model=path, threads=1))
    assert core.runner.kernels == "torch (the kernels know llama, mistral, qwen2, qwen3 models, not gemma2)"
    assert core.generate([[1, 2, 3]], SamplingParams(max_tokens=2, temperature=0.0))
    with pytest.raises(InvalidInput, match="kernels=compiled cannot be used"):
        EngineCore(EngineConfig(model=path, kernels="compiled", threads=1))


def test_a_machine_without_a_compiler_falls_back_with_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The pure-torch path serves wherever no compiler is found."""
    build.load_kernels.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    try:
        with pytest.raises(build.KernelsUnavailable, match=r"no C\+\+ compiler was found"):
            build.load_kernels()
    finally:
        build.load_kernels.cache_clear()


def test_a_failed_build_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A source that does not compile is named with the compiler's first error; no half a library is kept."""
    broken = tmp_path / "broken.cpp"
    broken.write_text("int main( {")
    monkeypatch.setattr(build, "SOURCE", broken)
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path / "cache")
    build.load_kernels.cache_clear()
    try:
        with pytest.raises(build.KernelsUnavailable, match=r"could not build broken.cpp: .*error"):
            build.load_kernels()
    finally:
        build.load_kernels.cache_clear()
    assert list((tmp_path / "cache").iterdir()) == []
