"""Solvers are found by name, and keep their time."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flyball.core.errors import Infeasible, InvalidInput
from flyball.core.fleet import FleetSpec
from flyball.planner.problem import build
from flyball.planner.solvers import solver


def test_a_wrong_name_says_which_there_are() -> None:
    """The registry names its solvers to who asks for another."""
    with pytest.raises(InvalidInput, match="unknown solver 'magic'; use one of unlimited, exact, greedy, het"):
        solver("magic")


def test_bounds_are_kept(sample: Callable[..., FleetSpec]) -> None:
    """No solution is better than its bound, and an optimum meets it."""
    problem = build(sample("small", 128))
    for name in ("unlimited", "exact"):
        solution = solver(name)(problem, time_limit_s=60)
        value = sum(candidate.value for candidate in solution.chosen if candidate)
        assert value == pytest.approx(solution.bound, rel=1e-6)


def test_without_time_there_is_no_plan(sample: Callable[..., FleetSpec]) -> None:
    """A limit that leaves no time for a first solution is told, and nothing half done is passed for a plan."""
    with pytest.raises(Infeasible, match="no plan was found within the time limit; allow more time"):
        solver("exact")(build(sample("large", 128)), time_limit_s=0.0)
