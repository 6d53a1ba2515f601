"""What a study is after: one number of a window to raise or to lower, and the promises that must hold meanwhile.

margin      how far a promise is kept (below 0) or broken (above 0), relative to its limit: seen / limit - 1
feasible    every margin is at most 0 and the trial did not fail

A trial that failed is a constraint broken, not a gap in the record: samplers ignore trials told as failures, and an
invalid corner is then tried again and again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from flyball.core.errors import InvalidInput
from flyball.core.metrics import MetricsWindow
from flyball.core.slo import Latency, SloBound

MARGIN_CAP = 10.0  # a promise missed elevenfold says no more than "hopeless", and surrogates need finite numbers

_RATES: Mapping[str, tuple[str, Callable[[MetricsWindow], float]]] = {
    "goodput": ("requests/s within the SLO", lambda w: w.goodput_rps),
    "throughput": ("requests/s completed", lambda w: w.throughput_rps),
    "output_tps": ("output tokens/s", lambda w: w.output_tps),
    "attainment": ("share of requests within the SLO", lambda w: w.attainment),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """One number of a window, and which way is better.

    >>> str(Objective.parse("goodput")), str(Objective.parse("p95_ttft", maximise=False))
    ('maximise goodput', 'minimise p95_ttft')
    """

    metric: str  # goodput, throughput, output_tps, attainment, or a latency statistic such as p95_ttft
    maximise: bool = True

    @classmethod
    def parse(cls, metric: str, *, maximise: bool = True) -> Objective:
        """Check the name of a metric."""
        objective = cls(metric=metric.strip().lower(), maximise=maximise)
        if objective.metric not in _RATES:
            try:
                objective._statistic()
            except InvalidInput:
                raise InvalidInput(
                    f"unknown objective {metric!r}; use {', '.join(_RATES)}, or a latency statistic such as p95_ttft, "
                    f"mean_e2e (of {', '.join(get_args(Latency))})"
                ) from None
        return objective

    def _statistic(self) -> SloBound:
        return SloBound.parse(f"{self.metric}<1s")

    @property
    def unit(self) -> str:
        """What the number counts."""
        return _RATES[self.metric][0] if self.metric in _RATES else "seconds"

    def value(self, window: MetricsWindow) -> float:
        """The number, in requests, tokens or requests per second, a share, or seconds."""
        return _RATES[self.metric][1](window) if self.metric in _RATES else window.statistic(self._statistic())

    @property
    def worst(self) -> float:
        """The value of a trial that measured nothing."""
        return 0.0 if self.maximise else math.inf

    def gain(self, value: float, reference: float) -> float:
        """How much better a value is than a reference, in the objective's unit."""
        return value - reference if self.maximise else reference - value

    def __str__(self) -> str:
        return f"{'maximise' if self.maximise else 'minimise'} {self.metric}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What one window was worth."""

    value: float  # in the objective's unit
    margins: Mapping[str, float]  # promise -> relative margin, at most MARGIN_CAP
    failure: str | None = None  # why nothing was measured
    also: tuple[float, ...] = ()  # values of the further objectives, in their units

    @property
    def feasible(self) -> bool:
        """Whether every promise was kept."""
        return self.failure is None and all(margin <= 0 for margin in self.margins.values())

    @property
    def slack(self) -> float:
        """Margin to the nearest limit, positive when all are kept; with no promises, 0."""
        return -max(self.margins.values(), default=0.0)

    @property
    def violation(self) -> float:
        """Sum of the broken margins: how far from feasible."""
        return sum(max(0.0, margin) for margin in self.margins.values()) + (MARGIN_CAP if self.failure else 0.0)


def score(
    window: MetricsWindow, objective: Objective, bounds: Sequence[SloBound], also: Sequence[Objective] = ()
) -> Score:
    """Judge a window; one in which no request completed counts as failed."""
    value = objective.value(window)
    others = tuple(other.value(window) for other in also)
    if not window.completed:
        kinds = ", ".join(f"{count} {kind}" for kind, count in window.errors.items()) or "no request was sent"
        return failed(f"no request completed ({kinds})", objective, bounds, also)
    for wanted, seen in zip((objective, *also), (value, *others), strict=True):
        if not math.isfinite(seen):
            return failed(f"{wanted.metric} could not be measured; too many requests failed", objective, bounds, also)
    margins = {str(b): min(window.margin(b), MARGIN_CAP) for b in bounds}
    return Score(value=value, margins=margins, also=others)


def failed(why: str, objective: Objective, bounds: Sequence[SloBound], also: Sequence[Objective] = ()) -> Score:
    """The score of a trial that measured nothing."""
    margins = {str(b): MARGIN_CAP for b in bounds}
    return Score(value=objective.worst, margins=margins, failure=why, also=tuple(other.worst for other in also))
