"""The engine under a storm and over time: nothing lost, hung or leaked, and no token changed (O2, O3, O9, O17).

Requests of every kind come and go while all live knobs change at random, over a pool that makes them preempt. What each
request must say is known beforehand: greedy answers from transformers' own `generate`, the others from an engine that
serves one request at a time.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoModelForCausalLM

from flyball.core.errors import QueueFull
from flyball.engine.async_engine import AsyncEngine
from flyball.engine.block_pool import Eviction
from flyball.engine.config import EngineConfig, Policy, Victim
from flyball.engine.core import EngineCore
from flyball.engine.request import FinishReason, Request, SamplingParams

LONGEST_PROMPT, LONGEST_ANSWER, BLOCK = 40, 20, 4
BLOCKS = 30  # two of the longest requests and a half
GREEDY = SamplingParams(max_tokens=LONGEST_ANSWER, temperature=0.0)
KINDS = (
    GREEDY,
    GREEDY,
    replace(GREEDY, optimization="basic"),
    replace(GREEDY, optimization="none"),
    replace(GREEDY, priority=-1, logprobs=1),
    replace(GREEDY, repetition_penalty=1.4, frequency_penalty=0.5),
    replace(GREEDY, temperature=1.0, top_p=0.9, seed=5),
    replace(GREEDY, temperature=0.8, top_k=20, seed=6, n=3),
)


def prompts() -> list[list[int]]:
    """Forty, of which half share one of three beginnings."""
    rng = random.Random(2)
    shared = [[rng.randrange(1, 300) for _ in range(n)] for n in (9, 16, 25)]
    made = [[rng.randrange(1, 300) for _ in range(rng.randint(1, LONGEST_PROMPT))] for _ in range(20)]
    return made + [rng.choice(shared) + [rng.randrange(1, 300) for _ in range(rng.randint(1, 15))] for _ in range(20)]


@pytest.fixture(scope="module")
def answers(tiny_checkpoint: Path) -> dict[tuple[int, int, int], list[int]]:
    """What each answer (prompt, kind, index) must be, at full length."""
    stock = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32, attn_implementation="eager")
    alone = EngineCore(config(tiny_checkpoint))
    told = {}
    for p, prompt in enumerate(prompts()):
        ids = torch.tensor([prompt])
        made = stock.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LONGEST_ANSWER, pad_token_id=0
        )
        for k, params in enumerate(KINDS):
            if params.temperature == 0 and not params.penalized:
                told[p, k, 0] = made[0, len(prompt) :].tolist()
                continue
            for i in range(params.n):
                seed = params.seed + i if params.seed is not None else None
                told[p, k, i] = alone.generate([prompt], replace(params, n=1, seed=seed))[0]
    return told


def config(path: Path, **more: Any) -> EngineConfig:
    """Small blocks, float32, one thread."""
    defaults: dict[str, Any] = {"block_size": BLOCK, "max_num_seqs": 16, "max_num_batched_tokens": 128, "threads": 1}
    return EngineConfig(model=path, dtype="float32", **defaults | more)


def random_change(rng: random.Random) -> dict[str, object]:
    """One knob, or two, to anything legal that lets the longest request be accepted."""
    choices: dict[str, Iterator[object] | tuple[object, ...]] = {
        "max_num_seqs": (1, 2, 5, 16),
        "max_num_batched_tokens": (16, 17, 40, 128),
        "max_wait_ms": (0.0, 0.0, 5.0),
        "max_batch_size": (0, 3),
        "long_prefill_token_threshold": (0, 3, 16),
        "prefill_interval": (0, 2, 4),
        "prefix_caching": (True, True, False),
        "eviction": get_args(Eviction),
        "kv_cache_limit_blocks": (0, 15, 20),
        "watermark": (0.0, 0.01, 0.3),
        "policy": get_args(Policy),
        "preemption_victim": get_args(Victim),
        "max_queue_len": (0, 4, 50),
        "max_queue_tokens": (0, 500),
        "request_timeout_s": (0.0, 60.0),
        "stream_interval": (1, 1, 4),
    }
    return {name: rng.choice(list(choices[name])) for name in rng.sample(sorted(choices), rng.randint(1, 2))}


class Storm:
    """Clients of one engine, and what became of their requests."""

    def __init__(self, engine: AsyncEngine, answers: dict[tuple[int, int, int], list[int]], seed: int) -> None:
        self.engine = engine
        self.answers = answers
        self.rng = random.Random(seed)
        self.prompts = prompts()
        self.ended: Counter[str] = Counter()  # answers by how they ended
        self.tokens = 0
        self.versions: list[int] = []

    async def client(self, index: int) -> None:
        """One request: come at some time, perhaps leave early or set a deadline, and check every token."""
        rng = random.Random(f"{index} {self.rng.random()}")
        p, k = rng.randrange(len(self.prompts)), rng.randrange(len(KINDS))
        limit = rng.randint(1, LONGEST_ANSWER)
        deadline = rng.choice([None] * 8 + [0.001, 0.3])
        leave_after = rng.choice([None] * 5 + [0, 1, 3])  # outputs
        params = replace(KINDS[k], max_tokens=limit, timeout_s=deadline)
        made: dict[int, list[int]] = {i: [] for i in range(params.n)}
        open_answers = set(made)
        while True:
            outputs = self.engine.generate(self.prompts[p], params, salt=rng.choice([b"", b"tenant"]))
            try:
                count = 0
                async for output in outputs:
                    made[output.index] += output.new_token_ids
                    self.tokens += len(output.new_token_ids)
                    if output.finish_reason is not None:
                        open_answers.remove(output.index)
                        self.ended[output.finish_reason.value] += 1
                        self.check(p, k, output.index, made, limit, output.finish_reason)
                    count += 1
                    if leave_after is not None and count > leave_after:
                        break
                break
            except QueueFull:
                await asyncio.sleep(rng.random() * 0.05)
            finally:
                await outputs.aclose()
        for i in open_answers:  # the client left: what came until then is a beginning
            wanted = self.answers[p, k, i]
            assert made[i] == wanted[: len(made[i])]

    def check(self, p: int, k: int, index: int, made: dict[int, list[int]], limit: int, reason: FinishReason) -> None:
        """The tokens are those known beforehand, and the reason is the right one."""
        wanted = self.answers[p, k, index][:limit]
        if reason is FinishReason.TIMEOUT:
            wanted = wanted[: len(made[index])]
        else:
            assert reason is (FinishReason.STOP if wanted[-1] == 0 else FinishReason.LENGTH)
        assert made[index] == wanted, (p, k, index)

    async def patches(self) -> None:
        """A random change every 100 ms, a flush now and then; each is in force, whole, when it is answered."""
        while True:
            change = random_change(self.rng)
            runtime = await self.engine.update_runtime(change, preempt=self.rng.random() < 0.3, by="storm")
            assert {name: runtime.values()[name] for name in change} == change
            self.versions.append(runtime.version)
            if self.rng.random() < 0.2:
                await self.engine.flush_cache()
            await asyncio.sleep(0.1)

    async def blow(self, requests: int, at_once: int) -> None:
        """All requests, so many under way at a time."""
        gate = asyncio.Semaphore(at_once)

        async def one(index: int) -> None:
            async with gate:
                await self.client(index)

        patching = asyncio.create_task(self.patches())
        await asyncio.gather(*map(one, range(requests)))
        patching.cancel()
        await asyncio.gather(patching, return_exceptions=True)


async def settled(engine: AsyncEngine) -> None:
    """Until the engine has nothing to do."""
    while engine._core.busy or not engine._inbox.empty():
        await asyncio.sleep(0.005)
    await engine.history()  # a round through the engine thread: its last step is over


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_thousand_requests_in_a_storm_of_changes(
    tiny_checkpoint: Path, answers: dict[tuple[int, int, int], list[int]], record_property: Any
) -> None:
    """None is lost or hangs, no token differs, no block leaks, versions only rise, and the engine's counts are ours."""

    async def main() -> None:
        engine = AsyncEngine(config(tiny_checkpoint, num_blocks=BLOCKS, max_model_len=BLOCKS * BLOCK))
        engine.start()
        storm = Storm(engine, answers, seed=1)
        await storm.blow(requests=2000, at_once=60)
        await settled(engine)
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
        engine._core.scheduler.kv.pool.check_integrity([])
        assert storm.versions == sorted(set(storm.versions))
        assert storm.ended.keys() == {"stop", "length", "timeout"} or storm.ended.keys() == {"length", "timeout"}
        for reason, count in storm.ended.items():  # a client that left may have missed an end
            assert stats.finished[reason] >= count
        assert stats.finished["abort"] > 0
        assert stats.generation_tokens >= storm.tokens
        assert stats.preemptions > 0
        assert stats.prompt_tokens_cached > 0
        record_property(
            "storm", f"{stats.finished}, {len(storm.versions)} changes, {stats.preemptions} preemptions, "
            f"{stats.prompt_tokens_cached} prompt tokens cached, refused {stats.refused}",
        )  # fmt: skip
        await engine.stop()

    asyncio.run(main())


def resident_bytes() -> int:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's own count of resident pages")
def test_memory_stays_flat_over_ten_thousand_requests(tiny_checkpoint: Path, record_property: Any) -> None:
    """After warm-up another 9 000 requests of all kinds add less than 8 MB, and no request outlives its answer."""
    core = EngineCore(config(tiny_checkpoint, num_blocks=BLOCKS, max_model_len=BLOCKS * BLOCK))
    core.update_runtime({"request_timeout_s": 600.0})
    rng = random.Random(9)

    def serve(count: int) -> None:
        for start in range(0, count, 20):
            for i in range(20):
                prompt = [rng.randrange(1, 300) for _ in range(rng.randint(1, 20))]
                params = replace(rng.choice(KINDS), max_tokens=rng.randint(1, 4), n=1, optimization="full")
                core.add(f"{start} {i}", prompt, params)
            while core.busy:
                core.step()
                if rng.random() < 0.02:
                    core.abort(f"{start} {rng.randrange(20)}")
                if rng.random() < 0.01:
                    core.update_runtime({"stream_interval": rng.randint(1, 3)})

    serve(1000)
    gc.collect()
    before = resident_bytes()
    serve(9000)
    gc.collect()
    grown = resident_bytes() - before
    record_property("resident memory grown by", f"{grown / 2**20:.1f} MiB over 9000 requests")
    assert grown < 8 * 2**20
    held = sum(type(thing) is Request for thing in gc.get_objects())
    # Deadlines of ended requests are forgotten when there are many, not one by one.
    assert held < 200
    assert len(core.history()) <= 65
