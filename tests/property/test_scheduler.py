"""The scheduler and its pool under random use: no leak, no double owner, everything idle frees everything, all ends."""

import random
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flyball.engine.config import RuntimeConfig
from flyball.engine.kv_manager import KVManager
from flyball.engine.request import FinishReason, Request, SamplingParams
from flyball.engine.scheduler import Scheduler

EOS = 0


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run, are aborted; policy changes at any step boundary. Tokens are random."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = random.Random(1)
        self.block_size, self.num_blocks = 4, 12
        self.kv = KVManager(self.num_blocks, self.block_size)
        self.scheduler = Scheduler(self.kv, frozenset({EOS}))
        self.runtime = RuntimeConfig(max_num_seqs=8, max_num_batched_tokens=16)
        self.admitted: list[Request] = []
        self.content: dict[int, list[tuple[int, ...]]] = {}  # block -> prefix of tokens written into it
        self.now_s = 0.0

    @rule(prompt=st.integers(1, 40), output=st.integers(1, 8), shared=st.booleans())
    def add(self, prompt: int, output: int, shared: bool) -> None:
        """Admit what the engine would: a request that fits the empty pool."""
        if prompt + output > self.num_blocks * self.block_size:
            return
        ids = [9] * prompt if shared else [self.rng.randrange(1, 50) for _ in range(prompt)]
        request = Request(str(len(self.admitted)), ids, SamplingParams(max_tokens=output), self.now_s, seed=0)
        self.admitted.append(request)
        self.scheduler.add(request)

    @rule(seqs=st.integers(1, 8), budget=st.integers(1, 64), cap=st.integers(0, 8), caching=st.booleans())
    def change_policy(self, seqs: int, budget: int, cap: int, caching: bool) -> None:
        """Any legal policy may follow any other."""
        self.runtime = replace(
            self.runtime,
            max_num_seqs=seqs,
            max_num_batched_tokens=max(seqs, budget),
            long_prefill_token_threshold=cap,
            prefix_caching=caching,
            version=self.runtime.version + 1,
        )

    @rule()
    def step(self) -> None:
        """Compute one step: every scheduled token lands in a block that the request owns."""
        self.now_s += 1.0
        plan = self.scheduler.schedule(self.runtime, self.now_s)
        assert plan.tokens <= self.runtime.max_num_batched_tokens
        for part in plan.parts:
            request = part.request
            assert part.start == request.num_computed
            assert part.count >= 1
            known = tuple(request.tokens(0, request.num_known))
            # What the request reads must be what it knows: its own tokens, or an equal prefix.
            for position in range(part.start):
                assert self.content[request.block_table[position // 4]][position % 4] == known[: position + 1]
            for position in range(part.start, part.start + part.count):
                block = request.block_table[position // 4]
                assert self.kv.pool.ref_counts[block] == 1, "written while shared"
                slots = self.content.setdefault(block, [()] * 4)
                slots[position % 4] = known[: position + 1]
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
        """Forgetting every prefix is legal at any moment."""
        self.kv.pool.flush()

    @invariant()
    def blocks_are_accounted_for(self) -> None:
        """Used, cached and free blocks make up the pool; counts equal the tables that hold them."""
        self.kv.pool.check_integrity([r.block_table for r in self.admitted])
        for request in self.scheduler.running:
            assert len(request.block_table) * self.block_size >= request.num_computed
        assert all(r.block_table == [] for r in self.scheduler.waiting)

    def teardown(self) -> None:
        """Every admitted request ends within a bounded number of steps, and then everything is idle."""
        bound = 50 + sum(r.num_known + r.params.max_tokens for r in self.admitted) * 20
        for _ in range(bound):
            if not (self.scheduler.running or self.scheduler.waiting):
                break
            self.step()
        assert all(r.finish_reason is not None for r in self.admitted), "a request never ended"
        assert self.kv.pool.num_used == 0
        self.kv.pool.check_integrity([])


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
