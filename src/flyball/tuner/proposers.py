"""Which configuration to try next: the default, then points spread evenly, then what a sampler has learnt.

Every proposal is a pure function of the finished trials and the seed, so that a study which was killed and resumed goes
on as if it never stopped. None repeats a trial, and none breaks a known constraint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import TrialState, create_trial

from flyball.core.errors import InvalidInput
from flyball.core.knobs import Configuration
from flyball.tuner.objective import Objective, Score
from flyball.tuner.space import Lattice, Point

ENUMERABLE = 4096  # lattices up to this size are searched whole for a free point
DESIGNS = 64  # start designs of which the most even is taken
DRAWS = 16  # suggestions of a sampler that may be unusable before the nearest free point is taken


def _tpe(seed: int) -> BaseSampler:
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=0)


def _gp(seed: int) -> BaseSampler:
    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=0)


SAMPLERS: Mapping[str, Callable[[int], BaseSampler] | None] = {"tpe": _tpe, "gp": _gp, "random": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """How a study looks for better configurations."""

    sampler: str = "tpe"  # tpe, gp (needs torch; seconds of CPU a suggestion), random
    starts: int = 4  # evenly spread points between the default and the sampler's first
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise InvalidInput(f"unknown sampler {self.sampler!r}; use one of {', '.join(SAMPLERS)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """A point that was tried, and its score; None while it runs."""

    values: Configuration
    score: Score | None = field(default=None)


def exhausted(lattice: Lattice, seen: Sequence[Observation]) -> bool:
    """Whether no legal point is left to try; a lattice too large to list always has one."""
    if not seen or lattice.size > ENUMERABLE:
        return False
    taken = {lattice.point(o.values) for o in seen}
    return not any(p not in taken and lattice.legal(p) for p in lattice.points())


def propose(
    lattice: Lattice, objective: Objective, seen: Sequence[Observation], strategy: Strategy
) -> Mapping[str, Any]:
    """The next configuration to try; look at `exhausted` first."""
    if not seen:
        return lattice.default
    learnt = [o for o in seen if o.score is not None and lattice.point(o.values) is not None]
    taken = {lattice.point(o.values) for o in seen}

    def free(point: Point) -> bool:
        return point not in taken and lattice.legal(point)

    sampler = SAMPLERS[strategy.sampler]
    rng = np.random.default_rng([strategy.seed, len(seen)])
    draws: Iterable[Point]
    if len(seen) <= strategy.starts:
        draws = [spread(lattice, strategy.starts, np.random.default_rng(strategy.seed))[len(seen) - 1]]
    elif sampler is None or not learnt:
        draws = [lattice.at(u) for u in rng.random((DRAWS, len(lattice.axes)))]
    else:
        draws = _draws(lattice, objective, seen, sampler(int(rng.integers(2**31))))
    wish = None
    for point in draws:
        if free(point):
            return lattice.values(point)
        wish = wish or point
    assert wish is not None
    return lattice.values(_nearest_free(lattice, wish, free, rng))


def spread(lattice: Lattice, count: int, rng: np.random.Generator) -> list[Point]:
    """Points spread evenly: one in each of `count` equal parts of every axis, and far from each other.

    A Latin hypercube, of many the one whose nearest two points are farthest apart (Johnson, Moore and Ylvisaker, 1990).
    """
    strata = np.tile(np.arange(count), (DESIGNS, len(lattice.axes), 1))
    designs = (rng.permuted(strata, axis=2).transpose(0, 2, 1) + 0.5) / count  # [design, point, axis]
    gaps = np.linalg.norm(designs[:, :, None] - designs[:, None], axis=-1) + 2 * np.eye(count) * len(lattice.axes)
    return [lattice.at(u) for u in designs[gaps.min(axis=(1, 2)).argmax()]]


def _draws(
    lattice: Lattice, objective: Objective, seen: Sequence[Observation], sampler: BaseSampler
) -> Iterator[Point]:
    """What a sampler suggests, on level numbers: that is the scale on which neighbours differ about equally."""
    space: dict[str, BaseDistribution] = {
        axis.knob.name: IntDistribution(0, len(axis.levels) - 1)
        if axis.ordered
        else CategoricalDistribution(tuple(range(len(axis.levels))))
        for axis in lattice.axes
    }
    study = optuna.create_study(direction="maximize" if objective.maximise else "minimize", sampler=sampler)
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
    return create_trial(params=params, distributions=space, value=score.value, constraints=constraints_of(score))


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
        raise InvalidInput("no legal configuration is left to try; widen the knobs or relax the constraints")
    wanted = lattice.values(wish)
    return min(candidates, key=lambda p: (lattice.distance(lattice.values(p), wanted), p))
