"""The study: ask -> check -> apply -> settle -> measure -> tell, durable after every trial.

A study is an Optuna study, so that optuna-dashboard opens it; what is Flyball's is kept in user attributes. A trial
that was running when the process died is marked failed on resume, which Optuna's samplers and ours take as never asked:
the same configuration is proposed again. A configuration that the engine would not serve is a finished trial with a
broken constraint.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from flyball.core.errors import EngineFailed, InvalidInput, InvalidKnob, VersionConflict
from flyball.core.knobs import Configuration
from flyball.core.metrics import MetricsWindow
from flyball.core.ports import LoadProgress
from flyball.core.slo import Latency, SloBound
from flyball.tuner import owners, warm
from flyball.tuner.expectation import Expectation, expectation
from flyball.tuner.measure import Rig
from flyball.tuner.objective import Objective, Score, failed, score
from flyball.tuner.patience import Patience, averaged, pooled
from flyball.tuner.proposers import Observation, Strategy, constraints_of, directions, exhausted, propose
from flyball.tuner.space import Lattice
from flyball.tuner.trials import Kind, Trial, best

_PROBLEM, _TRIAL, _FOUND = "flyball:problem", "flyball:trial", "flyball:found"  # keys of user attributes


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is tuned for what; two runs of one study must agree on it."""

    lattice: Lattice
    objective: Objective
    bounds: tuple[SloBound, ...]
    workload: str  # the source of the workload: how to make it again
    service: str = ""  # what is tuned, in words
    also: tuple[Objective, ...] = ()  # further objectives: the study then shows what each costs the other

    def from_default(self, values: Configuration) -> float:
        """How far a configuration is from the default, from 0 to 1."""
        return self.lattice.distance(values, self.lattice.default)

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """All of them, the one that decides which trial is best first."""
        return (self.objective, *self.also)

    def describe(self) -> dict[str, Any]:
        """As plain data, for the study's file and for reports."""
        return {
            "objective": ", ".join(map(str, self.objectives)),
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
def opened(
    storage: str, name: str, problem: Problem, *, resume: bool = False, alone: bool = True
) -> Iterator[optuna.Study]:
    """Open a study in a database (`sqlite:///file` or another SQLAlchemy URL), or begin it.

    Trials that were running are marked as lost: all of them if this process is `alone` on the study, else those whose
    process is gone. Raises InvalidInput if the study exists and is not to be resumed, was made for another problem, or
    cannot be opened.
    """
    database = _database(storage)
    try:
        study = optuna.create_study(
            storage=database,
            study_name=name,
            load_if_exists=True,
            directions=directions(problem.objectives),
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
        owners.end_lost(study, alone=alone)
        yield study
    except (StorageInternalError, DBAPIError) as error:
        raise InvalidInput(_unwritable(storage, error)) from None
    finally:
        database.remove_session()
        database.engine.dispose()


def _database(storage: str) -> optuna.storages.RDBStorage:
    """The storage; one sentence where it cannot be reached."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats: pinned with Optuna's major version
            return optuna.storages.RDBStorage(storage, heartbeat_interval=owners.BEAT_S, grace_period=owners.SILENCE_S)
    except DBAPIError as error:
        raise InvalidInput(_unwritable(storage, error)) from None
    except (ImportError, ArgumentError) as error:
        raise InvalidInput(
            f"the study's address {storage!r} cannot be used: {error}; give a file, or a URL such as "
            "postgresql://user@host/name with its driver (pip install 'flyball[postgres]')"
        ) from None


def _unwritable(storage: str, error: Exception) -> str:
    cause = error.__cause__ or error  # Optuna wraps what the database says
    why = str(cause.orig if isinstance(cause, DBAPIError) else cause).strip().partition("\n")[0]
    shown = make_url(storage).render_as_string(hide_password=True)
    return f"the study {shown} cannot be read or written: {why}; see to its disk or server, then go on with --resume"


def remember_found(study: optuna.Study, values: Configuration | None) -> None:
    """Note the configuration to put back when the study's run ends; None once that is done."""
    study.set_user_attr(_FOUND, None if values is None else dict(values))


def recall_found(study: optuna.Study) -> Configuration | None:
    """What a run that was killed had found and could not put back."""
    found: Configuration | None = study.user_attrs.get(_FOUND)
    return found


def latest(storage: str) -> str:
    """The name of the study that was begun last in a database."""
    database = _database(storage)
    try:
        names = [study.study_name for study in database.get_all_studies()]
    finally:
        database.remove_session()
        database.engine.dispose()
    if not names:
        raise InvalidInput(f"{storage} holds no study to resume; leave --resume out to begin one")
    return names[-1]


def earlier(storage: str, name: str) -> warm.Earlier:
    """A study to start warm from. Raises InvalidInput if there is none, or it has no finished trial."""
    database = _database(storage)
    try:
        known = {study.study_name for study in database.get_all_studies()}
        study = optuna.load_study(study_name=name, storage=database) if name in known else None
        trials = history(study) if study is not None and _PROBLEM in study.user_attrs else []
        if study is None or not trials:
            raise InvalidInput(
                f"{storage} holds no finished trial of a study {name!r}; it knows {', '.join(sorted(known)) or 'none'}"
            )
        return warm.Earlier(name=name, storage=storage, problem=study.user_attrs[_PROBLEM], trials=trials)
    finally:
        database.remove_session()
        database.engine.dispose()


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
    assert trial.values is not None
    value, *also = trial.values
    verdict = Score(value=value, margins=record["margins"], failure=record["failure"], also=tuple(also))
    return Trial(
        number=trial.number, kind=record["kind"], values=record["values"], score=verdict, metrics=record["metrics"]
    )


class _Proposer(BaseSampler):
    """Our proposals in Optuna's seam, so that a trial is stored with its parameters in one step."""

    def __init__(self, problem: Problem, strategy: Strategy) -> None:
        self._problem = problem
        self._strategy = strategy
        self._known: tuple[tuple[int, ...], Expectation | None] = (), None  # of which trials the last law was

    def infer_relative_search_space(
        self,
        study: optuna.Study,  # noqa: ARG002  # the signatures are Optuna's
        trial: FrozenTrial,  # noqa: ARG002
    ) -> dict[str, BaseDistribution]:
        return self._problem.lattice.distributions()

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        problem = self._problem
        seen = [*warm.observations(study), *_seen(study, trial.number)]
        strategy = self._informed(study) if self._strategy.law else self._strategy
        values = propose(problem.lattice, problem.objective, seen, strategy, problem.also)
        return {name: values[name] for name in search_space}

    def _informed(self, study: optuna.Study) -> Strategy:
        """The strategy with what the law expects, unless another prediction was given; finished trials decide it."""
        trials = history(study)
        if self._strategy.prior is not None or len(trials) <= self._strategy.starts:
            return self._strategy
        key = tuple(t.number for t in trials)
        if self._known[0] != key:
            problem, figures = self._problem, [(t.values, t.metrics) for t in trials if t.score.failure is None]
            self._known = key, expectation(problem.lattice, problem.objective, problem.bounds, figures)
        expected = self._known[1]
        if expected is None:
            return self._strategy
        return replace(self._strategy, prior=expected.objective, promised=expected.margins)

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
    rig: Rig | Sequence[Rig],
    strategy: Strategy,
    *,
    trials: int,
    patience: Patience | None = None,
    watch: Watch = lambda _: None,
    requests: LoadProgress | None = None,
) -> StopReason:
    """Go on until the study holds this many finished trials, the default configuration's first; then say why it ended.

    Several rigs measure as many trials at once, each with a target of its own; several processes may run one study, and
    each counts what the others are trying. A configuration that fails is a finished trial. Raises EngineFailed when an
    engine is gone for good; whatever ends the study, only running trials are lost.
    """
    study.sampler = _Proposer(problem, strategy)
    rigs = [rig] if isinstance(rig, Rig) else list(rig)
    desk = _Desk(study=study, problem=problem, strategy=strategy, patience=patience or Patience(), watch=watch)
    with owners.alive(study, desk.ids):
        if len(rigs) == 1:
            return _in_turn(desk, rigs[0], trials, requests)
        return _at_once(desk, rigs, trials, requests)


def _in_turn(desk: _Desk, rig: Rig, trials: int, requests: LoadProgress | None) -> StopReason:
    while desk.wanted(trials) > 0:
        if desk.exhausted():
            return "every legal configuration was tried"
        begun = desk.begin()
        try:
            result = desk.measure(rig, begun, requests)
        except BaseException:
            desk.drop(begun)
            raise
        desk.finish(begun, result, rig)
    return "every trial is done"


def _at_once(desk: _Desk, rigs: Sequence[Rig], trials: int, requests: LoadProgress | None) -> StopReason:
    idle = list(rigs)
    running: dict[Future[_Result], tuple[_Begun, Rig]] = {}
    pool = ThreadPoolExecutor(len(rigs), thread_name_prefix="flyball-trial")
    try:
        while True:
            while idle and desk.wanted(trials) > 0 and not desk.exhausted():
                rig, begun = idle.pop(0), desk.begin()
                running[pool.submit(desk.measure, rig, begun, requests)] = (begun, rig)
            if not running:
                return "every trial is done" if desk.wanted(trials) <= 0 else "every legal configuration was tried"
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                begun, rig = running[done]
                result = done.result()
                del running[done]
                desk.finish(begun, result, rig)
                idle.append(rig)
    finally:
        for begun, _ in running.values():
            desk.drop(begun)
        pool.shutdown(wait=not running, cancel_futures=True)


class _Begun(NamedTuple):
    asked: optuna.Trial
    values: Mapping[str, Any]
    kind: Kind


_Result = tuple[Score, dict[str, float]]


@dataclass(kw_only=True)
class _Desk:
    """Where trials are begun and recorded, by one thread; measuring is for others."""

    study: optuna.Study
    problem: Problem
    strategy: Strategy
    patience: Patience
    watch: Watch
    ids: set[int] = field(default_factory=set)  # of the trials that run here

    def wanted(self, trials: int) -> int:
        """How many more are to be begun; those that run elsewhere count as had."""
        states = (TrialState.COMPLETE, TrialState.RUNNING)
        return trials - len(self.study.get_trials(deepcopy=False, states=states))

    def exhausted(self) -> bool:
        return exhausted(self.problem.lattice, _seen(self.study, -1))

    def begin(self) -> _Begun:
        before = len(_seen(self.study, -1))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Heartbeat of storage")  # `owners` gives the signs of life
            asked = self.study.ask(self.problem.lattice.distributions())
        owners.sign(asked)
        self.ids.add(asked._trial_id)  # what heartbeats go by
        values = {**asked.params, **self.problem.lattice.fixed}
        self.watch(Progress(number=asked.number, values=values))
        starts = 1 if warm.provenance(self.study) else self.strategy.starts
        kind: Kind = "default" if before == 0 else "start" if before <= starts else "search"
        return _Begun(asked, values, kind)

    def measure(self, rig: Rig, begun: _Begun, requests: LoadProgress | None) -> _Result:
        known = best(history(self.study), self.problem.objective)
        incumbent = known.score.value if known else None
        return _try(self.problem, rig, begun.values, self.patience, incumbent, requests)

    def finish(self, begun: _Begun, result: _Result, rig: Rig) -> None:
        self.ids.discard(begun.asked._trial_id)
        verdict, metrics = result
        trial = Trial(number=begun.asked.number, kind=begun.kind, values=begun.values, score=verdict, metrics=metrics)
        _record(self.study, begun.asked, trial)
        self.watch(Progress(number=trial.number, values=begun.values, finished=trial))
        if verdict.failure is not None:
            rig.target.configuration()  # raises when the engine is gone: no further trial could tell anything

    def drop(self, begun: _Begun) -> None:
        self.ids.discard(begun.asked._trial_id)
        with suppress(StorageInternalError, SQLAlchemyError):  # its owner's death marks it then
            self.study.tell(begun.asked, state=TrialState.FAIL)


def _try(
    problem: Problem,
    rig: Rig,
    values: Mapping[str, Any],
    patience: Patience,
    incumbent: float | None,
    requests: LoadProgress | None,
) -> _Result:
    scores: list[Score] = []
    figures: list[dict[str, float]] = []
    while not scores or not patience.ends(scores, problem.objective, incumbent):
        try:
            window = rig.measure(values, progress=requests)
        except VersionConflict:
            raise
        except (InvalidKnob, EngineFailed) as error:
            return failed(str(error), problem.objective, problem.bounds, problem.also), {}
        scores.append(score(window, problem.objective, problem.bounds, problem.also))
        figures.append(summary(window))
    return pooled(scores), averaged(figures)


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
    study.tell(asked, [trial.score.value, *trial.score.also])


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
        figures[f"mean_{metric}"] = seen.mean
    figures |= _load(window)
    return {name: float(value) for name, value in figures.items() if math.isfinite(value)}


def _load(window: MetricsWindow) -> dict[str, float]:
    """What the latency law (`tuner.profile`) is fitted to besides mean latencies; concurrency by Little's law."""
    done, sent = window.completed, [trace.scheduled_s for trace in window.traces]
    span_s = max(sent, default=0.0) - min(sent, default=0.0)
    busy_s = math.fsum(t.token_times_s[-1] - t.sent_s for t in window.traces if t.token_times_s)
    return {
        "arrival_rps": (len(sent) - 1) / span_s if span_s else math.nan,
        "mean_input_tokens": math.fsum(t.input_tokens for t in done) / max(len(done), 1),
        "mean_output_tokens": math.fsum(t.output_tokens for t in done) / max(len(done), 1),
        "mean_concurrency": busy_s / window.duration_s,
        "mean_lag_s": math.fsum(t.lag_s for t in window.traces) / max(len(window.traces), 1),
    }


def storage_url(path_or_url: str) -> str:
    """A database URL as it stands, or the URL of an SQLite file; PostgreSQL is spoken to by the driver of our extra.

    >>> storage_url("study.db"), storage_url("postgresql://me@host/studies")
    ('sqlite:///study.db', 'postgresql+psycopg://me@host/studies')
    """
    if "://" not in path_or_url:
        return f"sqlite:///{path_or_url}"
    scheme, _, rest = path_or_url.partition("://")
    return f"postgresql+psycopg://{rest}" if scheme in ("postgresql", "postgres") else path_or_url
