"""Greedy output is what transformers' own `generate` gives, token for token, whatever the policy (oracles O1, O2, O3).

Four architectures with random weights in float32: plain (Llama), query-key norm (Qwen3), sliding window (Mistral),
soft-capped with both windows (Gemma2). Policy changes live between runs, so that the knobs are proved on the way.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config

from flyball.engine.config import EngineConfig
from flyball.engine.core import EngineCore
from flyball.engine.request import SamplingParams

VOCAB, OUTPUT = 96, 6
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 128, "head_dim": 8, "tie_word_embeddings": False,
    "eos_token_id": None, "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=5),
    "gemma2": Gemma2Config(
        **SHAPE, sliding_window=6, query_pre_attn_scalar=8, attn_logit_softcapping=4.0, final_logit_softcapping=8.0
    ),
}
GREEDY = SamplingParams(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True)


def prompts() -> list[list[int]]:
    """Seventeen prompts of 1 to 14 tokens: some share a prefix, some answers cross the end of a block of 16."""
    rng = random.Random(3)
    shared = [rng.randrange(VOCAB) for _ in range(9)]
    made = [[rng.randrange(VOCAB) for _ in range(n)] for n in (1, 2, 3, 5, 8, 11, 12, 13, 13, 14, 14, 14, 14)]
    return made + [shared + [rng.randrange(VOCAB) for _ in range(n)] for n in (1, 2, 5, 5)]


@cache
def checkpoint(name: str, folder: Path) -> tuple[Path, list[list[int]]]:
    """A random checkpoint on disk and what transformers' generate makes of the prompts."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    path = folder / name
    model.save_pretrained(path)
    wanted = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=OUTPUT,
                              pad_token_id=0)  # fmt: skip
        wanted.append(made[0, len(prompt) :].tolist())
    return path, wanted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the random checkpoints lie."""
    return tmp_path_factory.mktemp("models")


LEGAL = [(seqs, budget) for seqs in range(1, 17) for budget in range(seqs, 65)]
CASES = [(name, size, pool) for name in CONFIGS for size in (4, 16) for pool in ("ample", "tight")]


def check_parity(name: str, block_size: int, pool: str, policies: list[tuple[int, int]], folder: Path) -> None:
    """Serve all prompts under each (concurrency, budget) in turn, changed live, and compare every token."""
    path, wanted = checkpoint(name, folder)
    longest = max(len(p) for p in prompts()) + OUTPUT
    tight = -(-longest // block_size) + (2 if block_size == 4 else 1)
    core = EngineCore(
        EngineConfig(
            model=path, block_size=block_size, num_blocks=tight if pool == "tight" else None, max_num_seqs=16,
            max_num_batched_tokens=64, max_model_len=tight * block_size, threads=1,
        )
    )  # fmt: skip
    for seqs, budget in policies:
        core.update_runtime({"max_num_seqs": seqs, "max_num_batched_tokens": budget})
        if (seqs + budget) % 3:  # else the next run meets this one's prefixes
            core.scheduler.kv.pool.flush()
        assert core.generate(prompts(), GREEDY) == wanted, f"budget {budget}, concurrency {seqs}"
        core.scheduler.kv.pool.check_integrity([])
        assert core.stats.blocks_used == 0
    if block_size == 4:  # no prompt fills a block of 16
        assert core.stats.prompt_tokens_cached > 0
    assert (core.stats.preemptions > 0) == (pool == "tight")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "block_size", "pool"), CASES)
def test_greedy_equals_generate_whatever_the_policy(name: str, block_size: int, pool: str, folder: Path) -> None:
    """Sixty of the legal policies, another sixty for each case, give the tokens of `generate`."""
    sampled = random.Random(f"{name} {block_size} {pool}").sample(LEGAL, 60)
    check_parity(name, block_size, pool, sampled, folder)


@pytest.mark.sweep
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "block_size", "pool"), CASES)
def test_greedy_equals_generate_under_every_policy(name: str, block_size: int, pool: str, folder: Path) -> None:
    """Every legal pair of budget 1..64 and concurrency 1..16 gives the tokens of `generate`; a tight pool preempts."""
    check_parity(name, block_size, pool, LEGAL, folder)


def test_logits_equal_the_stock_model_within_rounding(folder: Path) -> None:
    """Teacher-forced logits through paged chunks differ from the stock model's by at most 1e-4."""
    for name in CONFIGS:
        path, _ = checkpoint(name, folder)
        stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
        prompt = [i * 7 % VOCAB for i in range(23)]
        with torch.no_grad():
            wanted = stock(torch.tensor([prompt])).logits[0, -1]
        core = EngineCore(EngineConfig(model=path, block_size=4, max_num_seqs=1, max_num_batched_tokens=6, threads=1))
        core.add("a", prompt, SamplingParams(max_tokens=1, temperature=0.0))
        while core.busy:
            plan = core.scheduler.schedule(core.runtime, 0.0)
            logits = core.runner.forward(plan.parts)
            if plan.parts[0].samples:
                assert (logits[0] - wanted).abs().max() <= 1e-4, name
                break
            core.scheduler.update(plan, [], core.runtime)


def test_a_seeded_request_does_not_depend_on_its_batch(folder: Path) -> None:
    """Sampling is keyed by seed and position: the same tokens alone, batched, and across preemptions."""
    path, _ = checkpoint("llama", folder)
    params = SamplingParams(max_tokens=12, temperature=1.0, top_k=40, top_p=0.9, seed=11, ignore_eos=True)
    alone = EngineCore(EngineConfig(model=path, threads=1)).generate([prompts()[0]], params)[0]
    core = EngineCore(
        EngineConfig(model=path, block_size=4, num_blocks=9, max_model_len=36, max_num_seqs=8,
                     max_num_batched_tokens=16, threads=1)
    )  # fmt: skip
    together = core.generate(prompts(), params)
    assert together[0] == alone
    assert core.stats.preemptions > 0
