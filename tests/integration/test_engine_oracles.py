"""Oracles on the whole engine that need a model: stale memory, company, and counts (O3, O10, O16)."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from flyball.core.clock import VirtualClock
from flyball.core.errors import ContextLengthExceeded, InvalidInput
from flyball.engine.config import EngineConfig
from flyball.engine.core import EngineCore
from flyball.engine.request import RequestOutput, SamplingParams

GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)


def prompts(count: int, seed: int) -> list[list[int]]:
    """Some with a common beginning."""
    rng = random.Random(seed)
    shared = [rng.randrange(1, 300) for _ in range(13)]
    return [
        (shared if i % 3 == 0 else []) + [rng.randrange(1, 300) for _ in range(rng.randint(1, 20))]
        for i in range(count)
    ]


def poisoned(core: EngineCore, poison: float) -> list[list[int]]:
    """Serve prompts while every block without content is filled with poison after each step."""
    pool, tensors = core.scheduler.kv.pool, core.runner.cache
    requests = []
    waiting = prompts(24, seed=1)
    while waiting or core.busy:
        while waiting and len(core.scheduler.waiting) < 4:
            requests.append(core.add(str(len(requests)), waiting.pop(0), GREEDY)[0])
        core.step()
        empty = [i for i in range(pool.num_blocks) if pool.ref_counts[i] == 0 and pool._hash_of[i] is None]
        for cache in (*tensors.keys, *tensors.values):
            blocks = cache.view(-1, tensors.block_size, *cache.shape[1:])
            blocks[torch.tensor(empty, dtype=torch.long)] = poison
    return [r.output_ids for r in requests]


def test_no_stale_memory_is_ever_read(tiny_checkpoint: Path) -> None:
    """Oracle O10: freed blocks full of huge numbers change no token, with prefix hits, evictions and preemptions.

    Huge instead of not-a-number, because gathered attention multiplies what it masks by zero.
    """
    settings: dict[str, Any] = {"block_size": 4, "max_num_seqs": 6, "max_num_batched_tokens": 32, "threads": 1}
    ample = EngineCore(EngineConfig(model=tiny_checkpoint, dtype="float32", **settings))
    wanted = ample.generate(prompts(24, seed=1), GREEDY)
    tight = EngineCore(
        EngineConfig(model=tiny_checkpoint, dtype="float32", num_blocks=24, max_model_len=96, **settings)
    )
    assert poisoned(tight, 1e4) == wanted
    assert min(tight.stats.preemptions, tight.stats.prompt_tokens_cached, tight.stats.evictions) > 0


@pytest.fixture(scope="module")
def compiled_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bfloat16 model that the compiled kernels run, where there are any."""
    path = tmp_path_factory.mktemp("compiled")
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=300, hidden_size=192, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
            intermediate_size=112, max_position_embeddings=128, head_dim=32, eos_token_id=None, bos_token_id=None,
            initializer_range=0.1,
        )
    )  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(path)
    try:
        EngineCore(EngineConfig(model=path, kernels="compiled", threads=1))
    except InvalidInput as reason:
        pytest.skip(str(reason))
    return path


def test_compiled_kernels_read_nothing_stale_at_all(compiled_checkpoint: Path) -> None:
    """Oracle O10 where attention walks the block table itself: freed blocks full of not-a-number change no token."""
    settings: dict[str, Any] = {"block_size": 4, "max_num_seqs": 6, "max_num_batched_tokens": 32, "threads": 1}
    ample = EngineCore(EngineConfig(model=compiled_checkpoint, **settings))
    wanted = ample.generate(prompts(24, seed=1), GREEDY)
    tight = EngineCore(EngineConfig(model=compiled_checkpoint, num_blocks=24, max_model_len=96, **settings))
    assert poisoned(tight, math.nan) == wanted
    assert min(tight.stats.preemptions, tight.stats.prompt_tokens_cached, tight.stats.evictions) > 0


def alone_and_together(model: Path, dtype: str) -> list[tuple[list[RequestOutput], list[RequestOutput]]]:
    """The outputs of each of some requests, alone and inside a random batch."""
    settings: dict[str, Any] = {"block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 24, "threads": 1}
    kinds = (
        replace(GREEDY, logprobs=2),
        SamplingParams(max_tokens=10, seed=3, top_p=0.9, logprobs=2, ignore_eos=True),
        SamplingParams(max_tokens=10, seed=4, presence_penalty=1.0, logprobs=0, ignore_eos=True),
    )
    asked = [(p, kinds[i % 3]) for i, p in enumerate(prompts(18, seed=5))]
    core = EngineCore(EngineConfig(model=model, dtype=dtype, **settings))  # type: ignore[arg-type]

    def serve(chosen: list[int]) -> dict[int, list[RequestOutput]]:
        core.flush_cache()
        for i in chosen:
            core.add(str(i), *asked[i])
        told: dict[int, list[RequestOutput]] = {i: [] for i in chosen}
        while core.busy:
            for output in core.step()[0]:
                told[int(output.request_id)].append(output)
        return told

    order = list(range(18))
    random.Random(8).shuffle(order)
    together = serve(order)
    return [(serve([i])[i], together[i]) for i in range(18)]


def test_company_changes_neither_tokens_nor_logprobs(tiny_checkpoint: Path) -> None:
    """Oracle O3: a request alone and one inside random batches give the same ids, and the same logprobs to rounding."""
    for alone, together in alone_and_together(tiny_checkpoint, "float32"):
        assert [o.new_token_ids for o in alone] == [o.new_token_ids for o in together]
        for a, b in zip(alone, together, strict=True):
            for x, y in zip(a.logprobs or (), b.logprobs or (), strict=True):
                assert x.logprob == pytest.approx(y.logprob, abs=1e-4)
                assert [t for t, _ in x.top] == [t for t, _ in y.top]


def test_compiled_kernels_do_not_depend_on_company_by_a_single_bit(compiled_checkpoint: Path) -> None:
    """Oracle O3, strictly: the compiled step computes each row by itself, so logprobs are equal bit for bit."""
    for alone, together in alone_and_together(compiled_checkpoint, "auto"):
        assert [(o.new_token_ids, o.logprobs) for o in alone] == [(o.new_token_ids, o.logprobs) for o in together]


def test_counts_are_those_of_the_script(tiny_checkpoint: Path) -> None:
    """Oracle O16: every counter of the engine equals what the script did, exactly."""
    clock = VirtualClock()
    core = EngineCore(
        EngineConfig(model=tiny_checkpoint, dtype="float32", block_size=4, max_num_seqs=4, threads=1), clock=clock
    )
    seen: Counter[str] = Counter()
    tokens = 0

    def run(until_idle: bool = True) -> None:
        nonlocal tokens
        while core.busy:
            outputs, _ = core.step()
            clock.advance(0.5)
            tokens += sum(len(o.new_token_ids) for o in outputs)
            seen.update(o.finish_reason.value for o in outputs if o.finish_reason)
            if not until_idle:
                return

    base = prompts(9, seed=6)
    for i, prompt in enumerate(base):
        core.add(f"a{i}", prompt, GREEDY)
    run()
    computed = sum(map(len, base)) - core.stats.prompt_tokens_cached
    assert core.stats.prompt_tokens_computed == computed
    for i, prompt in enumerate(base):  # again: all full blocks but the last token's are known
        core.add(f"b{i}", prompt, GREEDY)
    hits = core.stats.prompt_tokens_cached + sum((len(p) - 1) // 4 * 4 for p in base)
    run()
    assert core.stats.prompt_tokens_cached == hits
    core.add("expires", base[0], replace(GREEDY, max_tokens=100, timeout_s=2.0))
    run()
    core.add("leaves", base[0], replace(GREEDY, n=3))
    run(until_idle=False)
    core.abort("leaves")
    for bad in ([], [10**6]):
        with pytest.raises(InvalidInput):
            core.add("bad", bad, GREEDY)
    with pytest.raises(ContextLengthExceeded):
        core.add("long", base[0], replace(GREEDY, max_tokens=10**6))
    stats = core.stats
    assert stats.generation_tokens == tokens
    assert stats.finished == {**seen, "abort": 3}
    assert seen == {"length": 18, "timeout": 1}
    assert stats.refused == {"invalid": 2, "too_long": 1}
    assert (stats.preemptions, stats.preempted_tokens, stats.evictions, stats.out_of_memory) == (0, 0, 0, 0)
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
    assert stats.blocks_cached + stats.blocks_free == core.runner.num_blocks == stats.blocks_limit
