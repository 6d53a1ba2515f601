"""Knative's autoscaler (KPA) and SkyServe's rule.

KPA (knative.dev/docs/serving/autoscaling): requests under way, averaged over a stable window of 60 s and a panic window
of 6 s, against 70 % of the target of a replica; in panic (twice the capacity wanted) it never goes down. SkyServe
(sky/serve/autoscalers.py): requests per second over 60 s against a target of a replica, followed after 300 s of equal
wishes up and 1200 s down, from none at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flyball.planner.analyzers import Advice, Seen


@dataclass(frozen=True, slots=True)
class KpaMemory:
    """Requests under way by time, and the panic's start and most."""

    sights: tuple[tuple[float, float], ...] = ()
    panic_at_s: float = -math.inf
    panic_most: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Kpa:
    """Stable and panic windows."""

    period_s: float = 2.0
    stable_s: float = 60.0
    panic_s: float = 6.0
    panic_threshold: float = 2.0
    utilization: float = 0.7
    max_down: float = 2.0  # at most halved at once

    def start(self) -> KpaMemory:
        """Nothing seen, no panic."""
        return KpaMemory()

    def advise(self, seen: Seen, memory: KpaMemory) -> tuple[Advice, KpaMemory]:
        """Replicas for the requests under way."""
        under_way = seen.view.queued + sum(r.running + r.waiting for r in seen.view.ready if r.reported)
        sights = (*(s for s in memory.sights if s[0] > seen.now_s - self.stable_s), (seen.now_s, under_way))
        target = max(seen.home.concurrency * self.utilization, 1.0)
        stable = _mean([n for _, n in sights])
        panic = _mean([n for t, n in sights if t > seen.now_s - self.panic_s])
        ready = max(seen.view.count("ready"), 1)
        wanted, urgent = math.ceil(stable / target - 1e-9), math.ceil(panic / target - 1e-9)
        panic_at_s, most = memory.panic_at_s, memory.panic_most
        if urgent / ready >= self.panic_threshold:
            panic_at_s = seen.now_s
        panicking = seen.now_s - panic_at_s < self.stable_s
        most = max(most, urgent, seen.replicas) if panicking else 0
        count = most if panicking else max(wanted, math.floor(seen.replicas / self.max_down))
        count = max(count, 1)
        reason = f"{stable:.3g} under way (panic {panic:.3g}) over {target:.3g} a replica{', panic' * panicking}"
        return (
            Advice(wanted=seen.moved_to(count), reason=reason, binding="concurrency"),
            KpaMemory(sights, panic_at_s, most),
        )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


@dataclass(frozen=True, slots=True)
class SkyMemory:
    """Rates by time, and since when more or fewer have been wanted."""

    rates: tuple[tuple[float, float, float], ...] = ()  # (when, requests per second, seconds)
    side: int = 0
    since_s: float = -math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class SkyServe:
    """Requests per second, with delays."""

    period_s: float = 20.0
    window_s: float = 60.0
    up_delay_s: float = 300.0
    down_delay_s: float = 1200.0
    utilization: float = 1.0  # of what a replica takes within the promise

    def start(self) -> SkyMemory:
        """Nothing seen."""
        return SkyMemory()

    def advise(self, seen: Seen, memory: SkyMemory) -> tuple[Advice, SkyMemory]:
        """The count once it has been wanted for long enough."""
        rates = (*(r for r in memory.rates if r[0] > seen.now_s - self.window_s),
                 (seen.now_s, seen.rate_rps, seen.window_s))  # fmt: skip
        rate = sum(r * s for _, r, s in rates) / sum(s for _, _, s in rates)
        target = math.ceil(rate / (seen.home.capacity_rps * self.utilization) - 1e-9)
        side = (target > seen.replicas) - (target < seen.replicas)
        since_s = memory.since_s if side == memory.side else seen.now_s
        delay_s = self.up_delay_s if side > 0 else self.down_delay_s
        due = side != 0 and (seen.now_s - since_s >= delay_s or not seen.replicas)
        count = target if due else seen.replicas
        reason = f"{rate:.3g} requests/s want {target}, for {seen.now_s - since_s:.0f} s of {delay_s:g}"
        after = SkyMemory(rates, 0 if due else side, since_s)
        return Advice(wanted=seen.moved_to(count), reason=reason, binding="requests per second"), after
