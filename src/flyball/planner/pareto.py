"""Cost against attainment: for each budget, the largest share of all requests that can be served within their targets.

symbol  meaning
n_sa    replicas of server s on accelerator a, a whole number; each takes r_sa requests/s within the targets
w_s     requests/s of server s that are served within them, at most its load d_s
c_sa    cost of a replica; u_sat what it takes of limit t

max Σ w_s with w_s <= Σ_a r_sa n_sa, the limits, and Σ c_sa n_sa <= budget. A server's replicas may be on several
accelerators, and what is not in w_s has to wait or be turned away. So no plan of the fleet attains more for the money.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from flyball.core.errors import InvalidInput
from flyball.planner.problem import Candidate, Problem
from flyball.planner.solvers.program import Budget, IntegerProgram, OutOfTime

_GAP = 1e-3  # relative, of the requests served


@dataclass(frozen=True, slots=True, kw_only=True)
class ParetoPoint:
    """A budget, and the best that can be had for it."""

    budget_per_h: float
    cost_per_h: float
    attainment: float  # share of all requests
    bound: float  # no plan within the budget attains more
    replicas: int


def pareto(problem: Problem, *, points: int, time_limit_s: float) -> list[ParetoPoint]:
    """Attainment at evenly spaced budgets, from nothing to what serves as many as can be."""
    if points < 2:
        raise InvalidInput(f"{points} points are asked for; give at least 2, for they span from nothing to everything")
    columns = [
        (s, candidate)
        for s, choice in enumerate(problem.choices)
        for candidate in choice.candidates
        if candidate.allocation.replicas and candidate.sizing and candidate.sizing.rate_rps
    ]
    demand = np.array([choice.server.demand.arrival_rps for choice in problem.choices])
    if not columns or not demand.sum():
        raise InvalidInput("no server has both a load and an accelerator that keeps its targets; there is no trade-off")
    program, cost, served = _program(problem, columns, demand, Budget(time_limit_s))
    try:
        most = program.minimise(-served)
        assert most is not None  # serving nobody is always possible
        cheapest = program.with_row(served, -most.cost * (1 - _GAP)).minimise(cost)
        top = float(cost @ (cheapest or most).amounts)
        found = []
        for budget in np.linspace(0.0, top, points).tolist():
            best = program.with_row(-cost, -budget * (1 + 1e-9)).minimise(cost * 1e-6 / max(top, 1e-9) - served)
            assert best is not None  # nothing costs nothing
            total = float(demand.sum())
            found.append(
                ParetoPoint(
                    budget_per_h=budget,
                    cost_per_h=float(cost @ best.amounts),
                    attainment=float(served @ best.amounts) / total,
                    bound=min(-best.bound / total + 1e-6, 1.0),
                    replicas=int(best.amounts[: len(columns)].sum()),
                )
            )
    except OutOfTime:
        raise InvalidInput(
            "the trade-off was not found within the time limit; allow more time, or fewer points"
        ) from None
    return found


def _program(
    problem: Problem, columns: Sequence[tuple[int, Candidate]], demand: np.ndarray, budget: Budget
) -> tuple[IntegerProgram, np.ndarray, np.ndarray]:
    """Columns n, then w; rows: w within what replicas take, then one a limit."""
    count, servers = len(columns), len(demand)
    rate = np.array([c.allocation.capacity_rps / c.allocation.replicas for _, c in columns])
    of = np.array([s for s, _ in columns])
    uses = [(j, name, amount / c.allocation.replicas) for j, (_, c) in enumerate(columns) for name, amount in c.uses]
    finite = {name for _, name, _ in uses if math.isfinite(problem.capacity.get(name, 0))}
    limited = {name: servers + row for row, name in enumerate(sorted(finite))}
    uses = [use for use in uses if use[1] in limited]
    entries = np.concatenate((rate, -np.ones(servers), [amount for _, _, amount in uses]))
    at = np.concatenate((of, np.arange(servers), [limited[name] for _, name, _ in uses])).astype(np.int64)
    across = np.concatenate((np.arange(count), count + np.arange(servers), [j for j, _, _ in uses])).astype(np.int64)
    limits = [problem.capacity.get(name, 0) for name in limited]
    program = IntegerProgram(
        rows=csr_array((entries, (at, across)), shape=(servers + len(limited), count + servers)),
        low=np.concatenate((np.zeros(servers), np.full(len(limited), -np.inf))),
        high=np.concatenate((np.full(servers, np.inf), limits)),
        least=np.zeros(count + servers),
        most=np.concatenate((np.ceil(demand[of] / rate), demand)),
        budget=budget,
        gap=_GAP,
        divisible=np.concatenate((np.zeros(count, dtype=np.bool_), np.ones(servers, dtype=np.bool_))),
    )
    cost = np.array([c.allocation.cost_per_h / c.allocation.replicas for _, c in columns])
    return (
        program,
        np.concatenate((cost, np.zeros(servers))),
        np.concatenate((np.zeros(count), np.ones(servers))),
    )
