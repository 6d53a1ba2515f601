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

Where a server's mixes of replicas can be listed, one of them is chosen for each server instead (`mixes`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import csr_array, vstack

from flyball.numerics.markov import Floats, Ints
from flyball.planner.problem import MOVE_PENALTY, Candidate, Choice, Problem, with_replicas
from flyball.planner.solvers import Solution, approximate, left_after, no_room
from flyball.planner.solvers.mixes import mixes
from flyball.planner.solvers.program import Budget, IntegerProgram, Optimum, OutOfTime

_GAP = 1e-4  # relative, at which an optimum counts as proven
_MOST_MIXES, _MEAN_MIXES = 5000, 100  # of one server, and of all on average, to be listed
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

    def by_mixes(self, capacity: Mapping[str, float], budget: Budget) -> Optimum | None:
        """Choose one mix of replicas for each server; None where there are too many to list."""
        first = np.concatenate(([0], np.cumsum([len(choice.candidates) for choice in self.choices])))
        entries: list[tuple[int, int, int]] = []  # mix, candidate, replicas
        server: list[int] = []
        for s, choice in enumerate(self.choices):
            rates = self.rate[first[s] : first[s + 1]].tolist()
            most = choice.server.max_replicas or math.inf
            ways = mixes(rates, _demand(choice), max(choice.server.min_replicas, 1), most, limit=_MOST_MIXES)
            if ways is None or len(server) > _MOST_MIXES + _MEAN_MIXES * len(self.choices):
                return None
            for way in ways:
                entries.extend((len(server), int(first[s]) + a, n) for a, n in enumerate(way) if n)
                server.append(s)
        mix, candidate, replicas = np.array(entries).T
        counts = csr_array((replicas.astype(np.float64), (mix, candidate)), shape=(len(server), len(self.candidates)))
        each, limits = self._uses(capacity)
        of = np.array(server)
        incidence = csr_array((np.ones(len(of)), (of, np.arange(len(of)))), shape=(len(self.choices), len(of)))
        everybody = np.ones(len(self.choices))
        program = IntegerProgram(
            rows=vstack((incidence, (counts @ each).T), format="csr"),
            low=np.concatenate((everybody, np.full(len(limits), -np.inf))),
            high=np.concatenate((everybody, limits)),
            least=np.zeros(len(of)),
            most=np.ones(len(of)),
            budget=budget,
            gap=_GAP,
            sift=True,
        )
        priority = np.array([choice.priority for choice in self.choices])
        best = program.one_each(counts @ self.value, of, priority)
        return best._replace(amounts=np.concatenate((counts.T @ best.amounts, incidence @ best.amounts)))

    def by_counts(self, capacity: Mapping[str, float], budget: Budget) -> Optimum:
        """Count replicas of each candidate."""
        program = self.program(capacity, budget)
        cost = np.concatenate((self.value, np.zeros(len(self.choices))))
        return program.minimise(cost) or _by_priority(self, program, cost)

    def _uses(self, capacity: Mapping[str, float]) -> tuple[csr_array, Floats]:
        """What a replica of each candidate takes of each limit, and the limits."""
        uses = [
            (j, name, amount / c.allocation.replicas) for j, c in enumerate(self.candidates) for name, amount in c.uses
        ]
        column = {name: t for t, name in enumerate(sorted({name for _, name, _ in uses}))}
        each = csr_array(
            ([amount for _, _, amount in uses], ([j for j, _, _ in uses], [column[name] for _, name, _ in uses])),
            shape=(len(self.candidates), len(column)),
        )
        return each, np.array([float(capacity.get(name, 0)) for name in column])

    def program(self, capacity: Mapping[str, float], budget: Budget) -> IntegerProgram:
        """Columns n, then y; rows: for each server a demand, its fewest and its most replicas; then one a limit."""
        servers, columns = len(self.choices), len(self.candidates)
        each, limits = self._uses(capacity)
        using, limit = each.nonzero()
        n, y = np.arange(columns), columns + np.arange(servers)
        demand = np.array([_demand(choice) * (1 - _SLACK) for choice in self.choices])
        least = np.array([max(choice.server.min_replicas, 1) for choice in self.choices], dtype=np.float64)
        most = np.array([choice.server.max_replicas or np.inf for choice in self.choices])
        entries = np.concatenate((self.rate, -demand, np.ones(columns), -least, np.ones(columns), each[using, limit]))
        at = np.concatenate((
            self.server, np.arange(servers), servers + self.server, servers + np.arange(servers),
            2 * servers + self.server, 3 * servers + limit,
        ))  # fmt: skip
        across = np.concatenate((n, y, n, y, n, using))
        rows = csr_array((entries, (at, across)), shape=(3 * servers + len(limits), columns + servers))
        return IntegerProgram(
            rows=rows,
            low=np.concatenate((np.zeros(2 * servers), np.full(servers + len(limits), -np.inf))),
            high=np.concatenate((np.full(2 * servers, np.inf), most, limits)),
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
        budget = Budget(time_limit_s)
        optimum = columns.by_mixes(problem.capacity, budget) or columns.by_counts(problem.capacity, budget)
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
