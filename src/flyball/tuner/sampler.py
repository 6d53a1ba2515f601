"""The proposer as a sampler of any Optuna study.

    study = optuna.create_study(sampler=FlyballSampler(seed=0), direction="maximize")
    study.optimize(objective, n_trials=30)

A trial that fails (an exception, `TrialState.FAIL`) teaches which configurations fail; constraints set with
`trial.set_constraint` are promises; several directions make a Pareto front. Values are taken from levels of each range
(`tuner.space`). With conditional parameters only those that every trial has are searched, as by Optuna's GPSampler.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.trial import FrozenTrial, TrialState

from flyball.core.errors import InvalidInput
from flyball.core.knobs import Knob, Value
from flyball.tuner.bayes import Tried
from flyball.tuner.constraints import Constraint
from flyball.tuner.pool import Pool
from flyball.tuner.proposer import Rules, next_point
from flyball.tuner.space import Axis, Lattice

_SEEN = (TrialState.COMPLETE, TrialState.RUNNING, TrialState.FAIL)


class FlyballSampler(BaseSampler):
    """See the module; `constraints` are relations between parameters that no suggestion breaks."""

    def __init__(
        self, *, seed: int = 0, starts: int = 4, feasibility: str = "gp", constraints: Iterable[str] = ()
    ) -> None:
        self._rules = Rules(seed=seed, starts=starts, feasibility=feasibility)
        self._constraints = tuple(Constraint(text) for text in constraints)
        self._common = IntersectionSearchSpace()
        self._first = RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:  # noqa: ARG002  # Optuna's signature
        """The parameters that every finished trial had."""
        return {name: d for name, d in self._common.calculate(study).items() if not d.single()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Our next point of them; nothing if every legal one was tried."""
        if not search_space:
            return {}
        axes = tuple(_axis(name, distribution) for name, distribution in search_space.items())
        lattice = Lattice(axes=axes, constraints=self._constraints)
        for constraint in self._constraints:
            constraint.check_names(list(search_space))
        tried = [
            _tried(t, study)
            for t in study.get_trials(deepcopy=False, states=_SEEN)
            if t.number != trial.number and search_space.keys() <= t.params.keys()
        ]
        point = next_point(Pool(lattice), tried, self._rules)
        return dict(lattice.values(point)) if point is not None else {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:  # noqa: ANN401  # Optuna's signature
        """The first trial, and what not every trial has: at random."""
        return self._first.sample_independent(study, trial, param_name, param_distribution)


def _tried(trial: FrozenTrial, study: optuna.Study) -> Tried:
    values: dict[str, Value] = dict(trial.params)
    if trial.state is not TrialState.COMPLETE or trial.values is None or not np.isfinite(trial.values).all():
        return Tried(values=values, failed=trial.state is not TrialState.RUNNING)
    upward = [direction is optuna.study.StudyDirection.MAXIMIZE for direction in study.directions]
    gains = tuple(value if up else -value for value, up in zip(trial.values, upward, strict=True))
    return Tried(values=values, gains=gains, margins=tuple(trial.constraints.values()))


def _axis(name: str, distribution: BaseDistribution) -> Axis:
    if isinstance(distribution, CategoricalDistribution):
        words = tuple(map(str, distribution.choices))
        knob = Knob(name=name, kind="choice", default=words[0], choices=words)
        return Axis(knob=knob, levels=tuple(distribution.choices))  # type: ignore[arg-type]  # None is a level too
    if not isinstance(distribution, IntDistribution | FloatDistribution):
        raise InvalidInput(f"{name} has a {type(distribution).__name__}; use an int, a float or a categorical one")
    whole = isinstance(distribution, IntDistribution)
    low, high = distribution.low, distribution.high
    knob = Knob(name=name, kind="int" if whole else "float", low=low, high=high, log=distribution.log, default=low)
    axis = Axis.of(knob)
    if distribution.log or distribution.step in (None, 1):
        return axis
    step = float(distribution.step)
    on_grid = {low + step * round((float(level) - low) / step) for level in axis.levels}
    levels = sorted(v for v in on_grid if low <= v <= high)
    return Axis(knob=knob, levels=tuple(int(v) if whole else float(v) for v in levels))
