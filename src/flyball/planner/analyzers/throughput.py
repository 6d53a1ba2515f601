"""The throughput analyzer of llm-d: tokens wanted per second against what replicas give at a KV use of .85.

The gap between tokens is taken for a line of the KV use k, ITL(k) = A k + B, fitted by least squares to at least 10
sights of .15 <= k <= .85 that spread by .30; until then B is 6 ms and A is taken from the last sight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flyball.planner.analyzers import Advice, Seen, linear_fit
from flyball.planner.analyzers.saturation import _cold

_LOW, _HIGH, _SPREAD, _LEAST, _MOST = 0.15, 0.85, 0.30, 10, 200
_DEFAULT_B_S = 0.006

Sights = tuple[tuple[float, float], ...]  # (KV use, gap in seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """Supply and demand in tokens per second."""

    period_s: float = 15.0
    saturated: float = 0.85

    def start(self) -> Sights:
        """What was seen of the line."""
        return ()

    def advise(self, seen: Seen, memory: Sights) -> tuple[Advice, Sights]:
        """Replicas whose tokens per second cover what arrives; one less only where that still does."""
        ready = [r for r in seen.view.ready if r.reported and r.kv_capacity_tokens]
        sights = (*memory, *((r.kv_used, r.itl_s) for r in ready if _LOW <= r.kv_used <= _HIGH and r.itl_s > 0))[
            -_MOST:
        ]
        if not ready:
            return _cold(seen), sights
        line = self._line(sights, [(r.kv_used, r.itl_s) for r in ready if r.itl_s > 0])
        if line is None:
            return Advice(wanted=None, reason="no gap between tokens was seen yet"), sights
        o = 128.0 if math.isnan(seen.view.output_tokens) else seen.view.output_tokens
        i = 512.0 if math.isnan(seen.view.input_tokens) else seen.view.input_tokens
        held = max(i * (1.0 - ready[0].prefix_hits) + o / 2, 1.0)
        per_replica = self.saturated * ready[0].kv_capacity_tokens / held
        per_replica = min(per_replica, seen.home.max_batch) / max(line[0] * self.saturated + line[1], 1e-6)
        demand = seen.rate_rps * o
        needed = max(math.ceil(demand / per_replica), 1)
        said = f"{demand:.0f} tokens/s wanted, a replica gives {per_replica:.0f}"
        if needed < seen.replicas and seen.view.count("starting"):
            return Advice(wanted=dict(seen.current), reason=f"{said}; replicas start"), sights
        return Advice(wanted=seen.moved_to(needed), reason=said, binding="tokens per second"), sights

    @staticmethod
    def _line(sights: Sights, last: list[tuple[float, float]]) -> tuple[float, float] | None:
        xs = [x for x, _ in sights]
        if len(sights) >= _LEAST and max(xs) - min(xs) >= _SPREAD:
            fitted = linear_fit(sights)
            if fitted is not None and fitted[0] > 0 and fitted[1] > 0:
                return fitted
        if not last:
            return None
        k, gap_s = last[-1]
        return (max(gap_s - _DEFAULT_B_S, 0.0) / k if k > 0.01 else 0.0), min(_DEFAULT_B_S, gap_s)
