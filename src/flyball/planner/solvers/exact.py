"""The best plan within the capacity, by integer programming (HiGHS).

symbol  meaning
x_sa    1 if server s runs as candidate a, else 0
v_sa    its value: cost per hour and the price of moving
u_sat   what it takes of limit t: cards of a type, cards of a quota, cost of the budget, power
cap_t   the limit

Without a shortage: min Σ v_sa x_sa, with Σ_a x_sa = 1 for every s and Σ_sa u_sat x_sa <= cap_t for every t.
With one, priorities are kept lexicographically: the most servers of priority 1, then of 2 without losing one of 1, and
so on; then the least value. Where the time limit leaves no solution, that of `approximate` is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from flyball.numerics.markov import Floats, Ints
from flyball.planner.problem import Candidate, Choice, Problem
from flyball.planner.solvers import Solution, approximate, left_after, no_room
from flyball.planner.solvers.program import Budget, IntegerProgram, OutOfTime

_GAP = 1e-6  # relative, at which an optimum counts as proven


@dataclass(frozen=True, slots=True, eq=False)
class _Columns:
    """The columns of the program, one a candidate."""

    candidates: tuple[Candidate, ...]
    server: Ints  # of each column
    priority: Ints  # of each server
    value: Floats


def solve(problem: Problem, *, time_limit_s: float) -> Solution:
    """The least value within the time limit, all programs together: one, unless capacity is short."""
    try:
        return _solve(problem, time_limit_s)
    except OutOfTime:
        return approximate.solve(problem, time_limit_s=time_limit_s * approximate.SHARE_AFTER_OTHERS)


def _solve(problem: Problem, time_limit_s: float) -> Solution:
    choices = sorted((c for c in problem.choices if c.candidates), key=lambda c: c.server.name)
    taken: dict[str, Candidate] = {}
    bound = 0.0
    if choices:
        columns = _columns(choices)
        program = _program(columns, problem.capacity, Budget(time_limit_s))
        optimum = program.one_each(columns.value, columns.server, columns.priority)
        taken = {choices[columns.server[j]].server.name: columns.candidates[j] for j in np.flatnonzero(optimum.amounts)}
        bound = optimum.bound
    left = left_after(problem, taken.values())
    chosen = tuple(taken.get(choice.server.name) for choice in problem.choices)
    reasons = tuple("" if got else no_room(choice, left) for choice, got in zip(problem.choices, chosen, strict=True))
    return Solution(chosen=chosen, reasons=reasons, bound=bound)


def _columns(choices: Sequence[Choice]) -> _Columns:
    candidates = tuple(candidate for choice in choices for candidate in choice.candidates)
    return _Columns(
        candidates=candidates,
        server=np.repeat(np.arange(len(choices)), [len(choice.candidates) for choice in choices]),
        priority=np.array([choice.priority for choice in choices]),
        value=np.array([c.value for c in candidates]),
    )


def _program(columns: _Columns, capacity: Mapping[str, float], budget: Budget) -> IntegerProgram:
    """Everybody served, within the capacity: first a row a server, then one a limit."""
    servers, count = len(columns.priority), len(columns.candidates)
    uses = [(j, name, amount) for j, c in enumerate(columns.candidates) for name, amount in c.uses]
    limited = sorted({name for _, name, _ in uses})
    row_of = {name: servers + row for row, name in enumerate(limited)}
    entries = np.concatenate((np.ones(count), [amount for _, _, amount in uses]))
    at = np.concatenate((columns.server, np.array([row_of[name] for _, name, _ in uses], dtype=np.int64)))
    across = np.concatenate((np.arange(count), np.array([j for j, _, _ in uses], dtype=np.int64)))
    return IntegerProgram(
        rows=csr_array((entries, (at, across)), shape=(servers + len(limited), count)),
        low=np.concatenate((np.ones(servers), np.full(len(limited), -np.inf))),
        high=np.concatenate((np.ones(servers), [capacity.get(name, 0) for name in limited])),
        least=np.zeros(count),
        most=np.ones(count),
        budget=budget,
        gap=_GAP,
        sift=True,
    )
