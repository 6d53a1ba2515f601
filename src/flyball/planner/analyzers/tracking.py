"""Kubernetes' HorizontalPodAutoscaler, and KEDA through it: replicas in proportion to a metric over its target.

desired = ceil(replicas * metric / target), nothing within a tenth of it; replicas that are not ready count as idle on
the way up and are left out on the way down; at most doubled or 4 more in 15 s; down to the most wanted within 300 s
(the defaults of autoscaling/v2, kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from flyball.planner.analyzers import Advice, Seen

Metric = Literal["concurrency", "rps"]
Wishes = tuple[tuple[float, int], ...]  # (when, replicas)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetTracking:
    """Follows one metric; its target is a share of what our queue model says a replica takes within the promise."""

    metric: Metric = "concurrency"
    utilization: float = 0.8
    period_s: float = 15.0
    tolerance: float = 0.1
    down_window_s: float = 300.0
    scale_to_zero: bool = False

    def start(self) -> Wishes:
        """What was wanted lately."""
        return ()

    def advise(self, seen: Seen, memory: Wishes) -> tuple[Advice, Wishes]:
        """The HPA's algorithm."""
        ready = [r for r in seen.view.ready if r.reported]
        option = seen.home
        if self.metric == "rps":
            total, target = seen.rate_rps, option.capacity_rps * self.utilization
        else:
            total = seen.view.queued + sum(r.running + r.waiting for r in ready)
            target = max(option.concurrency * self.utilization, 1.0)
        have = max(seen.replicas, 1)
        desired = self._desired(total, target, have, len(ready))
        if self.scale_to_zero and total == 0:
            desired = 0
        desired = min(desired, max(2 * have, have + 4))
        wishes = (*(w for w in memory if w[0] > seen.now_s - self.down_window_s), (seen.now_s, desired))
        count = desired if desired >= have else min(max(n for _, n in wishes), have)
        reason = f"{self.metric} {total:.3g} over a target of {target:.3g} a replica: {desired}, stabilised {count}"
        return Advice(wanted=seen.moved_to(count), reason=reason, binding=self.metric), wishes

    def _desired(self, total: float, target: float, have: int, ready: int) -> int:
        ratio = total / target / max(ready, 1)
        if abs(ratio - 1.0) <= self.tolerance and ready == have:
            return have
        if ratio > 1.0:  # those that start count with nothing: the ratio shrinks, and must not turn round
            wanted = math.ceil(total / target - 1e-9)
            return max(wanted, have) if total / target / have > 1.0 + self.tolerance else have
        return min(max(math.ceil(total / target - 1e-9), 1), have)


def hpa() -> TargetTracking:
    """Requests under way per replica."""
    return TargetTracking()


def keda() -> TargetTracking:
    """Requests per second and replica, down to none when there are none (KEDA's cooldown of 300 s)."""
    return TargetTracking(metric="rps", scale_to_zero=True)
