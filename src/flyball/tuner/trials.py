"""Finished trials, and which of them is best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from flyball.core.knobs import Configuration
from flyball.tuner.objective import Objective, Score

Kind = Literal["default", "start", "search"]

VALUE_TIE = 0.01  # values closer than this share are one value: a window of some seconds cannot tell them apart
SLACK_TIE = 0.05  # so are slacks, which rest on a tail percentile


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One configuration and what its window was worth."""

    number: int
    kind: Kind
    values: Configuration
    score: Score
    metrics: Mapping[str, float] = field(default_factory=dict)  # for people: rates and latencies of the window


def best(
    trials: Iterable[Trial], objective: Objective, distance: Callable[[Configuration], float] = lambda _: 0.0
) -> Trial | None:
    """The best trial that kept every promise, or None.

    Of values too close to tell apart the one with more slack wins, then the one nearer to the default (`distance`),
    then the earlier: a saturated objective has many winners, and the safest of them is wanted.
    """
    feasible = [t for t in trials if t.score.feasible]
    if not feasible:
        return None
    top = max(objective.gain(t.score.value, 0.0) for t in feasible)
    tied = [t for t in feasible if top - objective.gain(t.score.value, 0.0) <= VALUE_TIE * abs(top)]
    slack = max(t.score.slack for t in tied)
    tied = [t for t in tied if slack - t.score.slack <= SLACK_TIE]
    return min(tied, key=lambda t: (distance(t.values), t.number))


def finalists(
    trials: Sequence[Trial], objective: Objective, count: int, distance: Callable[[Configuration], float]
) -> list[Trial]:
    """The best trials in order, at most `count`."""
    chosen: list[Trial] = []
    while len(chosen) < count:
        found = best((t for t in trials if t not in chosen), objective, distance)
        if found is None:
            break
        chosen.append(found)
    return chosen


def closest(trials: Iterable[Trial]) -> Trial | None:
    """The trial nearest to keeping every promise: the least sum of broken margins; None if nothing was measured."""
    measured = [t for t in trials if t.score.failure is None]
    return min(measured, key=lambda t: (t.score.violation, t.number), default=None)
