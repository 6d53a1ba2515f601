"""The best plan where a server's replicas may run on several accelerators, by integer programming (HiGHS).

symbol  meaning
n_sa    replicas of server s run as candidate a, a whole number
y_s     1 if server s is served, else 0
r_sa    requests/s that one replica takes within the targets; d_s what the server must take
m_s     its fewest replicas, M_s its most
v_sa    value of a replica: its cost per hour, a tenth more where the server does not run at present, its surcharge
u_sat   what one replica takes of limit t (cards of a type or a quota, cost of the budget, power); cap_t the limit

min Σ v_sa n_sa, with Σ_a r_sa n_sa >= d_s y_s and M_s >= Σ_a n_sa >= m_s y_s for every s, Σ_sa u_sat n_sa <= cap_t
for every t, and y = 1. If that cannot be, priorities are kept lexicographically, as `exact` keeps them. A server's
load is split in proportion to r, so every replica keeps the targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import csr_array

from flyball.numerics.markov import Floats, Ints
from flyball.planner.problem import MOVE_PENALTY, Candidate, Choice, Problem, with_replicas
from flyball.planner.solvers import Solution, approximate, left_after, no_room
from flyball.planner.solvers.program import Budget, IntegerProgram, Optimum, OutOfTime

_GAP = 1e-4  # relative, at which an optimum counts as proven
_SLACK = 1e-9  # relative, of a demand: a rate that is a ratio of it must meet it after rounding


@dataclass(frozen=True, slots=True)
class _Columns:
    """Servers that need replicas, and the ways to run one."""

    choices: tuple[Choice, ...]
    candidates: tuple[Candidate, ...]
    server: Ints  # of each candidate
    rate: Floats  # of one replica
    value: Floats  # of one replica

    @classmethod
    def of(cls, choices: Sequence[Choice]) -> _Columns:
        """Every candidate that runs something."""
        candidates = tuple(c for choice in choices for c in choice.candidates)
        server = np.repeat(np.arange(len(choices)), [len(choice.candidates) for choice in choices])
        return cls(
            tuple(choices),
            candidates,
            server,
            np.array([c.allocation.capacity_rps / c.allocation.replicas for c in candidates]),
            np.array([_value(choices[s], c) for s, c in zip(server.tolist(), candidates, strict=True)]),
        )

    def program(self, capacity: Mapping[str, float], budget: Budget) -> IntegerProgram:
        """Columns n, then y; rows: for each server a demand, its fewest and its most replicas; then one a limit."""
        servers, columns = len(self.choices), len(self.candidates)
        uses = [
            (j, name, amount / c.allocation.replicas) for j, c in enumerate(self.candidates) for name, amount in c.uses
        ]
        limited = sorted({name for _, name, _ in uses})
        row_of = {name: 3 * servers + row for row, name in enumerate(limited)}
        n, y = np.arange(columns), columns + np.arange(servers)
        demand = np.array([_demand(choice) * (1 - _SLACK) for choice in self.choices])
        least = np.array([max(choice.server.min_replicas, 1) for choice in self.choices], dtype=np.float64)
        most = np.array([choice.server.max_replicas or np.inf for choice in self.choices])
        each = np.array([amount for _, _, amount in uses])
        entries = np.concatenate((self.rate, -demand, np.ones(columns), -least, np.ones(columns), each))
        at = np.concatenate((
            self.server, np.arange(servers), servers + self.server, servers + np.arange(servers),
            2 * servers + self.server, np.array([row_of[name] for _, name, _ in uses], dtype=np.int64),
        ))  # fmt: skip
        across = np.concatenate((n, y, n, y, n, np.array([j for j, _, _ in uses], dtype=np.int64)))
        rows = csr_array((entries, (at, across)), shape=(3 * servers + len(limited), columns + servers))
        return IntegerProgram(
            rows=rows,
            low=np.concatenate((np.zeros(2 * servers), np.full(servers + len(limited), -np.inf))),
            high=np.concatenate((np.full(2 * servers, np.inf), most, [capacity.get(name, 0) for name in limited])),
            least=np.concatenate((np.zeros(columns), np.ones(servers))),
            most=np.concatenate((
                [float(max(c.allocation.replicas, self.choices[s].server.min_replicas))
                 for s, c in zip(self.server.tolist(), self.candidates, strict=True)],
                np.ones(servers),
            )),
            budget=budget,
            gap=_GAP,
        )  # fmt: skip


def _demand(choice: Choice) -> float:
    sizing = choice.candidates[0].sizing
    assert sizing is not None  # who runs replicas was sized
    return sizing.rate_rps


def _value(choice: Choice, candidate: Candidate) -> float:
    a = candidate.allocation
    moves = a.accelerator != choice.server.current.accelerator
    return (a.cost_per_h * (1 + MOVE_PENALTY * moves) + candidate.surcharge) / a.replicas


def solve(problem: Problem, *, time_limit_s: float) -> Solution:
    """The least value within the time limit, all programs together; if it leaves none, a plan without mixing."""
    try:
        return _solve(problem, time_limit_s)
    except OutOfTime:
        whole = approximate.solve(problem, time_limit_s=time_limit_s * approximate.SHARE_AFTER_OTHERS)
        return replace(whole, bound=None)  # a mixed plan may be better than its bound


def _solve(problem: Problem, time_limit_s: float) -> Solution:
    able = sorted((c for c in problem.choices if c.candidates), key=lambda c: c.server.name)
    idle = {c.server.name: c.candidates[0] for c in able if not c.candidates[0].allocation.replicas}
    columns = _Columns.of([c for c in able if c.server.name not in idle])
    taken, bound = dict(idle), 0.0
    if columns.choices:
        program = columns.program(problem.capacity, Budget(time_limit_s))
        cost = np.concatenate((columns.value, np.zeros(len(columns.choices))))
        optimum = program.minimise(cost) or _by_priority(columns, program, cost)
        taken |= _taken(columns, optimum)
        bound = optimum.bound
    left = left_after(problem, taken.values())
    chosen = tuple(taken.get(choice.server.name) for choice in problem.choices)
    reasons = tuple("" if got else no_room(choice, left) for choice, got in zip(problem.choices, chosen, strict=True))
    return Solution(chosen=chosen, reasons=reasons, bound=bound + sum(c.value for c in idle.values()))


def _by_priority(columns: _Columns, program: IntegerProgram, cost: Floats) -> Optimum:
    """Serve the most of each priority in turn, then at the least value."""
    program = replace(program, least=np.zeros(len(cost)))
    priority = np.array([choice.priority for choice in columns.choices])
    for level in np.unique(priority):
        members = np.concatenate((np.zeros(len(columns.candidates)), (priority == level).astype(np.float64)))
        most = program.minimise(-members)
        assert most is not None  # serving nobody is always possible
        program = program.with_row(members, round(-most.cost))
    optimum = program.minimise(cost)
    assert optimum is not None  # what served so many still does
    return optimum


def _taken(columns: _Columns, optimum: Optimum) -> dict[str, Candidate]:
    """For each server its parts in one candidate, the largest first; who is served has one."""
    counts = optimum.amounts[: len(columns.candidates)]
    served = optimum.amounts[len(columns.candidates) :]
    answer = {}
    for s in np.flatnonzero(served).tolist():
        choice = columns.choices[s]
        parts = np.flatnonzero((columns.server == s) & (counts > 0)).tolist()
        total = sum(columns.rate[j] * counts[j] for j in parts)
        sized = [
            with_replicas(
                columns.candidates[j],
                int(counts[j]),
                rate_rps=_demand(choice) * columns.rate[j] * counts[j] / total,
                value=float(columns.value[j] * counts[j]),
            )
            for j in parts
        ]
        sized.sort(key=lambda c: (-c.allocation.capacity_rps, c.allocation.accelerator))
        first, *others = sized
        value = sum(part.value for part in sized)
        answer[choice.server.name] = replace(first, value=value, also=tuple(others))
    return answer
