"""The study: ask -> check -> apply -> settle -> measure -> tell, durable after every trial.

A study is an Optuna study, so that optuna-dashboard opens it; what is Flyball's is kept in user attributes. A trial
that was running when the process died is marked failed on resume, which Optuna's samplers and ours take as never asked:
the same configuration is proposed again. A configuration that the engine would not serve is a finished trial with a
broken constraint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from flyball.core.errors import EngineFailed, InvalidInput, InvalidKnob, VersionConflict
from flyball.core.knobs import Configuration
from flyball.core.metrics import MetricsWindow
from flyball.core.ports import LoadProgress
from flyball.core.slo import Latency, SloBound
from flyball.tuner.measure import Rig
from flyball.tuner.objective import Objective, Score, failed, score
from flyball.tuner.proposers import Observation, Strategy, constraints_of, exhausted, propose
from flyball.tuner.space import Lattice
from flyball.tuner.trials import Kind, Trial

_PROBLEM, _TRIAL, _FOUND = "flyball:problem", "flyball:trial", "flyball:found"  # keys of user attributes


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is tuned for what; two runs of one study must agree on it."""

    lattice: Lattice
    objective: Objective
    bounds: tuple[SloBound, ...]
    workload: str  # the source of the workload: how to make it again
    service: str = ""  # what is tuned, in words

    def from_default(self, values: Configuration) -> float:
        """How far a configuration is from the default, from 0 to 1."""
        return self.lattice.distance(values, self.lattice.default)

    def describe(self) -> dict[str, Any]:
        """As plain data, for the study's file and for reports."""
        return {
            "objective": str(self.objective),
            "slo": [str(bound) for bound in self.bounds],
            "knobs": {axis.knob.name: list(axis.levels) for axis in self.lattice.axes},
            "fixed": dict(self.lattice.fixed),
            "default": self.lattice.default,
            "constraints": [str(constraint) for constraint in self.lattice.constraints],
            "workload": self.workload,
            "service": self.service,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What a study is doing, for whoever watches."""

    number: int  # of the trial, from 0
    values: Mapping[str, Any]
    finished: Trial | None = None  # None when the trial starts


Watch = Callable[[Progress], None]
StopReason = Literal["every trial is done", "every legal configuration was tried"]


@contextmanager
def opened(storage: str, name: str, problem: Problem, *, resume: bool = False) -> Iterator[optuna.Study]:
    """Open a study in a database (`sqlite:///file` or another SQLAlchemy URL), or begin it.

    Raises InvalidInput if it exists and is not to be resumed, or was made for another problem.
    """
    database = optuna.storages.RDBStorage(storage)
    try:
        study = optuna.create_study(
            storage=database,
            study_name=name,
            load_if_exists=True,
            direction="maximize" if problem.objective.maximise else "minimize",
        )
        known = study.user_attrs.get(_PROBLEM)
        if known is None:
            study.set_user_attr(_PROBLEM, problem.describe())
        elif not resume:
            raise InvalidInput(
                f"the study {name!r} exists already with {len(history(study))} finished trials; add --resume to go on "
                "with it, or give another --name"
            )
        else:
            _check_same(name, known, problem.describe())
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
        yield study
    finally:
        database.remove_session()
        database.engine.dispose()


def remember_found(study: optuna.Study, values: Configuration | None) -> None:
    """Note the configuration to put back when the study's run ends; None once that is done."""
    study.set_user_attr(_FOUND, None if values is None else dict(values))


def recall_found(study: optuna.Study) -> Configuration | None:
    """What a run that was killed had found and could not put back."""
    found: Configuration | None = study.user_attrs.get(_FOUND)
    return found


def latest(storage: str) -> str:
    """The name of the study that was begun last in a database."""
    database = optuna.storages.RDBStorage(storage)
    try:
        names = [study.study_name for study in database.get_all_studies()]
    finally:
        database.remove_session()
        database.engine.dispose()
    if not names:
        raise InvalidInput(f"{storage} holds no study to resume; leave --resume out to begin one")
    return names[-1]


def _check_same(name: str, known: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for key in ("objective", "slo", "knobs", "fixed", "default", "constraints", "workload"):
        if known[key] != wanted[key]:
            raise InvalidInput(
                f"the study {name!r} was made with {key} {known[key]}, not {wanted[key]}; give the same again, or "
                "another --name"
            )


def history(study: optuna.Study) -> list[Trial]:
    """Every finished trial, in order."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [_from_optuna(trial) for trial in trials]


def _from_optuna(trial: FrozenTrial) -> Trial:
    record = trial.user_attrs[_TRIAL]
    assert trial.value is not None
    verdict = Score(value=trial.value, margins=record["margins"], failure=record["failure"])
    return Trial(
        number=trial.number, kind=record["kind"], values=record["values"], score=verdict, metrics=record["metrics"]
    )


class _Proposer(BaseSampler):
    """Our proposals in Optuna's seam, so that a trial is stored with its parameters in one step."""

    def __init__(self, problem: Problem, strategy: Strategy) -> None:
        self._problem = problem
        self._strategy = strategy

    def infer_relative_search_space(
        self,
        study: optuna.Study,  # noqa: ARG002  # the signatures are Optuna's
        trial: FrozenTrial,  # noqa: ARG002
    ) -> dict[str, BaseDistribution]:
        return self._problem.lattice.distributions()

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        values = propose(self._problem.lattice, self._problem.objective, _seen(study, trial.number), self._strategy)
        return {name: values[name] for name in search_space}

    def sample_independent(  # called by Optuna for what sample_relative left out, which is nothing
        self,
        study: optuna.Study,  # noqa: ARG002
        trial: FrozenTrial,  # noqa: ARG002
        param_name: str,
        param_distribution: BaseDistribution,  # noqa: ARG002
    ) -> Any:  # noqa: ANN401
        raise AssertionError(f"{param_name} is not an axis of the study")


def _seen(study: optuna.Study, asking: int) -> list[Observation]:
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING))
    return [
        Observation(values=t.params, score=_from_optuna(t).score if t.state is TrialState.COMPLETE else None)
        for t in trials
        if t.number != asking and (t.params or t.state is TrialState.COMPLETE)
    ]


def run(
    study: optuna.Study,
    problem: Problem,
    rig: Rig,
    strategy: Strategy,
    *,
    trials: int,
    watch: Watch = lambda _: None,
    requests: LoadProgress | None = None,
) -> StopReason:
    """Go on until the study holds this many finished trials, the default configuration's first; then say why it ended.

    A configuration that fails is a finished trial. Raises EngineFailed when the engine is gone for good; whatever ends
    the study, only the running trial is lost.
    """
    study.sampler = _Proposer(problem, strategy)
    while (done := len(history(study))) < trials:
        if exhausted(problem.lattice, _seen(study, -1)):
            return "every legal configuration was tried"
        asked = study.ask(problem.lattice.distributions())
        values = {**asked.params, **problem.lattice.fixed}
        watch(Progress(number=asked.number, values=values))
        try:
            verdict, metrics = _try(problem, rig, values, requests)
        except BaseException:
            study.tell(asked, state=TrialState.FAIL)
            raise
        kind: Kind = "default" if done == 0 else "start" if done <= strategy.starts else "search"
        trial = Trial(number=asked.number, kind=kind, values=values, score=verdict, metrics=metrics)
        _record(study, asked, trial)
        watch(Progress(number=asked.number, values=values, finished=trial))
        if verdict.failure is not None:
            rig.target.configuration()  # raises when the engine is gone: no further trial could tell anything
    return "every trial is done"


def _try(
    problem: Problem, rig: Rig, values: Mapping[str, Any], requests: LoadProgress | None
) -> tuple[Score, dict[str, float]]:
    try:
        window = rig.measure(values, progress=requests)
    except VersionConflict:
        raise
    except (InvalidKnob, EngineFailed) as error:
        return failed(str(error), problem.objective, problem.bounds), {}
    return score(window, problem.objective, problem.bounds), summary(window)


def _record(study: optuna.Study, asked: optuna.Trial, trial: Trial) -> None:
    for name, margin in constraints_of(trial.score).items():
        asked.set_constraint(name, margin)
    asked.set_user_attr(_TRIAL, {
        "kind": trial.kind,
        "values": dict(trial.values),
        "margins": dict(trial.score.margins),
        "failure": trial.score.failure,
        "metrics": dict(trial.metrics),
    })  # fmt: skip
    study.tell(asked, trial.score.value)


def summary(window: MetricsWindow) -> dict[str, float]:
    """The figures of a window that people look at: rates, and latencies in seconds."""
    figures: dict[str, float] = {
        "goodput": window.goodput_rps,
        "throughput": window.throughput_rps,
        "output_tps": window.output_tps,
        "attainment": window.attainment,
        "duration_s": window.duration_s,
        "requests": len(window.traces),
        "failed": len(window.traces) - len(window.completed),
        "max_lag_s": max((t.lag_s for t in window.traces), default=0.0),
    }
    for metric in get_args(Latency):
        seen = window.summary(metric)
        figures |= {f"p50_{metric}": seen.p50, f"p95_{metric}": seen.p95, f"p99_{metric}": seen.p99}
    return {name: float(value) for name, value in figures.items() if math.isfinite(value)}


def storage_url(path_or_url: str) -> str:
    """A database URL as it stands, or the URL of an SQLite file.

    >>> storage_url("study.db")
    'sqlite:///study.db'
    """
    return path_or_url if "://" in path_or_url else f"sqlite:///{path_or_url}"
