"""A nearly best plan for very large fleets: limits get prices, at which every server then chooses for itself.

symbol  meaning
v_j     value of candidate j; u_jt what it takes of limit t; cap_t the limit
p_t     price of a unit of limit t, at least 0
q(p)    Σ_s min_{j of s} (v_j + Σ_t p_t u_jt) - Σ_t p_t cap_t: no plan that serves everybody has a smaller value

The prices that make q largest are approached by cutting planes (Kelley, 1960), tried halfway to the best so far
(Ben-Ameur and Neto, 2007). At the best prices servers take their candidates; what is then over a limit is moved where
it costs least, and what room is left is given to those who gain most. Where not everybody fits, a server may also take
nothing, at a value that grows with its priority, so that prices tell whom to leave out; and what is left out is served
in place of lower priorities where that makes room. The bound q is of the servers that are served.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import highspy
import numpy as np
from scipy.sparse import csr_array

from flyball.core.clock import Clock, SystemClock
from flyball.numerics.markov import Floats, Ints
from flyball.planner.problem import Candidate, Choice, Problem
from flyball.planner.solvers import ROUNDING, Solution, left_after, no_room

SHARE_AFTER_OTHERS = 0.1  # of a time limit that another solver has used up
_DEARER, _MOST_RANKS = 16.0, 6  # nothing is so many times dearer to a priority than to the next, for so many
_ROUNDS = 200  # of prices
_MET = 1e-7  # relative distance of q from the model of its cutting planes, at which prices are best
_PASSES = 8  # of moves


def solve(problem: Problem, *, time_limit_s: float, clock: Clock | None = None) -> Solution:
    """A plan within the time limit; with none left, that of the prices found so far."""
    clock = clock or SystemClock()
    deadline_s = clock.now_s() + time_limit_s
    choices = sorted((c for c in problem.choices if c.candidates), key=lambda c: c.server.name)
    taken: dict[str, Candidate] = {}
    bound = 0.0
    if choices:
        columns = _Columns.of(choices, problem)
        prices, bound = _best_prices(columns, clock, deadline_s)
        assignment = _Assignment.at(columns, prices)
        if not assignment.settle():
            columns_or_nothing = columns.with_nothing()
            prices, _ = _best_prices(columns_or_nothing, clock, deadline_s)
            assignment = _Assignment.at(columns_or_nothing, prices)
            assignment.ration()
            served = columns.of_servers(np.array([j >= 0 for j in assignment.chosen]))
            bound = _best_prices(served, clock, deadline_s)[1] if len(served.first) else 0.0
        taken = {choices[s].server.name: found for s, found in enumerate(assignment.found()) if found is not None}
    left = left_after(problem, taken.values())
    chosen = tuple(taken.get(choice.server.name) for choice in problem.choices)
    reasons = tuple("" if got else no_room(choice, left) for choice, got in zip(problem.choices, chosen, strict=True))
    return Solution(chosen=chosen, reasons=reasons, bound=bound)


@dataclass(frozen=True, slots=True, eq=False)
class _Columns:
    """Candidates in order of their servers."""

    candidates: tuple[Candidate | None, ...]  # None: nothing
    server: Ints  # of each candidate
    first: Ints  # candidate of each server
    priority: Ints  # of each server
    value: Floats
    uses: csr_array  # [candidate, limit]
    limits: Floats

    @classmethod
    def of(cls, choices: Sequence[Choice], problem: Problem) -> _Columns:
        candidates = tuple(c for choice in choices for c in choice.candidates)
        counts = [len(choice.candidates) for choice in choices]
        uses = [(j, name, amount) for j, c in enumerate(candidates) for name, amount in c.uses]
        names = sorted({name for _, name, _ in uses if math.isfinite(problem.capacity.get(name, 0))})
        at = {name: t for t, name in enumerate(names)}
        kept = [(j, at[name], amount) for j, name, amount in uses if name in at]
        rows, across, amounts = zip(*kept, strict=True) if kept else ((), (), ())
        return cls(
            candidates=candidates,
            server=np.repeat(np.arange(len(choices)), counts),
            first=np.concatenate(([0], np.cumsum(counts)[:-1])).astype(np.int64),
            priority=np.array([choice.priority for choice in choices]),
            value=np.array([c.value for c in candidates]),
            uses=csr_array((amounts, (rows, across)), shape=(len(candidates), len(names))),
            limits=np.array([float(problem.capacity.get(name, 0)) for name in names]),
        )

    def of_servers(self, served: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> _Columns:
        """Those of some servers."""
        kept = np.flatnonzero(served[self.server])
        counts = np.bincount(self.server, minlength=len(self.first))[served]
        return replace(
            self,
            candidates=tuple(self.candidates[j] for j in kept.tolist()),
            server=np.repeat(np.arange(len(counts)), counts),
            first=np.concatenate(([0], np.cumsum(counts)[:-1])).astype(np.int64),
            priority=self.priority[served],
            value=self.value[kept],
            uses=self.uses[kept],
        )

    def with_nothing(self) -> _Columns:
        """Each server gets one candidate more, last: nothing, at a value that grows with its priority."""
        ends = np.append(self.first[1:], len(self.server))
        ranks = np.unique(-self.priority, return_inverse=True)[1]
        dear = 4 * (np.abs(self.value).max() + 1.0) * _DEARER ** np.minimum(ranks, _MOST_RANKS).astype(np.float64)
        old = np.insert(np.arange(len(self.server)), ends, -1)  # -1: one of the new
        given = old >= 0
        steps = np.concatenate(([0], np.cumsum(np.where(given, np.diff(self.uses.indptr)[old], 0))))
        return replace(
            self,
            candidates=tuple(self.candidates[j] if j >= 0 else None for j in old.tolist()),
            server=np.insert(self.server, ends, np.arange(len(ends))),
            first=self.first + np.arange(len(ends)),
            value=np.insert(self.value, ends, dear),
            uses=csr_array((self.uses.data, self.uses.indices, steps), shape=(len(old), len(self.limits))),
        )

    def priced(self, prices: Floats) -> Floats:
        """What each candidate costs at these prices."""
        return np.asarray(self.value + self.uses @ prices)

    def cheapest(self, priced: Floats) -> Ints:
        """For each server its candidate of least priced value, the first of equals."""
        least = np.minimum.reduceat(priced, self.first)
        hits = np.flatnonzero(priced <= least[self.server])
        return hits[np.searchsorted(self.server[hits], np.arange(len(self.first)))]


def _best_prices(columns: _Columns, clock: Clock, deadline_s: float) -> tuple[Floats, float]:
    """Prices that make q about the largest, and q there."""
    limits = columns.limits
    best, best_q = np.zeros(len(limits)), -math.inf
    planes, trial = _Planes.of(columns), np.zeros(len(limits))
    for _ in range(_ROUNDS):
        priced = columns.priced(trial)
        taken = columns.cheapest(priced)
        q = float(priced[taken].sum() - trial @ limits)
        slope = np.asarray(columns.uses[taken].sum(axis=0)).ravel() - limits
        if q > best_q:
            best, best_q = trial, q
        if not len(limits) or clock.now_s() >= deadline_s:
            break
        planes.add(slope, q - float(slope @ trial))
        summit, model_q = planes.summit()
        if model_q - best_q <= _MET * max(abs(best_q), 1.0):
            break
        trial = (best + summit) / 2
    return best, best_q


@dataclass(slots=True)
class _Planes:
    """Cutting planes over q: q(p) <= slope @ p + height for each."""

    highs: highspy.Highs
    count: int  # of prices

    @classmethod
    def of(cls, columns: _Columns) -> _Planes:
        highs = highspy.Highs()
        highs.setOptionValue("output_flag", False)
        highs.setOptionValue("threads", 1)
        count = len(columns.limits)
        amounts = columns.uses.data[columns.uses.data > 0]
        most = (np.ptp(columns.value) + 1.0) / amounts.min() if len(amounts) else 1.0  # no price need be higher
        for _ in range(count):
            highs.addVar(0.0, float(most))
        highs.addVar(-highspy.kHighsInf, highspy.kHighsInf)
        highs.changeColCost(count, -1.0)
        return cls(highs, count)

    def add(self, slope: Floats, height: float) -> None:
        index = np.arange(self.count + 1, dtype=np.int32)
        self.highs.addRow(-highspy.kHighsInf, height, self.count + 1, index, np.append(-slope, 1.0))

    def summit(self) -> tuple[Floats, float]:
        """Where the planes let q be largest, and how large."""
        self.highs.run()
        found = np.asarray(self.highs.getSolution().col_value)
        return found[:-1], float(found[-1])


@dataclass(slots=True)
class _Assignment:
    """A candidate for each server, or -1, and what is left of the limits."""

    columns: _Columns
    priced: Floats
    chosen: list[int]
    left: list[float]
    rows: list[list[tuple[int, float]]] = field(default_factory=list)  # limits and amounts of each candidate

    @classmethod
    def at(cls, columns: _Columns, prices: Floats) -> _Assignment:
        """What servers choose at these prices."""
        priced = columns.priced(prices)
        taken = columns.cheapest(priced)
        left = columns.limits - np.asarray(columns.uses[taken].sum(axis=0)).ravel()
        uses = columns.uses
        ends = zip(uses.indptr[:-1].tolist(), uses.indptr[1:].tolist(), strict=True)
        entries = list(zip(uses.indices.tolist(), uses.data.tolist(), strict=True))
        return cls(columns, priced, taken.tolist(), left.tolist(), [entries[a:b] for a, b in ends])

    def found(self) -> list[Candidate | None]:
        """For each server what it got."""
        return [self.columns.candidates[j] if j >= 0 else None for j in self.chosen]

    def settle(self) -> bool:
        """Bring everything within the limits, then use what room is left; False if not everybody fits."""
        for _ in range(_PASSES):
            if not (self._over() and self._relieve()):
                break
        if self._over():
            return False
        for _ in range(_PASSES):
            if not self._gain():
                break
        return True

    def ration(self) -> None:
        """The same where not everybody fits: those of higher priority first."""
        self.settle()
        self._drop()
        self.chosen = [j if j >= 0 and self.columns.candidates[j] is not None else -1 for j in self.chosen]
        for _ in range(_PASSES):
            served = self._serve()
            if not (self._gain() or served):
                break

    def _over(self) -> bool:
        return min(self.left, default=0.0) < -ROUNDING

    def _fits(self, j: int, instead: int = -1) -> bool:
        """Whether there is room for a candidate in place of another."""
        freed = dict(self.rows[instead]) if instead >= 0 else {}
        return all(amount <= self.left[t] + freed.get(t, 0.0) + ROUNDING for t, amount in self.rows[j])

    def _move(self, s: int, j: int) -> None:
        """Give server s candidate j (or -1) for what it has."""
        if self.chosen[s] >= 0:
            for t, amount in self.rows[self.chosen[s]]:
                self.left[t] += amount
        if j >= 0:
            for t, amount in self.rows[j]:
                self.left[t] -= amount
        self.chosen[s] = j

    def _moves(self, gains: Floats, wanted: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> bool:
        """Try moves in order of what they gain, largest first; whether any was made."""
        order = np.flatnonzero(wanted)
        made = False
        moved: set[int] = set()
        for j in order[np.argsort(-gains[order], kind="stable")].tolist():
            s = int(self.columns.server[j])
            if s not in moved and self._useful(s, j):
                self._move(s, j)
                moved.add(s)
                made = True
        return made

    def _useful(self, s: int, j: int) -> bool:
        """Whether a move fits; where something is over its limit, whether it also relieves that."""
        held = self.chosen[s]
        if not self._over():
            return self._fits(j, held)
        now, then = dict(self.rows[held]), dict(self.rows[j])
        relieves = any(self.left[t] < -ROUNDING and then.get(t, 0.0) < amount for t, amount in now.items())
        return relieves and all(
            amount <= max(self.left[t], 0.0) + now.get(t, 0.0) + ROUNDING for t, amount in then.items()
        )

    def _relieve(self) -> bool:
        """Move servers off what is over its limit, the least priced loss for each unit relieved first."""
        over = np.array(self.left) < -ROUNDING
        held = np.array(self.chosen)
        load = np.asarray(self.columns.uses[:, np.flatnonzero(over)].sum(axis=1)).ravel()
        relief = load[held][self.columns.server] - load
        loss = self.priced - self.priced[held][self.columns.server]
        return self._moves(-loss / np.maximum(relief, ROUNDING), relief > ROUNDING)

    def _gain(self) -> bool:
        """Move servers to better candidates where there is room, in order of what they gain at the prices."""
        held = np.array(self.chosen)
        served, here = (held >= 0)[self.columns.server], held[self.columns.server]
        gains = self.columns.value[here] - self.columns.value
        wanted = served & (gains > ROUNDING * np.maximum(np.abs(self.columns.value), 1.0))
        return self._moves(self.priced[here] - self.priced, wanted)

    def _drop(self) -> None:
        """Give up servers of the lowest priority while something is over its limit, the largest first."""
        for t in range(len(self.left)):
            users = [(s, dict(self.rows[j]).get(t, 0.0)) for s, j in enumerate(self.chosen) if j >= 0]
            users = [(s, amount) for s, amount in users if amount > 0]
            users.sort(key=lambda u: (-int(self.columns.priority[u[0]]), -u[1], u[0]))
            for s, _ in users:
                if self.left[t] >= -ROUNDING:
                    break
                self._move(s, -1)

    def _serve(self) -> bool:
        """Serve who is not, by priority, also in place of those of lower priority; whether anybody gained."""
        waiting = [s for s, j in enumerate(self.chosen) if j < 0]
        waiting.sort(key=lambda s: (int(self.columns.priority[s]), s))
        served = [s for s in waiting if self._serve_one(s)]
        return bool(served)

    def _serve_one(self, s: int) -> bool:
        ends = np.append(self.columns.first, len(self.columns.server))
        own = range(int(ends[s]), int(ends[s + 1]) - 1)  # the last is nothing
        for j in own:
            if self._fits(j):
                self._move(s, j)
                return True
        return any(self._displace(s, j) for j in own)

    def _displace(self, s: int, j: int) -> bool:
        """Make room for candidate j by giving up servers of lower priority, if that is enough."""
        priority = self.columns.priority
        needed = {t: amount - self.left[t] for t, amount in self.rows[j] if amount > self.left[t] + ROUNDING}
        lower = [o for o, k in enumerate(self.chosen) if k >= 0 and priority[o] > priority[s]]
        lower.sort(key=lambda o: (-int(priority[o]), o))
        given_up = []
        for o in lower:
            uses = dict(self.rows[self.chosen[o]])
            if any(uses.get(t, 0.0) > 0 for t in needed):
                given_up.append(o)
                needed = {t: rest for t, n in needed.items() if (rest := n - uses.get(t, 0.0)) > ROUNDING}
            if not needed:
                break
        if needed:
            return False
        for o in given_up:
            self._move(o, -1)
        self._move(s, j)
        return True
