"""What was seen: the trace of one request, and the summary of a window of them.

Definitions (as in aiperf and vLLM's benchmarks), all from the scheduled send time, so that a client which lags does
not hide a server's queue (no coordinated omission):

TTFT = first token - scheduled;  E2E = last token - scheduled;  TPOT = (last - first) / (output tokens - 1);
ITL  = gap between two neighbouring tokens;  goodput = requests that met their Slo, per second.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flyball.core.errors import InvalidInput
from flyball.core.slo import Latency, Slo, SloBound


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTrace:
    """The life of one request as its client saw it; times are seconds from the start of the window."""

    scheduled_s: float
    sent_s: float
    input_tokens: int
    output_tokens: int = 0
    token_times_s: tuple[float, ...] = ()  # when each token arrived; empty for a request that failed at once
    error: str | None = None  # kind of failure: timeout, refused, connection, http_500, ...

    @property
    def lag_s(self) -> float:
        """How late the client itself was."""
        return self.sent_s - self.scheduled_s

    @property
    def ttft_s(self) -> float | None:
        """Scheduled send to first token."""
        return self.token_times_s[0] - self.scheduled_s if self.token_times_s else None

    @property
    def e2e_s(self) -> float | None:
        """Scheduled send to last token."""
        return self.token_times_s[-1] - self.scheduled_s if self.token_times_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean gap between tokens after the first; None with fewer than two tokens."""
        if self.output_tokens < 2 or len(self.token_times_s) < 2:
            return None
        return (self.token_times_s[-1] - self.token_times_s[0]) / (self.output_tokens - 1)

    @property
    def itl_s(self) -> tuple[float, ...]:
        """Every gap between neighbouring tokens."""
        return tuple(b - a for a, b in zip(self.token_times_s, self.token_times_s[1:], strict=False))

    def meets(self, slo: Slo) -> bool:
        """Whether this request saw what was promised; one that failed did not."""
        if self.error is not None or not self.token_times_s:
            return False
        pairs = (
            (slo.ttft_s, self.ttft_s),
            (slo.tpot_s, self.tpot_s),
            (slo.e2e_s, self.e2e_s),
            (slo.itl_s, percentile(self.itl_s, slo.itl_percentile) if len(self.token_times_s) > 1 else None),
        )
        return all(seen is None or limit is None or seen <= limit for limit, seen in pairs)


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile by linear interpolation (numpy's default); NaN of nothing, and infinities stay infinite.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 50)
    2.5
    >>> percentile([1.0, 2.0, math.inf], 75)
    inf
    """
    if not values:
        return math.nan
    ordered = sorted(values)
    position = (len(ordered) - 1) * q / 100
    low, high = ordered[math.floor(position)], ordered[math.ceil(position)]
    return low if low == high else low + (high - low) * (position % 1)


@dataclass(frozen=True, slots=True)
class Summary:
    """Mean and percentiles of one latency, in seconds; `count` values were seen."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Summarise; of nothing, all NaN."""
        if not values:
            return cls(0, math.nan, math.nan, math.nan, math.nan, math.nan, math.nan)
        p50, p90, p95, p99 = (percentile(values, q) for q in (50, 90, 95, 99))
        return cls(len(values), sum(values) / len(values), p50, p90, p95, p99, max(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsWindow:
    """What one service did under one configuration for a while."""

    duration_s: float  # first scheduled send to last token, or to last send if that came later
    generation: str  # hash or version of the configuration in force; a window across a change is discarded
    traces: tuple[RequestTrace, ...] = field(repr=False)
    slo: Slo = field(default_factory=Slo)

    def __post_init__(self) -> None:
        if not self.duration_s > 0:
            raise InvalidInput(f"a window of {self.duration_s} s measures nothing; it must last longer than 0 s")

    @property
    def completed(self) -> tuple[RequestTrace, ...]:
        """Requests that ended as they should."""
        return tuple(t for t in self.traces if t.error is None)

    def values(self, metric: Latency) -> list[float]:
        """All values of one latency over completed requests (every gap, for ITL)."""
        if metric == "itl":
            return [gap for t in self.completed for gap in t.itl_s]
        return [v for t in self.completed if (v := getattr(t, f"{metric}_s")) is not None]

    def summary(self, metric: Latency) -> Summary:
        """Mean and percentiles of one latency."""
        return Summary.of(self.values(metric))

    def statistic(self, bound: SloBound) -> float:
        """The statistic that a bound speaks of, in seconds; failed requests count as infinitely late.

        For ITL a failed request weighs as many gaps as a completed one has on average, so that failures cannot hide.
        """
        done = len(self.completed)
        failed = len(self.traces) - done
        values = self.values(bound.metric)
        weight = math.ceil(len(values) / done) if bound.metric == "itl" and values else 1
        values += [math.inf] * (failed * weight)
        if not values:
            return math.nan
        if bound.percentile is not None:
            return percentile(values, bound.percentile)
        return math.inf if failed else sum(values) / len(values)

    def margin(self, bound: SloBound) -> float:
        """How far a bound is kept (negative) or broken (positive), relative to its limit; infinite if unmeasurable."""
        seen = self.statistic(bound)
        return math.inf if math.isnan(seen) else seen / bound.limit_s - 1

    @property
    def good(self) -> int:
        """Requests that saw what was promised."""
        return sum(t.meets(self.slo) for t in self.traces)

    @property
    def attainment(self) -> float:
        """Share of all requests, failed ones included, that saw what was promised."""
        return self.good / len(self.traces) if self.traces else math.nan

    @property
    def goodput_rps(self) -> float:
        """Requests per second that saw what was promised."""
        return self.good / self.duration_s

    @property
    def throughput_rps(self) -> float:
        """Completed requests per second."""
        return len(self.completed) / self.duration_s

    @property
    def output_tps(self) -> float:
        """Output tokens of completed requests per second."""
        return sum(t.output_tokens for t in self.completed) / self.duration_s

    @property
    def errors(self) -> Mapping[str, int]:
        """Failed requests by kind."""
        return dict(Counter(t.error for t in self.traces if t.error is not None))
