"""An integer program, solved by HiGHS within a budget of time.

Large ones may be sifted first. Let z be the optimum without integrality and d_j >= 0 the reduced costs there: what the
cost rises at least by for each unit of a column that stands at its least. A solution that costs z + g can use no column
with d_j > g. So the program is solved over a small core of columns; the cost found says which others could matter, and
only if there are any is it solved once more, with these.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import highspy
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, vstack

from flyball.numerics.markov import Floats, Ints

_SIFTED_FROM = 2000  # columns; smaller programs are solved as they are
_CORE = 2  # columns a row that the core has at first
_ROUNDING = 1e-7  # relative, of costs and reduced costs


class OutOfTime(Exception):  # caught by the solvers, never shown
    """The budget ran out before any solution was found."""


class Optimum(NamedTuple):
    """What a program yields."""

    amounts: Floats  # of each column, exact where they are whole
    cost: float
    bound: float  # no cost is smaller


class _Run(NamedTuple):
    """What HiGHS found."""

    amounts: Floats
    cost: float
    bound: float
    reduced: Floats  # costs; of a program without integrality


@dataclass(slots=True)
class Budget:
    """Seconds that are left to several programs together, as HiGHS counts them."""

    left_s: float


@dataclass(frozen=True, slots=True, eq=False)
class IntegerProgram:
    """Amounts x, whole but for some columns, with low <= rows @ x <= high and least <= x <= most."""

    rows: csr_array
    low: Floats
    high: Floats
    least: Floats
    most: Floats
    budget: Budget
    gap: float  # relative, at which an optimum counts as proven
    divisible: NDArray[np.bool_] | None = None  # columns whose amounts need not be whole; None: none
    sift: bool = False  # pays where the optimum without integrality is nearly as good

    def with_row(self, row: Floats, at_least: float) -> IntegerProgram:
        """One more condition."""
        rows = vstack((self.rows, csr_array(row[None, :])), format="csr")
        return replace(self, rows=rows, low=np.append(self.low, at_least), high=np.append(self.high, np.inf))

    def whole(self) -> IntegerProgram:
        """The same with whole amounts in every column."""
        return replace(self, divisible=None)

    def minimise(self, cost: Floats) -> Optimum | None:
        """The best amounts found within the budget (or OutOfTime); None if there are none at all."""
        found = self._sifted(cost) if self.sift and len(cost) >= _SIFTED_FROM else self._run(cost)
        if found is None:
            return None
        whole = np.rint(found.amounts) + 0.0  # no -0
        amounts = whole if self.divisible is None else np.where(self.divisible, found.amounts, whole)
        return Optimum(amounts, found.cost, found.bound)

    def one_each(self, cost: Floats, server: Ints, priority: Ints) -> Optimum:
        """The least cost of one column for each server, whose rows come first.

        Where not everybody can be served: the most of each priority in turn, then the least cost.
        """
        optimum = self.minimise(cost)
        if optimum is not None:
            return optimum
        low = self.low.copy()
        low[: len(priority)] = 0.0
        program = replace(self, low=low)
        for level in np.unique(priority):
            members = (priority[server] == level).astype(np.float64)
            most = program.minimise(-members)
            assert most is not None  # serving nobody is always possible
            program = program.with_row(members, round(-most.cost))
        optimum = program.minimise(cost)
        assert optimum is not None  # what served so many still does
        return optimum

    def _sifted(self, cost: Floats) -> _Run | None:
        relaxed = self._run(cost, integral=False)
        if relaxed is None:
            return None
        rising = np.where(relaxed.amounts <= self.least + _ROUNDING, relaxed.reduced, 0.0)
        within = min(_CORE * len(self.low), len(cost) - 1)
        width = float(np.partition(rising, within)[within])
        found = self._core(rising <= width)._run(cost)
        slack = _ROUNDING * max(abs(relaxed.cost), 1.0)
        if found is not None:
            others = rising[rising > width].min(initial=np.inf)
            if found.cost <= relaxed.cost + others + max(slack, self.gap * abs(found.cost)):  # others could hardly help
                return found._replace(bound=min(found.bound, relaxed.cost + others))
            width = found.cost - relaxed.cost + slack
        return self._core(rising <= (np.inf if found is None else width))._run(cost, start=found)

    def _core(self, kept: NDArray[np.bool_]) -> IntegerProgram:
        """The same, with all other columns at their least."""
        return replace(self, most=np.where(kept, self.most, self.least))

    def _run(self, cost: Floats, *, integral: bool = True, start: _Run | None = None) -> _Run | None:
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = len(cost), len(self.low)
        lp.col_cost_, lp.col_lower_, lp.col_upper_ = cost, self.least, self.most
        lp.row_lower_, lp.row_upper_ = self.low, self.high
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_, lp.a_matrix_.index_ = self.rows.indptr, self.rows.indices
        lp.a_matrix_.value_ = self.rows.data
        if integral:
            kinds = [highspy.HighsVarType.kInteger, highspy.HighsVarType.kContinuous]
            divisible = np.zeros(len(cost), dtype=np.bool_) if self.divisible is None else self.divisible
            lp.integrality_ = [kinds[d] for d in divisible.astype(np.int64).tolist()]
        highs = highspy.Highs()
        settings = (
            ("output_flag", False),
            ("threads", 1),
            ("mip_rel_gap", self.gap),
            ("time_limit", self.budget.left_s),
        )
        for option, setting in settings:
            highs.setOptionValue(option, setting)
        highs.passModel(lp)
        if start is not None:
            incumbent = highspy.HighsSolution()
            incumbent.col_value = start.amounts.tolist()
            highs.setSolution(incumbent)
        highs.run()
        self.budget.left_s = max(self.budget.left_s - highs.getRunTime(), 0.0)
        if highs.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
            return None
        info = highs.getInfo()
        found = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
        if not found or not (integral or highs.getModelStatus() == highspy.HighsModelStatus.kOptimal):
            raise OutOfTime
        solution = highs.getSolution()
        amounts, reduced = np.asarray(solution.col_value), np.asarray(solution.col_dual)
        bound = info.mip_dual_bound if integral else info.objective_function_value
        return _Run(amounts, info.objective_function_value, bound, reduced)
