"""Which configuration to try next: the default, then points spread evenly, then what a sampler has learnt.

Every proposal is a pure function of the finished trials and the seed, so that a study which was killed and resumed goes
on as if it never stopped. None repeats a trial, and none breaks a known constraint.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from flyball.core.errors import InvalidInput
from flyball.core.knobs import Configuration
from flyball.tuner.bayes import Prediction, Tried
from flyball.tuner.feasibility import MODELS
from flyball.tuner.objective import Objective, Score
from flyball.tuner.pool import Pool
from flyball.tuner.proposer import Rules, next_point, spread
from flyball.tuner.space import Lattice, Point

ENUMERABLE = 4096  # lattices up to this size are searched whole for a free point
NOTHING_LEFT = "no legal configuration is left to try; widen the knobs or relax the constraints"
DRAWS = 16  # suggestions of a sampler that may be unusable before the nearest free point is taken


def _tpe(seed: int) -> BaseSampler:
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=0)


def _gp(seed: int) -> BaseSampler:
    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=0)


def _by_class(name: str) -> Callable[[int], BaseSampler] | None:
    """Any of Optuna's own, by the name of its class."""
    kind = getattr(optuna.samplers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, BaseSampler)):
        return None
    construct: Any = kind
    parameters = inspect.signature(kind).parameters
    if any(p.default is p.empty and p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        return None  # it wants arguments that nobody here knows: a grid, another sampler

    def make(seed: int) -> BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # who names the class has read its page
            made: BaseSampler = construct(seed=seed) if "seed" in parameters else construct()
        return made

    return make


OURS = "flyball"
SAMPLERS: Mapping[str, Callable[[int], BaseSampler] | None] = {OURS: None, "tpe": _tpe, "gp": _gp, "random": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """How a study looks for better configurations."""

    sampler: str = OURS  # ours, tpe, gp (needs torch), random, or the class of one of Optuna's samplers
    starts: int = 4  # evenly spread points between the default and the sampler's first
    seed: int = 0
    feasibility: str = "gp"  # ours only: how failures are learnt (`tuner.feasibility`)
    prior: Prediction | None = None  # ours only: what is expected of the objective before anything is measured
    promised: tuple[Prediction, ...] = ()  # ours only: what is expected of each promise's margin
    law: bool = False  # ours only: expect what the latency law fitted to the finished trials does (`tuner.expectation`)

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS and _by_class(self.sampler) is None:
            raise InvalidInput(
                f"unknown sampler {self.sampler!r}; use {', '.join(SAMPLERS)}, or the class of one of Optuna's, such "
                "as QMCSampler"
            )
        if self.feasibility not in MODELS:
            raise InvalidInput(
                f"unknown model of hidden constraints {self.feasibility!r}; use one of {', '.join(MODELS)}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """A point that was tried, and its score; None while it runs."""

    values: Configuration
    score: Score | None = field(default=None)
    earlier: bool = False  # by an earlier study (`tuner.warm`)


def exhausted(lattice: Lattice, seen: Sequence[Observation]) -> bool:
    """Whether no legal point is left to try; a lattice too large to list always has one."""
    if not seen or lattice.size > ENUMERABLE:
        return False
    taken = {lattice.point(o.values) for o in seen}
    return not any(p not in taken and lattice.legal(p) for p in lattice.points())


def propose(
    lattice: Lattice,
    objective: Objective,
    seen: Sequence[Observation],
    strategy: Strategy,
    also: Sequence[Objective] = (),
) -> Mapping[str, Any]:
    """The next configuration to try; look at `exhausted` first."""
    own = [o for o in seen if not o.earlier]
    if not own:
        return lattice.default
    if len(own) == 1 and (known := _best_earlier(lattice, objective, seen)) is not None:
        return lattice.values(known)
    if strategy.sampler == OURS:
        return _ours(lattice, (objective, *also), seen, strategy)
    learnt = [o for o in seen if o.score is not None and lattice.point(o.values) is not None]
    taken = {lattice.point(o.values) for o in own}

    def free(point: Point) -> bool:
        return point not in taken and lattice.legal(point)

    sampler = SAMPLERS.get(strategy.sampler) or _by_class(strategy.sampler)
    rng = np.random.default_rng([strategy.seed, len(seen)])
    draws: Iterable[Point]
    if len(seen) == len(own) <= strategy.starts:
        draws = [spread(lattice, strategy.starts, np.random.default_rng(strategy.seed))[len(own) - 1]]
    elif sampler is None or not learnt:
        draws = [lattice.at(u) for u in rng.random((DRAWS, len(lattice.axes)))]
    else:
        draws = _draws(lattice, (objective, *also), seen, sampler(int(rng.integers(2**31))))
    wish = None
    for point in draws:
        if free(point):
            return lattice.values(point)
        wish = wish or point
    assert wish is not None
    return lattice.values(_nearest_free(lattice, wish, free, rng))


def _best_earlier(lattice: Lattice, objective: Objective, seen: Sequence[Observation]) -> Point | None:
    """Where an earlier study found most, on this lattice, unless it was tried here; None if it found nothing."""
    taken = {lattice.point(o.values) for o in seen if not o.earlier}
    kept = [
        (objective.gain(o.score.value, 0.0), -number, point)
        for number, o in enumerate(seen)
        if o.earlier and o.score is not None and o.score.feasible and (point := lattice.point(o.values)) is not None
        and point not in taken and lattice.legal(point)
    ]  # fmt: skip
    return max(kept)[2] if kept else None


def _ours(
    lattice: Lattice, objectives: Sequence[Objective], seen: Sequence[Observation], strategy: Strategy
) -> Mapping[str, Any]:
    rules = Rules(
        seed=strategy.seed, starts=strategy.starts, feasibility=strategy.feasibility, prior=strategy.prior,
        promised=strategy.promised, maximise=objectives[0].maximise,
    )  # fmt: skip
    point = next_point(Pool(lattice), [_tried(o, objectives) for o in seen], rules)
    if point is None:
        raise InvalidInput(NOTHING_LEFT)
    return lattice.values(point)


def _tried(observation: Observation, objectives: Sequence[Objective]) -> Tried:
    score = observation.score
    if score is None or score.failure is not None:
        return Tried(values=observation.values, failed=score is not None, earlier=observation.earlier)
    gains = tuple(o.gain(v, 0.0) for o, v in zip(objectives, (score.value, *score.also), strict=True))
    return Tried(
        values=observation.values, gains=gains, margins=tuple(score.margins.values()), earlier=observation.earlier
    )


def _draws(
    lattice: Lattice, objectives: Sequence[Objective], seen: Sequence[Observation], sampler: BaseSampler
) -> Iterator[Point]:
    """What a sampler suggests, on level numbers: that is the scale on which neighbours differ about equally."""
    space: dict[str, BaseDistribution] = {
        axis.knob.name: IntDistribution(0, len(axis.levels) - 1)
        if axis.ordered
        else CategoricalDistribution(tuple(range(len(axis.levels))))
        for axis in lattice.axes
    }
    study = optuna.create_study(directions=directions(objectives), sampler=sampler)
    for observation in seen:
        if (point := lattice.point(observation.values)) is not None:
            study.add_trial(_as_optuna(point, observation.score, space))
    for _ in range(DRAWS if isinstance(sampler, optuna.samplers.TPESampler) else 2):
        params = study.ask(space).params
        yield tuple(params[name] for name in space)


def _as_optuna(point: Point, score: Score | None, space: dict[str, BaseDistribution]) -> optuna.trial.FrozenTrial:
    params = dict(zip(space, point, strict=True))
    if score is None:
        return create_trial(state=TrialState.RUNNING, params=params, distributions=space)
    values = [score.value, *score.also]
    return create_trial(params=params, distributions=space, values=values, constraints=constraints_of(score))


def directions(objectives: Sequence[Objective]) -> list[StudyDirection]:
    """In Optuna's words."""
    return [StudyDirection.MAXIMIZE if objective.maximise else StudyDirection.MINIMIZE for objective in objectives]


def constraints_of(score: Score) -> dict[str, float]:
    """A score's constraints in Optuna's form, where anything above 0 is infeasible; the same names in every trial."""
    return {**score.margins, "failed": 1.0 if score.failure else -1.0}


def _nearest_free(lattice: Lattice, wish: Point, free: Callable[[Point], bool], rng: np.random.Generator) -> Point:
    """The free point nearest to a wish: of all, or in a large lattice of those around it and a spread of others."""
    if lattice.size <= ENUMERABLE:
        candidates = [p for p in lattice.points() if free(p)]
    else:
        ring = {wish}
        for _ in range(3):
            ring |= {q for p in sorted(ring) for q in lattice.neighbours(p)}
        others = {lattice.at(u) for u in rng.random((ENUMERABLE, len(lattice.axes)))}
        candidates = [p for p in sorted(ring | others) if free(p)]
    if not candidates:
        raise InvalidInput(NOTHING_LEFT)
    wanted = lattice.values(wish)
    return min(candidates, key=lambda p: (lattice.distance(lattice.values(p), wanted), p))
