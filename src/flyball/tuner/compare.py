"""Is the best configuration really better than the default? Both measured again, alternately, before either is named.

A study's best value is partly luck: the largest of many noisy numbers. So the finalists are measured once more and the
better one on average of both windows is the challenger; then challenger and default are measured in pairs, the order
swapped from pair to pair (A B B A ...) so that a drift of the machine falls on both alike. The windows of the search
and of that choice do not enter the interval.

d_i         gain of the challenger over the default in pair i, in the objective's unit, i = 1..n
interval    mean(d) ± t(n-1, (1 + confidence) / 2) · s / sqrt(n), Student's t on the paired differences, s their
            standard deviation; relative to the mean of the default's windows
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from flyball.core.errors import InvalidInput
from flyball.core.knobs import Configuration
from flyball.core.ports import LoadProgress
from flyball.core.workload import Workload
from flyball.tuner.intervals import CONFIDENCE, Interval, t_interval
from flyball.tuner.measure import Rig
from flyball.tuner.objective import Objective, Score, score
from flyball.tuner.study import Problem, summary
from flyball.tuner.trials import Trial, best, closest, finalists


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """One window of the comparison, judged."""

    score: Score
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Default and challenger under the same traffic, one after the other."""

    default: Window
    challenger: Window


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The challenger against the default."""

    challenger: Trial
    default: Configuration
    pairs: tuple[Pair, ...]
    objective: Objective

    @property
    def gain(self) -> Interval:
        """Gain of the challenger in the objective's unit."""
        gain = self.objective.gain
        return t_interval([gain(p.challenger.score.value, p.default.score.value) for p in self.pairs])

    @property
    def relative_gain(self) -> Interval | None:
        """Gain as a share of the default's mean; None where that is 0 or was not measured."""
        reference = self.mean("default")
        return self.gain.scaled(1 / reference) if reference > 0 and math.isfinite(reference) else None

    def mean(self, side: Literal["default", "challenger"]) -> float:
        """Mean value of one side, in the objective's unit."""
        return t_interval([getattr(p, side).score.value for p in self.pairs]).mean

    def kept(self, side: Literal["default", "challenger"]) -> int:
        """In how many windows one side kept every promise."""
        return sum(getattr(p, side).score.feasible for p in self.pairs)

    def margins(self, side: Literal["default", "challenger"]) -> dict[str, float]:
        """Mean margin of each promise over the windows of one side."""
        scores: list[Score] = [getattr(p, side).score for p in self.pairs]
        return {name: math.fsum(s.margins[name] for s in scores) / len(scores) for name in scores[0].margins}


Outcome = Literal["gain", "keeps the SLO", "no gain", "not confirmed", "not compared", "infeasible"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the study found, in a word and in a sentence, and the configuration to run."""

    outcome: Outcome
    sentence: str
    recommended: Configuration | None  # None: nothing better than what runs was found


CompareWatch = Callable[[str, int, int], None]  # what is measured, windows done, windows in all


def compare(
    problem: Problem,
    rig: Rig,
    trials: Sequence[Trial],
    workloads: Sequence[Workload],
    *,
    candidates: int = 2,
    watch: CompareWatch = lambda *_: None,
    requests: LoadProgress | None = None,
) -> Comparison | None:
    """Measure default and challenger again, one pair a workload; None if the search gave nobody to challenge with.

    The finalists are re-measured under the first workload.
    """
    if len(workloads) < 2:
        raise InvalidInput(f"an interval needs at least 2 pairs of windows, not {len(workloads)}; raise --repeats")
    default = problem.lattice.default
    ranked = finalists(trials, problem.objective, candidates, problem.from_default)
    if not ranked or ranked[0].kind == "default":
        return None
    ranked = [trial for trial in ranked if trial.kind != "default"]
    total = 2 * len(workloads) + (len(ranked) if len(ranked) > 1 else 0)
    done = 0

    def window(label: str, values: Configuration, workload: Workload) -> Window:
        nonlocal done
        watch(label, done, total)
        seen = rig.measure(values, workload, requests)
        done += 1
        watch(label, done, total)
        return Window(score=score(seen, problem.objective, problem.bounds), metrics=summary(seen))

    challenger = ranked[0]
    if len(ranked) > 1:
        again = [window(f"finalist {t.number}", t.values, workloads[0]).score for t in ranked]
        challenger = _choose(ranked, again, problem.objective)
    pairs = []
    for i, workload in enumerate(workloads):
        sides = [("default", default), ("challenger", challenger.values)]
        seen = {name: window(name, values, workload) for name, values in (sides if i % 2 == 0 else sides[::-1])}
        pairs.append(Pair(**seen))
    return Comparison(challenger=challenger, default=default, pairs=tuple(pairs), objective=problem.objective)


def _choose(ranked: Sequence[Trial], again: Sequence[Score], objective: Objective) -> Trial:
    """The finalist with the best mean of both windows among those that kept the promises twice, else the first."""
    steady = [(t, s) for t, s in zip(ranked, again, strict=True) if s.feasible]
    if not steady:
        return ranked[0]
    return max(steady, key=lambda ts: objective.gain((ts[0].score.value + ts[1].value) / 2, 0.0))[0]


def verdict(trials: Sequence[Trial], problem: Problem, comparison: Comparison | None) -> Verdict:
    """Say plainly what came out."""
    if comparison is not None:
        return _compared(comparison)
    top = best(trials, problem.objective, problem.from_default)
    if top is None:
        return Verdict(outcome="infeasible", sentence=_infeasible(trials), recommended=None)
    if top.kind == "default":
        sentence = f"no gain: none of {len(trials)} configurations beat the default, which keeps the SLO"
        return Verdict(outcome="no gain", sentence=sentence, recommended=None)
    default = next(t for t in trials if t.kind == "default")
    sentence = (
        f"best of the search: {problem.objective.metric} {top.score.value:.4g}, default {default.score.value:.4g}; "
        "not measured again, so part of the difference may be luck"
    )
    return Verdict(outcome="not compared", sentence=sentence, recommended=top.values)


def _infeasible(trials: Sequence[Trial]) -> str:
    near = closest(trials)
    if near is None:
        return f"infeasible: none of {len(trials)} configurations could be measured"
    knobs = ", ".join(f"{k}={v}" for k, v in near.values.items())
    broken = ", ".join(f"{name} by {margin:.0%}" for name, margin in near.score.margins.items() if margin > 0)
    return (
        f"infeasible: none of {len(trials)} configurations keeps the SLO; the closest is {knobs}, which breaks "
        f"{broken}: lower the load, relax the promise or widen the knobs"
    )


def _compared(c: Comparison) -> Verdict:
    metric, count = c.objective.metric, len(c.pairs)
    gain = f"{describe_gain(c)} ({CONFIDENCE:.0%} interval, t on {count} pairs)"
    kept = f"the SLO is kept in {c.kept('challenger')} of {count} windows, by default in {c.kept('default')}"
    slo = f"; {kept}" if c.pairs[0].default.score.margins else ""
    if not _holds(c, "challenger"):
        return Verdict(
            outcome="not confirmed",
            sentence=f"no gain: the best configuration broke the SLO when measured again{slo}",
            recommended=None,
        )
    if c.gain.low > 0:
        return Verdict(outcome="gain", sentence=f"{metric} gain {gain}{slo}", recommended=c.challenger.values)
    if not _holds(c, "default"):
        return Verdict(
            outcome="keeps the SLO",
            sentence=f"{kept}; {metric} changes by {gain}",
            recommended=c.challenger.values,
        )
    sentence = f"no gain: {metric} changes by {gain}, which noise alone may give{slo}"
    return Verdict(outcome="no gain", sentence=sentence, recommended=None)


def _holds(c: Comparison, side: Literal["default", "challenger"]) -> bool:
    """Whether a side keeps the promises: on average over its windows, and in most of them."""
    average = all(margin <= 0 for margin in c.margins(side).values())
    return average and 2 * c.kept(side) > len(c.pairs)


def describe_gain(c: Comparison) -> str:
    """The gain as people read it: `12.3 % [8.0, 16.6]`, or in the objective's unit where the default measures 0."""
    relative = c.relative_gain
    if relative is None:
        return f"{c.gain.mean:+.3g} {c.objective.unit} [{c.gain.low:.3g}, {c.gain.high:.3g}]"
    shown = relative.scaled(100)
    return f"{shown.mean:+.1f} % [{shown.low:+.1f}, {shown.high:+.1f}]"
