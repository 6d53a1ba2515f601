"""Drafts verified by several threads of the compiled step: a request's rows read what its earlier rows just wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flyball.engine.config import EngineConfig
from flyball.engine.core import EngineCore
from flyball.engine.cpu.build import KernelsUnavailable, load_kernels
from flyball.engine.request import SamplingParams

pytestmark = pytest.mark.slow  # together too long for the inner loop

TURNS = 12  # a race need not show in one
PROMPTS = [[1, 2, 3, 1, 2, 3, 1, 2], [7] * 19, list(range(20, 60))]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bfloat16 model that the kernels know, and the same shaken a little: a draft that is mostly right."""
    try:
        load_kernels()
    except KernelsUnavailable as reason:
        pytest.skip(str(reason))
    folder = tmp_path_factory.mktemp("threads")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=90, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=None, bos_token_id=None,
        tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "target")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.01 * torch.randn_like(parameter))
    model.save_pretrained(folder / "draft")
    return folder / "target", folder / "draft"


@pytest.mark.parametrize("quantization", [None, "int8_dynamic", "int4"])
@pytest.mark.parametrize("threads", [2, 4])
def test_threads_that_verify_drafts_say_what_one_token_a_step_says(
    models: tuple[Path, Path], threads: int, quantization: str | None
) -> None:
    """O2 on the compiled step: a request alone and three together, turn after turn, token for token as without."""
    before = torch.get_num_threads()
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    try:
        core = EngineCore(
            EngineConfig(model=models[0], draft_model=models[1], quantization=quantization, threads=threads,  # type: ignore[arg-type]
                         block_size=4, kernels="compiled"),
            seed=1,
        )  # fmt: skip
        core.update_runtime({"prefix_caching": False, "spec_max_batch": 0, "num_speculative_tokens": 4})
        for prompts in (PROMPTS[:1], PROMPTS):
            core.update_runtime({"spec_method": "off"})
            wanted = core.generate(prompts, params)
            for method in ("draft", "ngram"):
                core.update_runtime({"spec_method": method})
                for _ in range(TURNS):
                    assert core.generate(prompts, params) == wanted
        assert core.stats.spec_accepted_tokens > TURNS
    finally:
        torch.set_num_threads(before)
