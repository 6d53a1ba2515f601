"""The report's sections on all trials together: front, parallel coordinates, importance, what is invalid; and CSV."""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import optuna
from optuna.exceptions import ExperimentalWarning

from flyball.tuner import charts_trials
from flyball.tuner.charts import Mark
from flyball.tuner.charts_trials import Line
from flyball.tuner.objective import Objective
from flyball.tuner.space import Axis
from flyball.tuner.study import Problem
from flyball.tuner.trials import Trial

ENOUGH = 6  # measured trials from which an importance is more than a guess


def pareto(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[Trial]:
    """Trials that kept every promise and that no other such trial beats in every objective."""
    kept = [t for t in trials if t.score.feasible]
    worth = {t.number: _gains(t, objectives) for t in kept}
    return [t for t in kept if not _beaten(worth[t.number], worth.values())]


def _beaten(own: tuple[float, ...], others: Iterable[tuple[float, ...]]) -> bool:
    return any(w != own and all(a >= b for a, b in zip(w, own, strict=True)) for w in others)


def _gains(trial: Trial, objectives: Sequence[Objective]) -> tuple[float, ...]:
    values = (trial.score.value, *trial.score.also)
    return tuple(o.gain(v, 0.0) for o, v in zip(objectives, values, strict=True))


def importances(trials: Sequence[Trial], problem: Problem) -> dict[str, float]:
    """Share of each knob in the spread of the objective over the space (fANOVA; Hutter, Hoos, Leyton-Brown, 2014).

    Of the trials that measured something; empty with too few of them, or where all measured the same.
    """
    axes = problem.lattice.axes
    measured = [t for t in trials if t.score.failure is None and problem.lattice.point(t.values) is not None]
    if len(measured) < ENOUGH or len({t.score.value for t in measured}) < 2 or not axes:
        return {}
    study = optuna.create_study(direction="maximize" if problem.objective.maximise else "minimize")
    space: dict[str, optuna.distributions.BaseDistribution] = {
        axis.knob.name: optuna.distributions.IntDistribution(0, len(axis.levels) - 1) for axis in axes
    }
    for trial in measured:
        params = dict(zip(space, problem.lattice.point(trial.values) or (), strict=True))
        study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=trial.score.value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=32, seed=0)
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def front_section(trials: Sequence[Trial], problem: Problem, titles: Mapping[int, str]) -> str:
    """The objective against the second one, or against the slack of the promises where there is one objective."""
    measured = [t for t in trials if t.score.failure is None]
    if problem.also:
        label = problem.also[0].metric
        across = {t.number: t.score.also[0] for t in measured}
        best = pareto(trials, problem.objectives)
        text = "Each objective against the other; no trial that kept every promise is better in both than those joined."
    elif problem.bounds:
        label = "slack of the tightest promise"
        across = {t.number: max(t.score.slack, -1.0) for t in measured}  # twice the limit is as bad as more
        both = {t.number: (problem.objective.gain(t.score.value, 0.0), t.score.slack) for t in measured}
        best = [t for t in measured if not _beaten(both[t.number], both.values())]
        text = "What more safety costs: right of 0 every promise is kept; no trial is better in both than those joined."
    else:
        return ""
    if len(measured) < 2:
        return ""
    marks = {
        t.number: Mark(x=across[t.number], y=t.score.value, feasible=t.score.feasible, title=titles[t.number])
        for t in measured
    }
    picture = charts_trials.front(
        list(marks.values()), [marks[t.number] for t in best], label, problem.objective.metric
    )
    return f"<section><h2>Pareto front</h2><p>{text}</p>{picture}</section>"


def coordinates_section(trials: Sequence[Trial], problem: Problem, titles: Mapping[int, str]) -> str:
    """Every measured trial over all knobs."""
    axes = problem.lattice.axes
    measured = [t for t in trials if t.score.failure is None and problem.lattice.point(t.values) is not None]
    if len(axes) < 2 or not measured:
        return ""
    worth = [problem.objective.gain(t.score.value, 0.0) for t in measured]
    low, high = min(worth), max(worth)
    lines = [
        Line(
            heights=tuple(axis.levels.index(t.values[axis.knob.name]) / (len(axis.levels) - 1) for axis in axes),
            worth=(w - low) / (high - low) if high > low else 1.0, feasible=t.score.feasible, title=titles[t.number],
        )
        for t, w in zip(measured, worth, strict=True)
    ]  # fmt: skip
    ends = [(_name(axis.levels[0]), _name(axis.levels[-1])) for axis in axes]
    picture = charts_trials.coordinates([axis.knob.name for axis in axes], ends, lines)
    return (
        "<section><h2>Parallel coordinates</h2><p>A line a trial; the stronger, the better its "
        f"{escape(problem.objective.metric)}; dashed where it broke a promise.</p>{picture}</section>"
    )


def importance_section(shares: Mapping[str, float], metric: str) -> str:
    """Which knobs mattered."""
    if not shares:
        return ""
    picture = charts_trials.bars(sorted(shares.items(), key=lambda item: -item[1]), f"share in the spread of {metric}")
    return (
        "<section><h2>Which knobs mattered</h2><p>fANOVA on a random forest over the measured trials; with few of "
        f"them a hint, no more.</p>{picture}</section>"
    )


def invalid_section(
    trials: Sequence[Trial], problem: Problem, shares: Mapping[str, float], titles: Mapping[int, str]
) -> str:
    """Where trials failed or broke a promise, over the two knobs that matter most, and why."""
    axes = sorted(problem.lattice.axes, key=lambda axis: -shares.get(axis.knob.name, 0.0))[:2]
    invalid = [t for t in trials if not t.score.feasible]
    if len(axes) < 2 or not invalid:
        return ""
    marks = [
        Mark(x=axes[0].rank(t.values[axes[0].knob.name]), y=axes[1].rank(t.values[axes[1].knob.name]),
             feasible=t.score.feasible, title=titles[t.number])
        for t in trials if all(t.values[axis.knob.name] in axis.levels for axis in axes)
    ]  # fmt: skip
    failed = sum(t.score.failure is not None for t in invalid)
    picture = charts_trials.plane(marks, _levels(axes[0]), _levels(axes[1]))
    return (
        f"<section><h2>Invalid trials</h2><p>{failed} of {len(trials)} trials failed, {len(invalid) - failed} more "
        f"broke a promise; where, over the two knobs that matter most.</p>{picture}</section>"
    )


def _levels(axis: Axis) -> tuple[str, list[str]]:
    return axis.knob.name, [_name(level) for level in axis.levels]


def _name(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def as_csv(trials: Sequence[Trial], problem: Problem) -> str:
    """A line a trial: number, kind, every knob, objectives, feasibility, margins, metrics, the cause of a failure."""
    knobs = list(problem.lattice.default)
    metrics = sorted({name for t in trials for name in t.metrics})
    margins = [f"margin {bound}" for bound in problem.bounds]
    objectives = [f"objective {objective.metric}" for objective in problem.objectives]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["number", "kind", *knobs, *objectives, "feasible", *margins, *metrics, "failure"])
    for t in trials:
        served = t.score.failure is None
        values = [v if served and math.isfinite(v) else "" for v in (t.score.value, *t.score.also)]
        broken = [t.score.margins[str(bound)] if served else "" for bound in problem.bounds]
        writer.writerow([t.number, t.kind, *(t.values[k] for k in knobs), *values, t.score.feasible, *broken,
                         *(t.metrics.get(m, "") for m in metrics), t.score.failure or ""])  # fmt: skip
    return out.getvalue()
