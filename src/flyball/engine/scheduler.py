"""Who runs next, and how many tokens: computed tokens catch up with known tokens, under a budget.

One rule covers prefill, chunked prefill, prefix hits, decode and resumption after preemption: a request knows
`num_known` tokens, `num_computed` of them have valid KV, and a step hands out part of the difference (the rule is
vLLM's, whose V1 scheduler has no phases either). Decodes go first, so that a long prompt never starves them.
No tensor is known here; the caller runs the step and reports the sampled tokens.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field

from flyball.engine.config import RuntimeConfig
from flyball.engine.kv_manager import KVManager
from flyball.engine.request import FinishReason, Request


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
    """Waiting and running requests over one KV pool; first come, first served."""

    kv: KVManager
    eos_token_ids: frozenset[int]
    waiting: list[Request] = field(default_factory=list)  # in order of arrival; preempted ones return to their place
    running: list[Request] = field(default_factory=list)  # in order of arrival
    step: int = 0
    preemptions: int = 0
    preempted_tokens: int = 0
    cached_tokens: int = 0

    def add(self, request: Request) -> None:
        """Queue a request that the engine has accepted."""
        insort(self.waiting, request, key=_age)

    def abort(self, request: Request) -> None:
        """Drop a request between two steps; its blocks are free at once."""
        self._drop(request, FinishReason.ABORT)

    def schedule(self, runtime: RuntimeConfig, now_s: float) -> StepPlan:
        """Plan one step under one snapshot of the policy."""
        gate_s = self._gathering_until(runtime, now_s)
        if gate_s is not None:
            return StepPlan((), wake_s=gate_s)
        self.step += 1
        parts: list[Scheduled] = []
        preempted: list[Request] = []
        budget = self._schedule_running(runtime, parts, preempted)
        if not preempted:
            self._admit_waiting(runtime, now_s, budget, parts)
        return StepPlan(tuple(parts), tuple(preempted))

    def update(self, plan: StepPlan, sampled: Sequence[int], runtime: RuntimeConfig) -> list[tuple[Request, int]]:
        """Take the tokens that a step sampled, in the order of its sampling parts; returns (request, token) pairs."""
        tokens = iter(sampled)
        news = []
        for part in plan.parts:
            request = part.request
            request.num_computed = part.start + part.count
            self.kv.commit(request, caching=runtime.prefix_caching)
            if part.samples:
                token = next(tokens)
                request.output_ids.append(token)
                news.append((request, token))
                reason = self._finish_reason(request, token)
                if reason is not None:
                    self._drop(request, reason)
        return news

    def _gathering_until(self, runtime: RuntimeConfig, now_s: float) -> float | None:
        """When an idle engine will start its next batch; None: now."""
        if self.running or not self.waiting or runtime.max_wait_ms <= 0 or len(self.waiting) >= runtime.max_num_seqs:
            return None
        due_s = self.waiting[0].arrival_s + runtime.max_wait_ms / 1e3
        return due_s if due_s > now_s else None

    def _schedule_running(self, runtime: RuntimeConfig, parts: list[Scheduled], preempted: list[Request]) -> int:
        budget = runtime.max_num_batched_tokens
        # Decodes first, then prefills; with too small a budget for all, whoever waited longest since its last step.
        order = sorted(self.running, key=lambda r: (r.deficit > 1, r.last_step))
        for request in order:
            if budget == 0:
                break
            if request in preempted:
                continue
            count = _share(request, budget, runtime)
            while not self.kv.grow(request, count):
                victim = next(r for r in reversed(self.running) if r is request or r.last_step != self.step)
                self._preempt(victim)
                preempted.append(victim)
                if victim is request:
                    break
            else:
                parts.append(self._part(request, count))
                budget -= count
        return budget

    def _admit_waiting(self, runtime: RuntimeConfig, now_s: float, budget: int, parts: list[Scheduled]) -> None:
        while self.waiting and budget > 0 and len(self.running) < runtime.max_num_seqs:
            request = self.waiting[0]
            prefix = self.kv.find_prefix(request) if runtime.prefix_caching else []
            cached = len(prefix) * self.kv.block_size
            request.num_computed = cached
            count = _share(request, budget, runtime)
            # One spare block for each running sequence keeps the next steps from preempting at once.
            if not self.kv.admit(request, prefix, count, reserve=len(self.running)):
                request.num_computed = 0
                break
            if request.first_scheduled_s is None:
                request.first_scheduled_s = now_s
                request.num_cached_tokens = cached
                self.cached_tokens += cached
            del self.waiting[0]
            insort(self.running, request, key=_age)
            parts.append(self._part(request, count))
            budget -= count

    def _part(self, request: Request, count: int) -> Scheduled:
        request.last_step = self.step
        return Scheduled(request, request.num_computed, count, samples=count == request.deficit)

    def _preempt(self, request: Request) -> None:
        self.preemptions += 1
        self.preempted_tokens += request.num_computed
        request.num_preemptions += 1
        self.kv.free(request)
        self.running.remove(request)
        insort(self.waiting, request, key=_age)

    def _finish_reason(self, request: Request, token: int) -> FinishReason | None:
        params = request.params
        if token in params.stop_token_ids or (token in self.eos_token_ids and not params.ignore_eos):
            return FinishReason.STOP
        return FinishReason.LENGTH if len(request.output_ids) >= params.max_tokens else None

    def _drop(self, request: Request, reason: FinishReason) -> None:
        request.finish_reason = reason
        self.kv.free(request)
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)


def _age(request: Request) -> tuple[float, str]:
    return request.arrival_s, request.id


def _share(request: Request, budget: int, runtime: RuntimeConfig) -> int:
    """Tokens that a request may compute in this step."""
    cap = runtime.long_prefill_token_threshold or budget
    return min(request.deficit, budget, cap)
