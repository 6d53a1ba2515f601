"""From a fleet's spec to its plan: a pure function, so that the same spec always yields the same plan."""

from __future__ import annotations

from flyball.core.fleet import FleetPlan, FleetSpec
from flyball.planner.problem import build
from flyball.planner.solvers import solver as solver_named

TIME_LIMIT_S = 60.0


def plan(spec: FleetSpec, *, queue_model: str | None = None, time_limit_s: float = TIME_LIMIT_S) -> FleetPlan:
    """Choose accelerator, replicas and batch for every server.

    A server that cannot be served is named with its reason; the rest is planned all the same.
    """
    solver = "unlimited" if spec.unlimited else "exact"
    problem = build(spec, queue_model)
    solution = solver_named(solver)(problem, time_limit_s=time_limit_s)
    allocations, unserved = {}, {}
    for choice, candidate, reason in zip(problem.choices, solution.chosen, solution.reasons, strict=True):
        if candidate is None:
            unserved[choice.server.name] = reason
        else:
            allocations[choice.server.name] = candidate.allocation
    return FleetPlan(allocations=allocations, unserved=unserved, solver=solver)
