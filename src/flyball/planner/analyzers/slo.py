"""Our own analyzer: as many replicas as the demand expected needs within the promise, on the cheapest accelerator."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flyball.planner.analyzers import Advice, Seen
from flyball.planner.options import Option


@dataclass(frozen=True, slots=True, kw_only=True)
class SloModel:
    """Sizes for the most of three demands: now, when a replica asked for now is ready, and what waits already.

    Up and down are judged apart: a replica is taken away only if what is left could take `hysteresis` more than is
    expected, so that no noise within that band moves anything.
    """

    period_s: float = 15.0
    deviations: float = 0.65  # of the forecast's error, added to what is expected
    down_deviations: float = 0.3
    hysteresis: float = 0.1
    clear_s: float = 120.0  # in which a backlog shall be worked off
    move_gain: float = 0.15  # another accelerator must be cheaper by this share to be moved to

    def start(self) -> None:
        """It remembers nothing: the forecast does."""
        return

    def advise(self, seen: Seen, memory: None) -> tuple[Advice, None]:
        """Replicas by the queue model, on one accelerator."""
        option = self._option(seen)
        backlog = self.backlog_rps(seen, option)
        up_rps = max(seen.level_rps, seen.ahead.upper(self.deviations)) + backlog
        lasting_rps = max(seen.level_rps, seen.peak_rps + self.down_deviations * seen.ahead.sd_rps)
        down_rps = lasting_rps * (1.0 + self.hysteresis) + backlog
        least, most = option.replicas(up_rps), option.replicas(down_rps)
        current = seen.current.get(option.name, 0)
        count = least if least > current else min(most, current)
        reason = (
            f"{seen.level_rps:.3g} requests/s now, {seen.ahead.mean_rps:.3g} ± {seen.ahead.sd_rps:.2g} in "
            f"{seen.start_up_s:.0f} s ({seen.ahead.method}), backlog {backlog:.2g}; a replica on {option.name} takes "
            f"{option.capacity_rps:.3g} ({option.binding}): {count} needed"
        )
        figures = {"demand_rps": up_rps, "capacity_rps": option.capacity_rps, "backlog_rps": backlog}
        return Advice(wanted={option.name: count}, reason=reason, binding=option.binding, figures=figures), memory

    def _option(self, seen: Seen) -> Option:
        """The cheapest accelerator for this load, or the present one where the gain would be small."""
        rate = max(seen.level_rps, seen.ahead.upper(self.deviations))

        def cost(option: Option) -> float:
            return max(option.replicas(rate), 1) * option.cost_per_h

        best = min(seen.options, key=lambda o: (cost(o), o.name))
        if not any(seen.current.get(o.name) for o in seen.options):
            return best
        home = seen.home
        return best if cost(best) < (1.0 - self.move_gain) * cost(home) else home

    def backlog_rps(self, seen: Seen, option: Option) -> float:
        """What waits beyond the usual, as a rate that works it off in `clear_s`."""
        ready = seen.view.ready
        waiting = seen.view.queued + sum(r.waiting for r in ready if r.reported)
        waiting += sum(max(r.running - 2.0 * option.concurrency, 0.0) for r in ready if r.reported)
        usual = max(len(ready), 1) * max(option.concurrency, 1.0) * 0.5
        spare_s = self.clear_s + seen.start_up_s
        return max(waiting - usual, 0.0) / spare_s if math.isfinite(waiting) else 0.0
