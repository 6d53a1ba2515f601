"""Who runs next, and how many tokens: computed tokens catch up with known tokens, under a budget.

One rule covers prefill, chunked prefill, prefix hits, decode and resumption after preemption: a request knows
`num_known` tokens, `num_computed` of them have valid KV, and a step hands out part of the difference (the rule is
vLLM's, whose V1 scheduler has no phases either). Decodes go first, so that a long prompt never starves them.
No tensor is known here; the caller runs the step and reports the sampled tokens.

Why every request ends: an admission promises blocks for all that the running ones know already, so that two prefills
never take each other's; a step in which anything decodes adds a token, of which there are finitely many; and a request
that is alone may use the whole pool, which it fits, whatever the limit says now.
"""

from __future__ import annotations

import heapq
import logging
import math
from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from flyball.engine.config import RuntimeConfig
from flyball.engine.kv_manager import KVManager
from flyball.engine.request import FinishReason, Request

log = logging.getLogger("flyball.engine")

# Requests, oldest first, among which the longest prefix match is sought: a look-up for each costs time in every step.
_MATCHED = 128


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One request's part of a step: `count` tokens from position `start` on."""

    request: Request
    start: int
    count: int
    samples: bool  # the last of them is the last known token, so a new one is sampled


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes, and who lost their blocks to make it possible."""

    parts: tuple[Scheduled, ...]
    preempted: tuple[Request, ...] = ()
    wake_s: float | None = None  # nothing to do before this time: an idle engine is gathering requests

    @property
    def tokens(self) -> int:
        """Tokens computed in the step."""
        return sum(part.count for part in self.parts)


@dataclass(slots=True)
class Scheduler:
    """Waiting and running requests over one KV pool."""

    kv: KVManager
    eos_token_ids: frozenset[int]
    waiting: list[Request] = field(default_factory=list)  # in order of arrival; preempted ones return to their place
    running: list[Request] = field(default_factory=list)  # in order of arrival
    step: int = 0
    preemptions: int = 0
    preempted_tokens: int = 0
    cached_tokens: int = 0
    _added: int = 0
    _deadlines: list[tuple[float, int, Request]] = field(default_factory=list)  # a heap
    _in_force: RuntimeConfig | None = None
    _solos: int = 0  # waiting or running requests that want steps of their own
    _solo_last: bool = False  # the last step was one of those
    _last_prefill: int = 0  # last step with prompt tokens

    def add(self, request: Request) -> None:
        """Queue a request that the engine has accepted."""
        self._added += 1
        request.order = self._added
        self._solos += request.solo
        self.waiting.append(request)  # the latest comer: the list stays in order
        if request.deadline_s is not None:
            if len(self._deadlines) > 2 * (len(self.waiting) + len(self.running)) + 64:  # mostly of ended requests
                self._deadlines = [d for d in self._deadlines if d[2].finish_reason is None]
                heapq.heapify(self._deadlines)
            heapq.heappush(self._deadlines, (request.deadline_s, request.order, request))

    def abort(self, request: Request) -> None:
        """Drop a request between two steps; its blocks are free at once."""
        self.end(request, FinishReason.ABORT)

    def expire(self, now_s: float) -> list[Request]:
        """End the requests, waiting or running, whose deadline has passed; returns them."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            request = heapq.heappop(self._deadlines)[2]
            if request.finish_reason is None:
                self.end(request, FinishReason.TIMEOUT)
                expired.append(request)
        return expired

    def schedule(self, runtime: RuntimeConfig, now_s: float) -> StepPlan:
        """Plan one step under one snapshot of the policy."""
        if runtime is not self._in_force:
            self._in_force = runtime
            self.kv.pool.set_policy(
                limit=runtime.kv_cache_limit_blocks or self.kv.pool.num_blocks, eviction=runtime.eviction
            )
        gate_s = self._gathering_until(runtime, now_s)
        if gate_s is not None:
            return StepPlan((), wake_s=min([gate_s, *(d[0] for d in self._deadlines[:1])]))
        self.step += 1
        step = _Step(runtime, now_s)
        if not (self._solos and self._own_step(step)):
            self._shared_step(step)
        return StepPlan(tuple(step.parts), tuple(step.preempted))

    def shed(self, runtime: RuntimeConfig) -> list[Request]:
        """Preempt, between two steps, what no longer fits a lowered limit of sequences or blocks; one always stays."""
        shed = []
        limit = runtime.kv_cache_limit_blocks or self.kv.pool.num_blocks
        while len(self.running) > 1 and (len(self.running) > runtime.max_num_seqs or self.kv.pool.num_used > limit):
            victim = max(self.running, key=_victim_key(runtime))
            self._preempt(victim, runtime, "the limits were lowered")
            shed.append(victim)
        return shed

    def update(
        self, plan: StepPlan, sampled: Sequence[int | Sequence[int]], runtime: RuntimeConfig
    ) -> list[tuple[Request, int]]:
        """Take the tokens that a step sampled, in the order of its sampling parts; returns (request, token) pairs.

        A part whose guesses were verified gives several: those kept, whose KV is computed, and one more. A token below
        0 says that none could be chosen, which ends the request with an error.
        """
        entries = iter(sampled)
        news = []
        caching, size = runtime.prefix_caching, self.kv.block_size
        for part in plan.parts:
            request, reason = part.request, None
            computed = part.start + part.count
            if part.samples:
                entry = next(entries)
                tokens = (entry,) if isinstance(entry, int) else entry
                for place, token in enumerate(tokens):
                    computed = part.start + part.count + place
                    news.append((request, token))
                    if token >= 0:
                        request.output_ids.append(token)
                    reason = self._finish_reason(request, token)
                    if reason is not None:
                        break
            request.num_computed = computed
            if caching and request.caching and computed // size > request.num_hashed_blocks:
                self.kv.commit(request)
            if reason is not None:
                self.end(request, reason)
        return news

    def end(self, request: Request, reason: FinishReason) -> None:
        """Take a request out, for whatever reason; its blocks are free at once."""
        request.finish_reason = reason
        self._solos -= request.solo
        self.kv.free(request)
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)

    def _gathering_until(self, runtime: RuntimeConfig, now_s: float) -> float | None:
        """When an idle engine will start its next batch; None: now."""
        if self.running or not self.waiting or runtime.max_wait_ms <= 0 or self._solos:
            return None
        if len(self.waiting) >= min(runtime.max_batch_size or runtime.max_num_seqs, runtime.max_num_seqs):
            return None
        due_s = self.waiting[0].arrival_s + runtime.max_wait_ms / 1e3
        return due_s if due_s > now_s else None

    def _shared_step(self, step: _Step) -> None:
        """A step for all requests that may be batched: first who runs, then who can be admitted."""
        self._solo_last = False
        runtime, running = step.runtime, self.running
        if self._solos:
            running = [r for r in running if not r.solo]
        if runtime.preemption_victim != "latest_arrival" or runtime.policy == "priority":
            running = sorted(running, key=_victim_key(runtime))  # victims come last, and so can still be had
        # Decodes first, then prefills; with too small a budget for all, whoever waited longest since its last step.
        order = sorted(running, key=_turn)
        decoding = bool(order) and order[0].deficit == 1
        if decoding and self.step - self._last_prefill < runtime.prefill_interval:
            order = [r for r in order if r.deficit == 1]
            self._run(order, step)
            return
        self._run(order, step)
        if not step.preempted:
            self._admit_waiting(step)
        if runtime.prefill_interval and any(not p.samples or not p.request.output_ids for p in step.parts):
            self._last_prefill = self.step

    def _own_step(self, step: _Step) -> bool:
        """Give this step to one request that wants it alone, in turns with the shared batch; False: to the others."""
        solos = [r for r in self.running if r.solo]
        others = len(self.running) > len(solos) or any(not r.solo for r in self.waiting)
        if self._solo_last and others:
            return False
        head = next(self._by_policy(step.runtime), None) if len(self.running) < step.runtime.max_num_seqs else None
        if head is not None and head.solo and self._admit(head, [], None, step):
            pass
        elif solos:
            self._run([min(solos, key=attrgetter("last_step"))], step)
        self._solo_last = bool(step.parts or step.preempted)
        return self._solo_last

    def _run(self, order: Sequence[Request], step: _Step) -> None:
        """Give running requests, in this order, their share of the step; preempt where blocks run out."""
        for request in order:
            if step.budget == 0:
                return
            if request in step.preempted:
                continue
            count = _share(request, step)
            while not self.kv.grow(request, count, alone=len(self.running) == 1):
                candidates = [r for r in self.running if r is request or r.last_step != self.step]
                victim = max(candidates, key=_victim_key(step.runtime))
                self._preempt(victim, step.runtime, f"request {request.id} needs its blocks")
                step.preempted.append(victim)
                if victim is request:
                    break
            else:
                self._schedule(request, count, step)

    def _admit_waiting(self, step: _Step) -> None:
        seqs = step.runtime.max_num_seqs
        if not self.waiting or step.budget == 0 or len(self.running) >= seqs:
            return
        siblings: dict[str, Request] | None = None  # by group, the running answer with most of the prompt computed
        for request in list(self._by_policy(step.runtime)):
            if step.budget == 0 or len(self.running) >= seqs:
                return
            if request.solo:
                return  # its turn comes with the next step, and nobody overtakes
            sibling = None
            if request.params.n > 1:
                if siblings is None:
                    siblings = {r.group: r for r in sorted(self.running, key=attrgetter("num_computed"))}
                sibling = siblings.get(request.group)
                if sibling is not None and sibling.num_computed < self._shared_tokens(request):
                    continue  # wait for the common prompt rather than compute it twice
            prefix = self.kv.find_prefix(request) if step.runtime.prefix_caching and request.caching else []
            if not self._admit(request, prefix, sibling, step):
                return  # as above: the head of the queue might wait for ever
            if siblings is not None:
                siblings.setdefault(request.group, request)

    def _admit(self, request: Request, prefix: list[int], sibling: Request | None, step: _Step) -> bool:
        forked = sibling is not None and len(prefix) * self.kv.block_size < self._shared_tokens(request)
        if sibling is not None and forked:
            prefix = sibling.block_table[: self.kv.shareable_blocks(request)]
        cached = len(prefix) * self.kv.block_size
        request.num_computed = cached
        count = _share(request, step)
        if not self.kv.admit(request, prefix, count, reserve=self._reserve(step), alone=not self.running):
            request.num_computed = 0
            return False
        if sibling is not None and forked:
            request.epoch = sibling.epoch
        if request.first_scheduled_s is None:
            request.first_scheduled_s = step.now_s
            request.num_cached_tokens = cached
            self.cached_tokens += cached
        self.waiting.remove(request)
        insort(self.running, request, key=_order)
        self._schedule(request, count, step)
        return True

    def _schedule(self, request: Request, count: int, step: _Step) -> None:
        request.last_step = self.step
        step.parts.append(Scheduled(request, request.num_computed, count, samples=count == request.deficit))
        step.budget -= count

    def _reserve(self, step: _Step) -> int:
        """Blocks that an admission leaves for those who run: what they know already, and room to grow."""
        if not self.running:
            return 0
        pool = self.kv.pool
        watermark = math.ceil(step.runtime.watermark * min(pool.limit, pool.num_blocks))
        # One spare block for each running sequence keeps the next steps from preempting at once.
        return self.kv.promised(self.running) + max(len(self.running), watermark)

    def _shared_tokens(self, request: Request) -> int:
        return self.kv.shareable_blocks(request) * self.kv.block_size

    def _by_policy(self, runtime: RuntimeConfig) -> Iterator[Request]:
        """The waiting requests in the order in which they are admitted."""
        if runtime.policy == "fcfs":
            return iter(self.waiting)
        if runtime.policy == "priority":
            return iter(sorted(self.waiting, key=_urgency))
        if runtime.policy == "shortest_prefill_first":
            return iter(sorted(self.waiting, key=attrgetter("num_known")))
        oldest, rest = self.waiting[:_MATCHED], self.waiting[_MATCHED:]
        return iter(sorted(oldest, key=lambda r: -len(self.kv.find_prefix(r)) if r.caching else 0) + rest)

    def _preempt(self, request: Request, runtime: RuntimeConfig, reason: str) -> None:
        self.preemptions += 1
        self.preempted_tokens += request.num_computed
        request.num_preemptions += 1
        log.info(
            "event=preempted request=%s reason=%r victim_policy=%s computed_tokens=%d blocks=%d preemptions=%d "
            "running=%d waiting=%d",
            request.id, reason, runtime.preemption_victim, request.num_computed, len(request.block_table),
            request.num_preemptions, len(self.running) - 1, len(self.waiting) + 1,
        )  # fmt: skip
        self.kv.free(request)
        self.running.remove(request)
        insort(self.waiting, request, key=_order)

    def _finish_reason(self, request: Request, token: int) -> FinishReason | None:
        params = request.params
        if token < 0:
            request.error = "no token could be chosen: the model's output is not a number, or no token fits the grammar"
            return FinishReason.ERROR
        if token in params.stop_token_ids or (token in self.eos_token_ids and not params.ignore_eos):
            return FinishReason.STOP
        if request.matcher is not None and request.matcher.is_terminated():
            return FinishReason.STOP
        return FinishReason.LENGTH if len(request.output_ids) >= params.max_tokens else None


class _Step:
    """A plan in the making."""

    __slots__ = ("budget", "now_s", "parts", "preempted", "runtime")

    def __init__(self, runtime: RuntimeConfig, now_s: float) -> None:
        self.runtime = runtime
        self.now_s = now_s
        self.budget = runtime.max_num_batched_tokens
        self.parts: list[Scheduled] = []
        self.preempted: list[Request] = []


_order = attrgetter("order")


def _turn(request: Request) -> tuple[bool, int]:
    return request.deficit > 1, request.last_step


def _urgency(request: Request) -> tuple[int, int]:
    return request.params.priority, request.order


def _victim_key(runtime: RuntimeConfig) -> Callable[[Request], tuple[int, int, int]]:
    """What the first to be preempted has most of."""
    urgent = runtime.policy == "priority"
    least = runtime.preemption_victim == "least_computed"

    def key(request: Request) -> tuple[int, int, int]:
        return request.params.priority if urgent else 0, -request.num_computed if least else 0, request.order

    return key


def _share(request: Request, step: _Step) -> int:
    """Tokens that a request may compute in this step."""
    cap = step.runtime.long_prefill_token_threshold or step.budget
    return min(request.deficit, step.budget, cap)
