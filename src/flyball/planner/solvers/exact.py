"""The best plan within the capacity, by integer programming (HiGHS).

symbol  meaning
x_sa    1 if server s runs as candidate a, else 0
v_sa    its value: cost per hour and the price of moving
u_sa    cards it takes, of type t(a)
cap_t   cards of type t

Without a shortage: min Σ v_sa x_sa, with Σ_a x_sa = 1 for every s and Σ_{t(a)=t} u_sa x_sa <= cap_t for every t.
With one, priorities are kept lexicographically: the most servers of priority 1, then of 2 without losing one of 1, and
so on; then the least value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import highspy
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, vstack

from flyball.core.errors import Infeasible
from flyball.numerics.markov import Floats, Ints
from flyball.planner.problem import Candidate, Choice, Problem
from flyball.planner.solvers import Solution

_GAP = 1e-6  # relative, at which an optimum counts as proven


class _Optimum(NamedTuple):
    """What a program yields."""

    taken: NDArray[np.bool_]  # of each column
    cost: float
    bound: float


@dataclass(frozen=True, slots=True)
class _Program:
    """The columns of the program, one a candidate, and its rows: low <= rows @ x <= high."""

    columns: tuple[Candidate, ...]
    server: Ints  # of each column
    priority: Ints  # of each server
    value: Floats
    rows: csr_array  # first one a server, then one a type of card, then any added
    low: Floats
    high: Floats
    time_limit_s: float

    def with_row(self, row: Floats, at_least: float) -> _Program:
        """One more condition."""
        rows = vstack((self.rows, csr_array(row[None, :])), format="csr")
        return replace(self, rows=rows, low=np.append(self.low, at_least), high=np.append(self.high, np.inf))

    def minimise(self, cost: Floats) -> _Optimum | None:
        """The best x within the time limit; None if there is none at all."""
        count = len(cost)
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = count, len(self.low)
        lp.col_cost_, lp.col_lower_, lp.col_upper_ = cost, np.zeros(count), np.ones(count)
        lp.row_lower_, lp.row_upper_ = self.low, self.high
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_, lp.a_matrix_.index_ = self.rows.indptr, self.rows.indices
        lp.a_matrix_.value_ = self.rows.data
        lp.integrality_ = [highspy.HighsVarType.kInteger] * count
        highs = highspy.Highs()
        for option, setting in (("output_flag", False), ("mip_rel_gap", _GAP), ("time_limit", self.time_limit_s)):
            highs.setOptionValue(option, setting)
        highs.passModel(lp)
        highs.run()
        if highs.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
            return None
        info = highs.getInfo()
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            raise Infeasible(
                f"no plan for {len(self.priority)} servers was found in {self.time_limit_s:g} s; allow more time"
            )
        taken = np.asarray(highs.getSolution().col_value) > 0.5
        return _Optimum(taken, info.objective_function_value, info.mip_dual_bound)


def solve(problem: Problem, *, time_limit_s: float) -> Solution:
    """The least value; the limit holds for each of the programs, of which there is one unless capacity is short."""
    choices = sorted((c for c in problem.choices if c.candidates), key=lambda c: c.server.name)
    program = _program(choices, problem.capacity, time_limit_s)
    optimum = (program.minimise(program.value) or _by_priority(program)) if choices else None
    taken: dict[str, Candidate] = {}
    if optimum is not None:
        columns = np.flatnonzero(optimum.taken)
        taken = {choices[program.server[j]].server.name: program.columns[j] for j in columns}
    left = dict(problem.capacity)
    for candidate in taken.values():
        left[candidate.type] = left.get(candidate.type, 0) - candidate.cards
    chosen = tuple(taken.get(choice.server.name) for choice in problem.choices)
    reasons = tuple("" if got else _why(choice, left) for choice, got in zip(problem.choices, chosen, strict=True))
    return Solution(chosen=chosen, reasons=reasons, bound=optimum.bound if optimum else 0.0)


def _program(choices: Sequence[Choice], capacity: Mapping[str, int], time_limit_s: float) -> _Program:
    """Everybody served, within the capacity."""
    columns = tuple(candidate for choice in choices for candidate in choice.candidates)
    server = np.repeat(np.arange(len(choices)), [len(choice.candidates) for choice in choices])
    types = sorted({c.type for c in columns if c.cards})
    row_of = {name: len(choices) + row for row, name in enumerate(types)}
    using = [column for column, c in enumerate(columns) if c.cards]
    entries = np.concatenate((np.ones(len(columns)), [float(columns[j].cards) for j in using]))
    at = np.concatenate((server, np.array([row_of[columns[j].type] for j in using], dtype=np.int64)))
    across = np.concatenate((np.arange(len(columns)), np.array(using, dtype=np.int64)))
    shape = (len(choices) + len(types), len(columns))
    return _Program(
        columns=columns,
        server=server,
        priority=np.array([choice.priority for choice in choices]),
        value=np.array([c.value for c in columns]),
        rows=csr_array((entries, (at, across)), shape=shape),
        low=np.concatenate((np.ones(len(choices)), np.zeros(len(types)))),
        high=np.concatenate((np.ones(len(choices)), [float(capacity.get(name, 0)) for name in types])),
        time_limit_s=time_limit_s,
    )


def _by_priority(program: _Program) -> _Optimum | None:
    """Serve the most of each priority in turn, then at the least value."""
    low = program.low.copy()
    low[: len(program.priority)] = 0.0
    program = replace(program, low=low)
    for level in np.unique(program.priority):
        members = (program.priority[program.server] == level).astype(np.float64)
        most = program.minimise(-members)
        assert most is not None  # serving nobody is always possible
        program = program.with_row(members, round(-most.cost))
    return program.minimise(program.value)


def _why(choice: Choice, left: Mapping[str, int]) -> str:
    if choice.reason:
        return choice.reason
    options = [f"{c.cards} {c.type} ({left.get(c.type, 0)} left)" for c in choice.candidates]
    more = f" or {len(options) - 3} other ways" if len(options) > 3 else ""
    return (
        f"the capacity is too small: it needs {' or '.join(options[:3])}{more}; add accelerators or raise its priority"
    )
