"""How long one trial is measured: until its mean is known well enough, or it cannot win any more.

After each window the trial ends

tight       when the interval of the objective's mean is no wider than ± `tolerance` of the mean
lost        when a promise is broken by more than `hopeless` of its limit, or the whole interval lies below the best
            mean of an earlier trial
at last     after `windows` windows
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flyball.core.errors import InvalidInput
from flyball.tuner.intervals import t_interval
from flyball.tuner.objective import Objective, Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """See the module."""

    windows: int = 1
    tolerance: float = 0.05
    hopeless: float = 0.5

    def __post_init__(self) -> None:
        if self.windows < 1 or not self.tolerance > 0 or not self.hopeless > 0:
            raise InvalidInput(f"{self}: give at least one window and limits above 0")

    def ends(self, seen: Sequence[Score], objective: Objective, best: float | None) -> bool:
        """Whether a trial with these windows is done; `best` is the value to beat, if there is one."""
        if len(seen) >= self.windows or seen[-1].failure is not None:
            return True
        if max(pooled(seen).margins.values(), default=0.0) > self.hopeless:
            return True
        interval = t_interval([objective.gain(score.value, 0.0) for score in seen])
        if (interval.high - interval.low) / 2 <= self.tolerance * abs(interval.mean):
            return True
        return best is not None and interval.high < objective.gain(best, 0.0)


def pooled(seen: Sequence[Score]) -> Score:
    """The mean of several windows of one configuration; of one, that window. A failed window fails the trial."""
    if len(seen) == 1:
        return seen[0]
    if failed := next((score for score in seen if score.failure is not None), None):
        return failed
    count = len(seen)
    return Score(
        value=math.fsum(score.value for score in seen) / count,
        margins={name: math.fsum(score.margins[name] for score in seen) / count for name in seen[0].margins},
        also=tuple(math.fsum(values) / count for values in zip(*(score.also for score in seen), strict=True)),
    )


def averaged(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each figure that every window has, and the number of windows."""
    names = [name for name in metrics[0] if all(name in window for window in metrics)]
    means = {name: math.fsum(window[name] for window in metrics) / len(metrics) for name in names}
    return means | ({"windows": float(len(metrics))} if len(metrics) > 1 else {})
