"""One window of a live service as its own counters tell it: rates, mean lengths, latency histograms.

A window that clients measured (`core.metrics.MetricsWindow`) has every request; a live server only has counters, so a
percentile here is interpolated within its bucket.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flyball.core.slo import SloBound
from flyball.tuner.objective import MARGIN_CAP, Objective, Score


@dataclass(frozen=True, slots=True)
class Histogram:
    """Latencies in buckets: `counts[i]` values lie at or below `bounds[i]` and above the bound before it."""

    bounds: tuple[float, ...]  # seconds, rising; the last may be infinite
    counts: tuple[float, ...]
    total: float  # sum of all values, seconds

    @property
    def count(self) -> float:
        """How many values."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """Exact; NaN of nothing."""
        return self.total / self.count if self.count else math.nan

    def percentile(self, q: float) -> float:
        """Interpolated within its bucket; NaN of nothing, infinite beyond the last bound."""
        wanted, low = self.count * q / 100.0, 0.0
        if not wanted > 0:
            return math.nan
        for bound, count in zip(self.bounds, self.counts, strict=True):
            if wanted <= count:
                return bound if bound == math.inf else low + (bound - low) * wanted / count
            wanted -= count
            low = bound
        return self.bounds[-1]

    def share_within(self, limit_s: float) -> float:
        """Share of the values at or below a limit, interpolated; NaN of nothing."""
        seen, low = 0.0, 0.0
        for bound, count in zip(self.bounds, self.counts, strict=True):
            if bound > limit_s:
                part = 0.0 if bound == math.inf else (limit_s - low) / (bound - low)
                return (seen + count * part) / self.count if self.count else math.nan
            seen, low = seen + count, bound
        return 1.0 if self.count else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a service did between two looks at its counters."""

    start_s: float  # monotonic
    end_s: float
    generation: str  # in force at both looks; empty if it changed between them
    finished: float  # answers that ended as they should
    failed: float
    output_tokens: float
    input_tokens: float
    latencies: Mapping[str, Histogram] = field(default_factory=dict)  # ttft, itl, e2e

    @property
    def duration_s(self) -> float:
        """Seconds between the looks."""
        return max(self.end_s - self.start_s, 1e-9)

    @property
    def context(self) -> tuple[float, float, float]:
        """Requests a second, and mean tokens in and out of one."""
        count = max(self.finished + self.failed, 1.0)
        return (self.finished + self.failed) / self.duration_s, self.input_tokens / count, self.output_tokens / count

    def statistic(self, bound: SloBound) -> float:
        """The statistic that a bound speaks of, in seconds; NaN if nothing was seen."""
        seen = self.latencies.get(bound.metric)
        if seen is None:
            return math.nan
        return seen.mean if bound.percentile is None else seen.percentile(bound.percentile)

    def attainment(self, bounds: Sequence[SloBound]) -> float:
        """Least share of values within a bound's limit, failed requests counted as not within."""
        shares = [self.latencies[b.metric].share_within(b.limit_s) for b in bounds if b.metric in self.latencies]
        answered = self.finished / max(self.finished + self.failed, 1.0)
        return min([s for s in shares if not math.isnan(s)], default=1.0) * answered


def judge(reading: Reading, objective: Objective, bounds: Sequence[SloBound]) -> Score:
    """The score of a reading; one in which nothing finished counts as failed."""
    if not reading.finished > 0:
        return Score(value=math.nan, margins={str(b): MARGIN_CAP for b in bounds}, failure="no request was finished")
    throughput = reading.finished / reading.duration_s
    rates = {
        "throughput": throughput,
        "output_tps": reading.output_tokens / reading.duration_s,
        "attainment": reading.attainment(bounds),
        "goodput": throughput * reading.attainment(bounds),
    }
    value = rates.get(objective.metric)
    if value is None:
        value = reading.statistic(SloBound.parse(f"{objective.metric}<1s"))
    margins = {}
    for bound in bounds:
        seen = reading.statistic(bound)
        margins[str(bound)] = MARGIN_CAP if math.isnan(seen) else min(seen / bound.limit_s - 1, MARGIN_CAP)
    return Score(value=value, margins=margins)
