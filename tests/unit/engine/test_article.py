"""The article's classes, with its parameters and none of its bugs: design notes, section 1, items 1 to 24, a test each.

Each test fails on what the article's code does, which its sentence names.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flyball.core.clock import VirtualClock
from flyball.core.errors import ContextLengthExceeded, EngineFailed, InvalidInput, QueueFull
from flyball.engine.batching import ContinuousBatcher, DynamicBatcher, InferenceRequest, InferenceResult
from flyball.engine.cache_facades import CacheFull, KVCacheManager, PagedKVCache
from flyball.engine.config import EngineConfig
from flyball.engine.core import EngineCore
from flyball.engine.request import FinishReason, SamplingParams
from flyball.engine.text import TextCodec

Make = Callable[..., EngineCore]
PROMPT = "The cat sat on"


def ask(prompt: str = PROMPT, max_tokens: int = 4, **more: Any) -> InferenceRequest:
    """A greedy request that goes on to its limit."""
    return InferenceRequest(prompt=prompt, max_tokens=max_tokens, **{"temperature": 0.0, "ignore_eos": True} | more)


@pytest.fixture
def config(checkpoint: Path) -> EngineConfig:
    """One thread."""
    return EngineConfig(model=checkpoint, threads=1, block_size=4)


@pytest.fixture
def dynamic(checkpoint: Path, config: EngineConfig) -> Callable[..., DynamicBatcher]:
    """Make a dynamic batcher."""
    return lambda **settings: DynamicBatcher(checkpoint, config=config, **settings)


@pytest.fixture
def continuous(checkpoint: Path, config: EngineConfig) -> Callable[..., ContinuousBatcher]:
    """Make a continuous batcher."""
    return lambda **settings: ContinuousBatcher(checkpoint, config=config, **settings)


def submit_all(batcher: DynamicBatcher, requests: list[InferenceRequest]) -> list[InferenceResult | BaseException]:
    """All at once."""

    async def main() -> list[InferenceResult | BaseException]:
        async with batcher:
            return await asyncio.gather(*map(batcher.submit, requests), return_exceptions=True)

    return asyncio.run(main())


# --- DynamicBatcher -------------------------------------------------------------------------------------------------


def test_01_a_full_batch_does_not_wait(engine: Make) -> None:
    """The article sleeps max_wait_ms after the first request even when the batch is full; time stands still here."""
    params = SamplingParams(max_tokens=1, temperature=0.0)
    for capacity in (1, 3):
        core = engine(VirtualClock(), max_num_seqs=capacity)
        core.update_runtime({"max_wait_ms": 50.0})
        for i in range(capacity):
            core.add(str(i), [5, 6, 7], params)
        outputs, wake_s = core.step()
        assert (len(outputs), wake_s) == (capacity, None)
        core.add("one", [5, 6, 7], params)
        if capacity > 1:
            assert core.step() == ([], 0.05)
        core.abort("one")


def test_02_what_is_left_over_is_answered_without_a_next_arrival(dynamic: Callable[..., DynamicBatcher]) -> None:
    """The article answers two of five requests with max_batch_size=2; the rest hang."""
    results = submit_all(dynamic(max_batch_size=2, max_wait_ms=5), [ask() for _ in range(5)])
    assert [r.tokens_generated for r in results if isinstance(r, InferenceResult)] == [4] * 5


def test_03_a_prompt_beyond_the_tokens_of_a_batch_is_answered_and_blocks_nobody(
    dynamic: Callable[..., DynamicBatcher],
) -> None:
    """The article hangs on it and on all behind it; here it is computed in parts."""
    results = submit_all(dynamic(max_batch_size=4, max_tokens_per_batch=8), [ask(PROMPT * 6), ask(), ask()])
    assert isinstance(results[0], InferenceResult)
    assert results[0].prompt_tokens > 8
    assert all(isinstance(r, InferenceResult) and r.tokens_generated == 4 for r in results)


def test_04_a_failing_model_fails_every_request_and_says_so(
    dynamic: Callable[..., DynamicBatcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The article's loop dies and all futures hang."""
    batcher = dynamic()

    def broken(parts: object) -> torch.Tensor:
        raise ArithmeticError("a cosmic ray")

    batcher.engine._core.runner.forward = broken  # type: ignore[assignment]
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # the thread's own report; what callers see is tested
    results = submit_all(batcher, [ask() for _ in range(3)])
    assert [type(r) for r in results] == [EngineFailed] * 3
    assert "cosmic ray" in str(results[0])
    assert not batcher.engine.alive
    assert "cosmic ray" in (batcher.engine.error or "")


def test_05_tokens_are_counted_by_the_tokenizer(continuous: Callable[..., ContinuousBatcher]) -> None:
    """The article counts words."""
    batcher = continuous()
    prompt = "naïve😀naïve😀{}{}"
    rid = batcher.add_request(ask(prompt, max_tokens=7))
    result = batcher.run()[rid]
    assert result.prompt_tokens == len(TextCodec(batcher.core.tokenizer).encode(prompt)) > len(prompt.split())
    assert result.tokens_generated == 7


def test_06_each_request_keeps_its_own_limit_and_temperature(continuous: Callable[..., ContinuousBatcher]) -> None:
    """The article serves all with the largest max_tokens and drops the temperature."""
    requests = [
        ask(max_tokens=3),
        ask(max_tokens=9, temperature=1.5, seed=4),
        ask(max_tokens=5, temperature=0.7, seed=4),
    ]
    together = continuous()
    ids = [together.add_request(r) for r in requests]
    results = together.run()
    assert [results[i].tokens_generated for i in ids] == [3, 9, 5]
    for rid, request in zip(ids, requests, strict=True):
        alone = continuous()
        own = alone.add_request(request)
        assert alone.run()[own].text == results[rid].text


def test_07_latency_is_each_requests_own_and_holds_the_wait(checkpoint: Path, config: EngineConfig) -> None:
    """The article reports one number for all, without the time in the queue, by a clock that can jump."""
    batcher = ContinuousBatcher(checkpoint, max_batch_size=1, config=config)
    clock = VirtualClock()
    batcher.core.clock = clock
    ids = [batcher.add_request(ask(max_tokens=2)) for _ in range(2)]
    results = {}
    while batcher.busy:
        clock.advance(1.0)  # a step takes a second
        results.update({r.request_id: r for r in batcher.step()})
    assert [(results[i].ttft_ms, results[i].latency_ms) for i in ids] == [(1000.0, 2000.0), (3000.0, 4000.0)]


def test_08_requests_join_leave_expire_and_are_refused(dynamic: Callable[..., DynamicBatcher]) -> None:
    """The article's batches are static, cannot be cancelled, have no timeout and no bound, and merge equal ids."""
    batcher = dynamic(max_batch_size=2, max_wait_ms=0)

    async def main() -> None:
        async with batcher:
            long = asyncio.create_task(batcher.submit(ask(max_tokens=200, request_id="long")))
            while batcher.engine.stats().generation_tokens < 2:
                await asyncio.sleep(0.001)
            short = await batcher.submit(ask(max_tokens=2))
            assert short.tokens_generated == 2
            assert not long.done(), "the short one joined and left while the long one ran"
            with pytest.raises(InvalidInput, match="in use"):
                await batcher.submit(ask(request_id="long"))
            late = await batcher.submit(ask(max_tokens=200, timeout_s=1e-6))
            assert late.finish_reason == "timeout"
            long.cancel()
            with pytest.raises(asyncio.CancelledError):
                await long
            while batcher.engine.stats().blocks_used:
                await asyncio.sleep(0.001)
            await batcher.engine.update_runtime({"max_queue_len": 1})
            crowd = await asyncio.gather(
                *(batcher.submit(ask(max_tokens=50)) for _ in range(40)), return_exceptions=True
            )
            assert {type(r) for r in crowd} == {InferenceResult, QueueFull}

    asyncio.run(main())


def test_09_start_may_be_repeated_and_stop_leaves_nobody_waiting(dynamic: Callable[..., DynamicBatcher]) -> None:
    """The article's second start runs a second loop; its stop abandons what is queued."""

    async def main(drain_s: float) -> list[InferenceResult | BaseException]:
        batcher = dynamic(max_batch_size=2)
        await batcher.start()
        await batcher.start()
        tasks = [asyncio.create_task(batcher.submit(ask(max_tokens=40))) for _ in range(5)]
        while batcher.engine.stats().generation_tokens == 0:
            await asyncio.sleep(0.001)
        await batcher.stop(drain_s)
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert {type(r) for r in asyncio.run(main(60.0))} == {InferenceResult}
    assert EngineFailed in {type(r) for r in asyncio.run(main(0.0))}


# --- ContinuousBatcher ----------------------------------------------------------------------------------------------


def test_10_max_tokens_is_enforced(continuous: Callable[..., ContinuousBatcher]) -> None:
    """The article generates for ever unless an end of sequence comes."""
    batcher = continuous()
    rid = batcher.add_request(ask(max_tokens=5))
    result = batcher.run()[rid]
    assert (result.tokens_generated, result.finish_reason) == (5, "length")


def test_11_the_end_is_known_by_its_id_and_is_no_content(engine: Make) -> None:
    """The article stops at any token without text, such as half a character, and emits the end as text."""
    core = engine()
    codec = TextCodec(core.tokenizer)
    half = next(i for i in range(1, 400) if codec.decode([i]) == "\ufffd")
    core.add("half", [5], SamplingParams(max_tokens=6, temperature=0.0, allowed_token_ids=(half,)))
    core.add("end", [5], SamplingParams(max_tokens=6, temperature=0.0, allowed_token_ids=(0,)))
    ended = {}
    while core.busy:
        ended.update({o.request_id: o for o in core.step()[0] if o.finish_reason})
    assert ended["half"].finish_reason is FinishReason.LENGTH
    assert ended["end"].finish_reason is FinishReason.STOP
    assert codec.decode(ended["end"].new_token_ids) == ""


def test_12_a_prompt_is_computed_once_and_tokens_are_never_read_back_from_text(engine: Make) -> None:
    """The article re-sends prompt and answer as text at every step: quadratic work, other tokens."""
    core = engine()
    prompt = list(range(1, 31))
    core.add("r", prompt, SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))
    computed = []
    forward = core.runner.forward

    def watched(parts: Any) -> torch.Tensor:
        computed.append(sum(part.count for part in parts))
        return forward(parts)

    core.runner.forward = watched  # type: ignore[method-assign]
    request = core.requests["r"][0]
    while core.busy:
        core.step()
    assert computed == [30] + [1] * 19
    assert request.tokens(0, 30) == prompt
    assert len(request.output_ids) == 20


def test_13_length_stop_texts_reason_and_text_are_kept(continuous: Callable[..., ContinuousBatcher]) -> None:
    """The article checks no length, knows no stop text, and after the end nothing holds the result."""
    batcher = continuous(max_sequence_length=40)
    with pytest.raises(ContextLengthExceeded, match="40"):
        batcher.add_request(ask(max_tokens=40))
    whole = batcher.add_request(ask(max_tokens=20))
    text = batcher.run()[whole].text
    stop = text[8:10]
    rid = batcher.add_request(ask(max_tokens=20, stop=(stop,)))
    result = batcher.run()[rid]
    assert (result.text, result.finish_reason) == (text[: text.index(stop)], "stop")
    assert batcher.core.stats.blocks_used == 0


def test_14_every_free_place_is_taken_at_the_next_step(continuous: Callable[..., ContinuousBatcher]) -> None:
    """The article admits one request for one completion, and none after any other removal."""
    batcher = continuous(max_batch_size=3)
    ids = [batcher.add_request(ask(max_tokens=30)) for _ in range(9)]
    batcher.step()
    for rid in ids[:3]:
        batcher.abort(rid)
    batcher.step()
    assert batcher.core.stats.running == 3
    assert set(batcher.run()) == set(ids[3:])


def test_15_prompts_come_in_parts_while_others_decode_and_a_bad_request_disturbs_none(
    checkpoint: Path, config: EngineConfig
) -> None:
    """The article knows neither prefill nor budget, and has no way for an error to go."""
    batcher = ContinuousBatcher(checkpoint, max_batch_size=4, config=config)
    batcher.core.update_runtime({"max_num_batched_tokens": 8})
    short = batcher.add_request(ask(max_tokens=30))
    batcher.step()
    long = batcher.add_request(ask(PROMPT * 5, max_tokens=2))
    for request in (ask(""), ask(max_tokens=10**6)):
        with pytest.raises((InvalidInput, ContextLengthExceeded)):
            batcher.add_request(request)
    made = []
    while len(batcher.core.requests[long][0].output_ids) == 0:
        batcher.step()
        made.append(len(batcher.core.requests[short][0].output_ids))
    assert made == list(range(made[0], made[0] + len(made))), "a token at every step"
    assert len(made) >= 3
    assert set(batcher.run()) == {short, long}


# --- KVCacheManager -------------------------------------------------------------------------------------------------


def manager(blocks: int = 8) -> KVCacheManager:
    """Two layers, blocks of 4 tokens of 2 heads of 3 numbers."""
    block_bytes = 2 * 2 * 4 * 2 * 3 * 4
    return KVCacheManager(blocks * block_bytes / 2**30, num_layers=2, num_kv_heads=2, head_dim=3, block_size=4)


def layers(tokens: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random keys and values of two layers."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(tokens, 2, 3, generator=generator), torch.randn(tokens, 2, 3, generator=generator))
        for _ in range(2)
    ]


def same(got: list[tuple[torch.Tensor, torch.Tensor]] | None, wanted: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    """Whether both hold the same numbers."""
    return got is not None and all(
        torch.equal(a, b) for x, y in zip(got, wanted, strict=True) for a, b in zip(x, y, strict=True)
    )


def joined(
    first: list[tuple[torch.Tensor, torch.Tensor]], second: list[tuple[torch.Tensor, torch.Tensor]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One after the other."""
    return [(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in zip(first, second, strict=True)]


def test_16_storing_again_replaces_and_is_counted_once() -> None:
    """The article adds the size again: its budget leaks away."""
    cache = manager()
    for seed in range(50):
        cache.set_cache("a", layers(5, seed))
    stats = cache.stats()
    assert (stats.entries, stats.size_bytes, stats.evictions) == (1, stats.max_bytes // 4, 0)
    assert same(cache.get_cache("a"), layers(5, 49))


def test_17_growth_is_counted_and_nothing_ever_gets_negative() -> None:
    """The article does not count what is appended, then subtracts it."""
    cache = manager()
    cache.set_cache("a", layers(3))
    sizes = []
    for _ in range(6):
        cache.extend_cache("a", layers(4))
        sizes.append(cache.stats().size_bytes)
    assert sizes == sorted(set(sizes))
    with pytest.raises(CacheFull):
        cache.extend_cache("a", layers(40))
    cache.delete_cache("a")
    cache.delete_cache("a")
    assert cache.stats().size_bytes == 0


def test_18_what_exceeds_the_budget_is_refused_and_costs_nobody() -> None:
    """The article evicts everyone and stores it anyway."""
    cache = manager()
    cache.set_cache("a", layers(8))
    with pytest.raises(CacheFull, match="raise max_cache_size_gb"):
        cache.set_cache("b", layers(40))
    with pytest.raises(CacheFull):
        cache.set_cache("a", layers(40))
    assert same(cache.get_cache("a"), layers(8))
    assert cache.stats().evictions == 0


def test_19_what_is_in_use_is_not_evicted_and_what_is_gone_says_so() -> None:
    """The article evicts caches of running requests, and then extends nothing in silence."""
    cache = manager()
    cache.set_cache("used", layers(12, 1))
    cache.set_cache("idle", layers(12, 2))
    with cache.using("used"):
        cache.set_cache("new", layers(12, 3))
        assert cache.get_cache("idle") is None
        assert same(cache.get_cache("used"), layers(12, 1))
        with pytest.raises(CacheFull), cache.using("new"):
            cache.set_cache("more", layers(12, 4))
    with pytest.raises(InvalidInput, match="idle"):
        cache.extend_cache("idle", layers(1))


def test_20_growing_copies_nothing_the_least_recently_used_goes_and_hits_are_counted() -> None:
    """The article copies the whole cache for each token, orders by a clock that can jump, and counts nothing."""
    cache = manager()
    wanted = layers(3, 5)
    cache.set_cache("a", wanted)
    places = [t.data_ptr() for t in (*cache._pages._tensors.keys, *cache._pages._tensors.values)]
    for seed in range(9):
        cache.extend_cache("a", layers(1, seed))
        wanted = joined(wanted, layers(1, seed))
    assert [t.data_ptr() for t in (*cache._pages._tensors.keys, *cache._pages._tensors.values)] == places
    assert same(cache.get_cache("a"), wanted)
    cache.set_cache("b", layers(12))
    cache.get_cache("a")
    cache.set_cache("c", layers(12))  # b is the least recently used
    assert cache.get_cache("b") is None
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.evictions) == (2, 1, 1)
    cache.delete_cache("c")
    cache.fork("a", "twin")  # across requests: the memory is shared until one grows
    assert cache.stats().size_bytes == stats.max_bytes * 3 // 8
    cache.extend_cache("twin", layers(2, 7))
    assert same(cache.get_cache("a"), wanted)
    assert same(cache.get_cache("twin"), joined(wanted, layers(2, 7)))


# --- PagedKVCache ---------------------------------------------------------------------------------------------------


def paged(num_blocks: int = 6) -> PagedKVCache:
    """One layer, blocks of 4 tokens, 2 key-value heads of 3 numbers."""
    return PagedKVCache(4, num_blocks, num_layers=1, num_kv_heads=2, head_dim=3)


def rows(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random keys and values."""
    return layers(tokens, seed)[0]


def test_21_allocating_again_keeps_blocks_and_contents() -> None:
    """The article forgets the old blocks: they leak, and the sequence's KV is lost."""
    cache = paged()
    cache.allocate_blocks("a", 5)
    keys, values = rows(5)
    cache.write_kv("a", 0, 0, keys, values)
    cache.allocate_blocks("a", 5)
    cache.allocate_blocks("a", 9)
    assert cache.num_free_blocks == 3
    assert torch.equal(cache.read_kv("a", 0)[0], keys)
    cache.free("a")
    assert cache.num_free_blocks == 6
    cache.check_integrity()


def test_22_writing_beyond_makes_room_or_refuses_whole() -> None:
    """The article runs into an IndexError, takes one block however many are needed, and invents sequences."""
    cache = paged()
    with pytest.raises(InvalidInput, match="no sequence"):
        cache.write_kv("unknown", 0, 0, *rows(1))
    cache.allocate_blocks("a", 1)
    cache.write_kv("a", 0, 0, *rows(20))
    assert cache.num_free_blocks == 1
    with pytest.raises(CacheFull, match="2 KV blocks are needed and 1 are free"):
        cache.write_kv("a", 0, 20, *rows(8))
    assert cache.num_free_blocks == 1
    with pytest.raises(InvalidInput, match="leaves a gap"):
        cache.write_kv("a", 0, 22, *rows(1))
    cache.check_integrity()


def test_23_reading_gives_every_token_in_order_and_nothing_for_none() -> None:
    """The article drops positions without a word, and fails on an empty sequence."""
    cache = paged()
    cache.allocate_blocks("a", 2)
    assert cache.read_kv("a", 0)[0].shape == (0, 2, 3)
    keys, values = rows(11)
    for start, stop in ((0, 1), (1, 6), (6, 11), (3, 9)):  # the last ones written twice
        cache.write_kv("a", 0, start, keys[start:stop], values[start:stop])
    got = cache.read_kv("a", 0)
    assert torch.equal(got[0], keys)
    assert torch.equal(got[1], values)


def test_24_heads_types_lengths_and_sharing_are_right() -> None:
    """The article stores a row for every query head in float16 on CUDA only, shares nothing, and reads what was never
    written."""
    cache = PagedKVCache(4, 6, num_layers=2, num_kv_heads=2, head_dim=3, dtype=torch.bfloat16)
    assert cache.block_bytes == 2 * 2 * 4 * 2 * 3 * 2
    cache.allocate_blocks("a", 6)
    assert cache.length("a") == 0, "room is not content"
    for layer in range(2):
        cache.write_kv("a", layer, 0, *rows(6, layer))
    cache.fork("a", "b")
    assert cache.num_free_blocks == 4, "a fork shares"
    for layer in range(2):
        cache.write_kv("b", layer, 6, *rows(1, 9))
    assert cache.num_free_blocks == 3, "one block was copied, the full one is still shared"
    assert cache.length("a") == 6
    assert torch.equal(cache.read_kv("a", 1)[0], rows(6, 1)[0].bfloat16())
    assert torch.equal(cache.read_kv("b", 1)[0], torch.cat([rows(6, 1)[0], rows(1, 9)[0]]).bfloat16())
    cache.free("a")
    assert torch.equal(cache.read_kv("b", 0)[1], torch.cat([rows(6, 0)[1], rows(1, 9)[1]]).bfloat16())
    cache.check_integrity()
