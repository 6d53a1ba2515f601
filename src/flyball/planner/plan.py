"""From a fleet's spec to its plan: a pure function, so that the same spec always yields the same plan."""

from __future__ import annotations

import math
from dataclasses import replace

from flyball.core.fleet import FleetPlan, FleetSpec
from flyball.planner.problem import build
from flyball.planner.solvers import solver as solver_named

TIME_LIMIT_S = 60.0


def plan(
    spec: FleetSpec, *, queue_model: str | None = None, solver: str | None = None, time_limit_s: float = TIME_LIMIT_S
) -> FleetPlan:
    """Choose accelerator, replicas and batch for every server.

    Without a solver's name the spec decides: unlimited, heterogeneous, or else exact.

    A server that cannot be served is named with its reason; the rest is planned all the same.
    """
    limited = spec.quotas or spec.budget_per_h is not None or spec.power_limit_w is not None
    free = spec.unlimited and not limited
    solver = solver or ("unlimited" if free else "heterogeneous" if spec.heterogeneous else "exact")
    problem = build(spec, queue_model)
    solution = solver_named(solver)(problem, time_limit_s=time_limit_s)
    allocations, unserved = {}, {}
    for choice, candidate, reason in zip(problem.choices, solution.chosen, solution.reasons, strict=True):
        if candidate is None:
            unserved[choice.server.name] = reason
        else:
            also = tuple(part.allocation for part in candidate.also)
            allocations[choice.server.name] = replace(candidate.allocation, also=also) if also else candidate.allocation
    value = math.fsum(c.value for c in solution.chosen if c is not None)
    return FleetPlan(allocations=allocations, unserved=unserved, solver=solver, value=value, bound=solution.bound)
