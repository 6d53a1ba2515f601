"""The scheduler and its pool under random use: no leak, no double owner, everything idle frees everything, all ends.

Oracles O8 and O9. The model beside the real thing is a dictionary from block to the tokens that were written into it.
"""

import random
from dataclasses import replace
from typing import Any, get_args

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flyball.engine.block_pool import Eviction
from flyball.engine.config import Policy, RuntimeConfig, Victim
from flyball.engine.kv_manager import KVManager
from flyball.engine.request import FinishReason, Request, SamplingParams
from flyball.engine.scheduler import Scheduler

EOS = 0
LEVELS = ("full", "full", "full", "basic", "none")


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run, expire, are aborted; policy changes at any step boundary. Tokens are random."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = random.Random(1)
        self.block_size, self.num_blocks = 4, 12
        self.kv = KVManager(self.num_blocks, self.block_size)
        self.scheduler = Scheduler(self.kv, frozenset({EOS}))
        self.runtime = RuntimeConfig(max_num_seqs=8, max_num_batched_tokens=16)
        self.admitted: list[Request] = []
        self.content: dict[int, list[tuple[Any, ...]]] = {}  # block -> prefix of tokens written into it
        self.flushed: set[tuple[Any, ...]] = set()  # prefixes that no later request may find
        self.now_s = 0.0

    @rule(
        prompt=st.integers(1, 40), output=st.integers(1, 8), shared=st.booleans(), n=st.sampled_from([1, 1, 1, 2, 5]),
        level=st.sampled_from(LEVELS), priority=st.integers(-1, 1), timeout=st.sampled_from([None, None, 3.0, 30.0]),
        salt=st.sampled_from([b"", b"", b"tenant"]),
    )  # fmt: skip
    def add(
        self, prompt: int, output: int, shared: bool, n: int, level: str, priority: int, timeout: float | None,
        salt: bytes,
    ) -> None:  # fmt: skip
        """Admit what the engine would: requests that fit the pool as it is limited now."""
        limit = self.runtime.kv_cache_limit_blocks or self.num_blocks
        if prompt + output > limit * self.block_size:
            return
        ids = [9] * prompt if shared else [self.rng.randrange(1, 50) for _ in range(prompt)]
        params = SamplingParams(max_tokens=output, n=n, optimization=level, priority=priority)  # type: ignore[arg-type]
        group = str(len(self.admitted))
        for i in range(n):
            request = Request(f"{group}#{i}", list(ids), params, self.now_s, seed=0, salt=salt, group=group, index=i)
            request.deadline_s = None if timeout is None else self.now_s + timeout
            self.admitted.append(request)
            self.scheduler.add(request)

    @rule(
        seqs=st.integers(1, 8), budget=st.integers(1, 64), cap=st.integers(0, 8), caching=st.booleans(),
        interval=st.integers(0, 3), eviction=st.sampled_from(get_args(Eviction)), limit=st.integers(0, 12),
        watermark=st.sampled_from([0.0, 0.01, 0.5]), policy=st.sampled_from(get_args(Policy)),
        victim=st.sampled_from(get_args(Victim)), wait=st.sampled_from([0.0, 0.0, 5000.0]), preempt=st.booleans(),
    )  # fmt: skip
    def change_policy(
        self, seqs: int, budget: int, cap: int, caching: bool, interval: int, eviction: Eviction, limit: int,
        watermark: float, policy: Policy, victim: Victim, wait: float, preempt: bool,
    ) -> None:  # fmt: skip
        """Any legal policy may follow any other."""
        self.runtime = replace(
            self.runtime, max_num_seqs=seqs, max_num_batched_tokens=max(seqs, budget), prefix_caching=caching,
            long_prefill_token_threshold=cap, prefill_interval=interval, eviction=eviction, watermark=watermark,
            kv_cache_limit_blocks=limit, policy=policy, preemption_victim=victim, max_wait_ms=wait,
            version=self.runtime.version + 1,
        )  # fmt: skip
        if preempt:
            self.scheduler.shed(self.runtime)

    @rule()
    def step(self) -> None:
        """Compute one step: every scheduled token lands in a block that the request owns."""
        self.now_s += 1.0
        for request in self.scheduler.expire(self.now_s):
            assert request.finish_reason is FinishReason.TIMEOUT
        plan = self.scheduler.schedule(self.runtime, self.now_s)
        assert plan.tokens <= self.runtime.max_num_batched_tokens
        assert len(plan.parts) == 1 or not any(part.request.solo for part in plan.parts)
        for part in plan.parts:
            request = part.request
            assert part.start == request.num_computed
            assert part.count >= 1
            assert request.deadline_s is None or request.deadline_s > self.now_s
            known = tuple(request.tokens(0, request.num_known))
            # What the request reads must be what it knows: its own tokens, or an equal prefix of its own tenant's.
            for position in range(part.start):
                written = self.content[request.block_table[position // 4]][position % 4]
                assert written == (request.salt, *known[: position + 1])
            for position in range(part.start, part.start + part.count):
                block = request.block_table[position // 4]
                assert self.kv.pool.ref_counts[block] == 1, "written while shared"
                slots = self.content.setdefault(block, [()] * 4)
                slots[position % 4] = (request.salt, *known[: position + 1])
        sampled = [self.rng.randrange(0, 50) for part in plan.parts if part.samples]
        self.scheduler.update(plan, sampled, self.runtime)

    @precondition(lambda self: self.scheduler.running or self.scheduler.waiting)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        """Any live request may be aborted between two steps."""
        live = self.scheduler.running + self.scheduler.waiting
        victim = data.draw(st.sampled_from(live))
        self.scheduler.abort(victim)
        assert victim.finish_reason is FinishReason.ABORT
        assert victim.block_table == []

    @rule()
    def flush(self) -> None:
        """Forgetting every prefix is legal at any moment, and complete."""
        known = [r for r in self.admitted if not r.finish_reason]
        self.kv.flush()
        assert self.kv.pool.num_cached == 0
        for request in known:
            assert self.kv.find_prefix(request) == []

    @invariant()
    def blocks_are_accounted_for(self) -> None:
        """Used, cached and free blocks make up the pool; counts equal the tables that hold them."""
        pool, running = self.kv.pool, self.scheduler.running
        pool.check_integrity([r.block_table for r in self.admitted])
        for request in running:
            assert len(request.block_table) * self.block_size >= request.num_computed
        assert all(r.block_table == [] for r in self.scheduler.waiting)
        assert [r.order for r in running] == sorted(r.order for r in running)
        assert [r.order for r in self.scheduler.waiting] == sorted(r.order for r in self.scheduler.waiting)
        assert pool.num_cached == 0 or pool.num_used + pool.num_cached <= max(pool.limit, pool.num_used)

    @invariant()
    def names_say_what_blocks_hold(self) -> None:
        """A hash leads only to a block whose tokens have that hash."""
        for digest, block in self.kv.pool._block_of.items():
            salt, *tokens = self.content[block][-1]
            probe = Request("probe", tokens, SamplingParams(), 0.0, seed=0, salt=salt)
            self.kv.find_prefix(probe)
            assert probe.block_hashes[-1] == digest

    def teardown(self) -> None:
        """Every admitted request ends within a bounded number of steps, and then everything is idle."""
        bound = 100 + sum(r.num_known + r.params.max_tokens for r in self.admitted) * 20
        for _ in range(bound):
            if not (self.scheduler.running or self.scheduler.waiting):
                break
            self.step()
        assert all(r.finish_reason is not None for r in self.admitted), "a request never ended"
        self.kv.pool.check_idle()
        self.kv.pool.check_integrity([])


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
