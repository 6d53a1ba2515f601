"""Every accelerator type is plentiful, so each server takes its own best candidate, and that is optimal."""

from __future__ import annotations

import math

from flyball.planner.problem import Problem
from flyball.planner.solvers import Solution


def solve(problem: Problem, *, time_limit_s: float) -> Solution:  # noqa: ARG001 - it needs no time
    """The candidate of least value for each server."""
    chosen = tuple(choice.candidates[0] if choice.candidates else None for choice in problem.choices)
    return Solution(
        chosen=chosen,
        reasons=tuple(choice.reason for choice in problem.choices),
        bound=math.fsum(c.value for c in chosen if c is not None),
    )
