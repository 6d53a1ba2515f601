"""The Workload-Variant-Autoscaler of llm-d: saturation by spare capacity (V1), and by KV tokens wanted and held (V2).

Constants and rules as published with it (wva/internal/saturationv1, wva/internal/engines/analyzers/saturation_v2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from flyball.core.observation import ReplicaView
from flyball.planner.analyzers import Advice, Seen
from flyball.planner.options import Option

_SHORT, _MEDIUM = 100, 500  # tokens: the buckets of output lengths that V2 keeps its history by
_HISTORY = 10


def _changing(seen: Seen) -> bool:
    """Whether replicas asked for are not there yet, or ones not wanted still are."""
    return seen.view.count("ready") != seen.replicas or seen.view.count("starting", "draining") > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SaturationV1:
    """One more where KV cache or queue runs short; one less where the rest would still have spare. No other step."""

    period_s: float = 15.0
    kv_threshold: float = 0.80
    queue_threshold: float = 5.0
    kv_spare: float = 0.10  # least average spare
    queue_spare: float = 3.0

    def start(self) -> None:
        """It remembers nothing."""
        return

    def advise(self, seen: Seen, memory: None) -> tuple[Advice, None]:
        """One step up, down or none."""
        return self._advise(seen), memory

    def _advise(self, seen: Seen) -> Advice:
        ready = [r for r in seen.view.ready if r.reported]
        if not ready:
            return _cold(seen)
        if _changing(seen):
            return Advice(wanted=dict(seen.current), reason="no decision while replicas start or drain")
        free = [r for r in ready if r.kv_used < self.kv_threshold and r.waiting < self.queue_threshold]
        if not free:
            return Advice(wanted=seen.moved_to(seen.replicas + 1), reason="every replica is saturated", binding="KV")
        kv_spare = sum(self.kv_threshold - r.kv_used for r in free) / len(free)
        queue_spare = sum(self.queue_threshold - r.waiting for r in free) / len(free)
        spare = f"spare KV {kv_spare:.2f}, spare queue {queue_spare:.1f}"
        if kv_spare < self.kv_spare or queue_spare < self.queue_spare:
            return Advice(wanted=seen.moved_to(seen.replicas + 1), reason=f"{spare}: too little", binding="KV")
        if len(free) >= 2 and self._safe(free):
            return Advice(wanted=seen.moved_to(seen.replicas - 1), reason=f"{spare}, enough with one less")
        return Advice(wanted=dict(seen.current), reason=spare)

    def _safe(self, free: list[ReplicaView]) -> bool:
        """Whether one less keeps the spare: the load on each then grows by n / (n - 1)."""
        grown = len(free) / (len(free) - 1)
        kv = grown * sum(r.kv_used for r in free) / len(free)
        queue = grown * sum(r.waiting for r in free) / len(free)
        return self.kv_threshold - kv >= self.kv_spare and self.queue_threshold - queue >= self.queue_spare


def _cold(seen: Seen) -> Advice:
    """No replica that could tell: one if anybody waits or none was ever asked for."""
    if seen.replicas or not (seen.view.queued or seen.rate_rps):
        return Advice(wanted=dict(seen.current), reason="no ready replica reports")
    return Advice(wanted=seen.moved_to(1), reason="requests come and nothing serves them")


def bucket(output_tokens: float) -> str:
    """Which history a load's output length belongs to."""
    return "short" if output_tokens < _SHORT else "medium" if output_tokens < _MEDIUM else "long"


@dataclass(frozen=True, slots=True, kw_only=True)
class SaturationV2:
    """Replicas so that the KV tokens wanted stay within what replicas hold; sizes by the batch too."""

    period_s: float = 15.0
    kv_share: float = 0.80
    queue_threshold: float = 5.0
    up_threshold: float = 0.85
    down_boundary: float = 0.70

    def start(self) -> Mapping[str, tuple[float, ...]]:
        """The KV tokens that saturated replicas were seen to hold, by output length."""
        return {}

    def advise(
        self, seen: Seen, memory: Mapping[str, tuple[float, ...]]
    ) -> tuple[Advice, Mapping[str, tuple[float, ...]]]:
        """Tokens wanted against tokens held."""
        ready = [r for r in seen.view.ready if r.reported and r.kv_capacity_tokens]
        if not ready:
            return _cold(seen), memory
        o, i = _or(seen.view.output_tokens, 128.0), _or(seen.view.input_tokens, 512.0)
        kind = bucket(o)
        history = dict(memory)
        for r in ready:
            if r.waiting >= self.queue_threshold:
                history[kind] = (*history.get(kind, ()), r.kv_used * r.kv_capacity_tokens)[-_HISTORY:]
        each = [self._capacity(r, seen.home, i, o, history.get(kind, ())) for r in ready]
        per_replica = sum(each) / len(each)
        demand = sum(r.kv_used * r.kv_capacity_tokens + r.waiting * (i + o) for r in ready)
        supply = sum(each)
        starting = seen.view.count("starting")
        required = max(demand / self.up_threshold - supply - starting * per_replica, 0.0)
        spare = max(supply - demand / self.down_boundary, 0.0)
        said = f"{demand:.0f} KV tokens wanted, {supply:.0f} held"
        if required > 0:
            more = math.ceil(required / per_replica)
            return Advice(wanted=seen.moved_to(seen.replicas + more), reason=said, binding="KV"), history
        fewer = min(int(spare // per_replica), seen.replicas - 1)
        if fewer > 0 and not starting:
            return Advice(wanted=seen.moved_to(seen.replicas - fewer), reason=f"{said}: spare"), history
        return Advice(wanted=dict(seen.current), reason=said), history

    def _capacity(self, r: ReplicaView, option: Option, i: float, o: float, history: tuple[float, ...]) -> float:
        """min(k1, k2): by memory, and by what the batch can hold at once."""
        k1 = r.kv_capacity_tokens * self.kv_share
        if r.waiting >= self.queue_threshold:
            return min(k1, max(r.kv_used * r.kv_capacity_tokens, 1.0))
        if history:
            return min(k1, sum(history) / len(history))
        step_tokens = option.profile.max_step_tokens or 8192
        steady = min(step_tokens * o / max(i + o, 1.0), option.max_batch)
        return min(k1, max(steady * (i + o / 2), 1.0))


def _or(value: float, default: float) -> float:
    return default if math.isnan(value) else value
