"""An integer program, solved by HiGHS within a budget of time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import highspy
import numpy as np
from scipy.sparse import csr_array, vstack

from flyball.core.errors import Infeasible
from flyball.numerics.markov import Floats, Ints


class Optimum(NamedTuple):
    """What a program yields."""

    amounts: Ints  # of each column
    cost: float
    bound: float  # no cost is smaller


@dataclass(slots=True)
class Budget:
    """Seconds that are left to several programs together, as HiGHS counts them."""

    left_s: float


@dataclass(frozen=True, slots=True, eq=False)
class IntegerProgram:
    """Whole amounts x with low <= rows @ x <= high and least <= x <= most."""

    rows: csr_array
    low: Floats
    high: Floats
    least: Floats
    most: Floats
    budget: Budget
    gap: float  # relative, at which an optimum counts as proven

    def with_row(self, row: Floats, at_least: float) -> IntegerProgram:
        """One more condition."""
        rows = vstack((self.rows, csr_array(row[None, :])), format="csr")
        return replace(self, rows=rows, low=np.append(self.low, at_least), high=np.append(self.high, np.inf))

    def minimise(self, cost: Floats) -> Optimum | None:
        """The best amounts found within the budget; None if there are none at all."""
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = len(cost), len(self.low)
        lp.col_cost_, lp.col_lower_, lp.col_upper_ = cost, self.least, self.most
        lp.row_lower_, lp.row_upper_ = self.low, self.high
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_, lp.a_matrix_.index_ = self.rows.indptr, self.rows.indices
        lp.a_matrix_.value_ = self.rows.data
        lp.integrality_ = [highspy.HighsVarType.kInteger] * len(cost)
        highs = highspy.Highs()
        for option, setting in (("output_flag", False), ("mip_rel_gap", self.gap), ("time_limit", self.budget.left_s)):
            highs.setOptionValue(option, setting)
        highs.passModel(lp)
        highs.run()
        self.budget.left_s = max(self.budget.left_s - highs.getRunTime(), 0.0)
        if highs.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
            return None
        info = highs.getInfo()
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            raise Infeasible("no plan was found within the time limit; allow more time, or use the solver greedy")
        amounts = np.rint(np.asarray(highs.getSolution().col_value)).astype(np.int64)
        return Optimum(amounts, info.objective_function_value, info.mip_dual_bound)
