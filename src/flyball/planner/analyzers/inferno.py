"""The control loop of llm-inferno: the mean SLO by queue model, for the throughput seen, once a minute, undamped."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flyball.planner.analyzers import Advice, Seen


@dataclass(frozen=True, slots=True, kw_only=True)
class Inferno:
    """Takes what was served for what was asked, as the original does (design of its collector: rate of successes)."""

    period_s: float = 60.0

    def start(self) -> None:
        """It remembers nothing."""
        return

    def advise(self, seen: Seen, memory: None) -> tuple[Advice, None]:
        """ceil(throughput / largest rate within the mean targets), on the accelerator of least cost."""
        rate = seen.view.completed / seen.window_s
        best = min(
            seen.options, key=lambda o: (math.ceil(rate / o.mean_capacity_rps) * o.cost_per_h, o.cost_per_h, o.name)
        )
        count = max(math.ceil(rate / best.mean_capacity_rps - 1e-9), seen.server.min_replicas)
        reason = f"{rate:.3g} requests/s served, a replica on {best.name} takes {best.mean_capacity_rps:.3g}"
        return Advice(wanted={best.name: count}, reason=reason, binding=best.binding), memory
