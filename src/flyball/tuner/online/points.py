"""What a proposer remembers: measured points, bounded in number, repeated measurements merged into one row.

A row holds the point, mean and number of its measurements, the means of its margins, and whether it failed. When
there is no room the oldest row goes, or one of two that are nearly the same; never the protected one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flyball.tuner.online.cube import Matrix, Vector

SURE = 1.65  # standard deviations that a margin keeps: 95 measurements in 100 then keep the promise
REPEATS = 12  # measurements that a row's mean remembers: older ones fade, so that a slow drift is followed


class Seen(NamedTuple):
    """One measurement as proposers see it: cost to be minimised, margins to stay at or below 0."""

    u: Vector
    cost: float  # finite, unless it failed
    margins: tuple[float, ...] = ()
    failed: bool = False


class Suggestion(NamedTuple):
    """A point to measure, and why."""

    u: Vector
    why: str


def among(u: Vector, pending: Matrix) -> bool:
    """Whether a point is one of those that are being measured."""
    return bool(len(pending)) and bool((pending == u).all(axis=1).any())


@dataclass
class Points:
    """The rows; arrays have `room` rows of which the first `n` are in use."""

    room: int
    size: int
    constraints: int
    spread_out: bool = False  # forget the older of the nearest two rows, not the oldest

    def __post_init__(self) -> None:
        self.n = 0
        self.u: Matrix = np.zeros((self.room, self.size))
        self.y = np.zeros((self.room, 1 + self.constraints))  # cost, then margins
        self.count = np.zeros(self.room)
        self.failed = np.zeros(self.room, dtype=bool)
        self.age = np.zeros(self.room)  # the tick of the last measurement
        self.tick = 0
        self.variance = np.zeros(1 + self.constraints)  # of one measurement of the cost and of each margin
        self.pairs = 0  # repeated measurements that it rests on

    def find(self, u: Vector) -> int | None:
        """The row at exactly this point."""
        if not self.n:
            return None
        same = (self.u[: self.n] == u).all(axis=1)
        i = int(same.argmax())
        return i if same[i] else None

    def add(self, seen: Seen, keep: int | None) -> int:
        """Remember a measurement; returns its row. `keep` is the row that may not be forgotten."""
        self.tick += 1
        i = self.find(seen.u)
        if i is not None and not seen.failed and not self.failed[i]:
            self._repeat(i, seen)
            return i
        if i is None:
            i = self.n if self.n < self.room else self._oldest(keep)
            self.n = max(self.n, i + 1)
        self.u[i] = seen.u
        self.y[i, 0] = seen.cost
        self.y[i, 1:] = seen.margins
        self.count[i] = 1
        self.failed[i] = seen.failed
        self.age[i] = self.tick
        return i

    def _repeat(self, i: int, seen: Seen) -> None:
        count = min(self.count[i] + 1, REPEATS)
        delta = np.array((seen.cost, *seen.margins)) - self.y[i]
        self.pairs = min(self.pairs + 1, 4 * REPEATS)
        spread = delta * delta * ((count - 1) / count)  # its expectation is the variance of one measurement
        self.variance += (spread - self.variance) / self.pairs
        self.y[i] += delta / count
        self.count[i] = count
        self.age[i] = self.tick

    def _oldest(self, keep: int | None) -> int:
        ages = self.age[: self.n].copy()
        if self.spread_out:  # the older of the nearest two
            u = self.u[: self.n]
            gaps = ((u[:, None, :] - u) ** 2).sum(axis=2)
            gaps.flat[:: self.n + 1] = np.inf
            if keep is not None:
                gaps[keep] = np.inf
            ages[gaps.min(axis=1) > gaps.min()] = np.inf
        if keep is not None:
            ages[keep] = np.inf
        return int(ages.argmin())

    @property
    def noise(self) -> float:
        """Variance of one measurement of the cost."""
        return float(self.variance[0])

    def margins(self) -> Matrix:
        """The margins that one more measurement of each row would probably not exceed."""
        seen = self.y[: self.n, 1:]
        if not self.pairs:
            return seen
        return np.asarray(seen + SURE * np.sqrt(self.variance[1:] * (1.0 + 1.0 / self.count[: self.n, None])))

    def feasible(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Which rows were measured and kept every promise."""
        good = ~self.failed[: self.n]
        if self.constraints:
            good &= (self.margins() <= 0).all(axis=1)
        return good

    def best(self) -> int | None:
        """The incumbent: the least cost of the rows that kept every promise, each counted with its own uncertainty;
        if none did, the row that was nearest to it; None if nothing was measured."""
        n = self.n
        if not n or self.failed[:n].all():
            return None
        if self.constraints:
            broken = np.where(self.failed[:n], np.inf, np.maximum(self.margins(), 0.0).sum(axis=1))
            least = broken.min()
            cost = np.where(broken > least, np.inf, self.y[:n, 0])
        else:
            cost = np.where(self.failed[:n], np.inf, self.y[:n, 0])
        if self.noise > 0:
            cost = cost + np.sqrt(self.noise / self.count[:n])
        return int(cost.argmin())

    def spread(self) -> float:
        """Between the quartiles of the costs; infinite for fewer than four rows."""
        usual = np.sort(self.y[: self.n, 0][~self.failed[: self.n]])
        return float(usual[3 * len(usual) // 4] - usual[len(usual) // 4]) if len(usual) > 3 else np.inf

    def changed(self, row: int, seen: Seen) -> bool:
        """Whether a point, measured again, is not what it was: beyond its noise, or by half of the usual spread."""
        off = abs(seen.cost - float(self.y[row, 0]))
        if off <= 1e-12 * abs(seen.cost):
            return False
        spread = self.spread()
        if self.pairs >= 3:
            return bool(off > 6.0 * np.sqrt(self.noise * (1.0 + 1.0 / self.count[row])) + 0.02 * spread)
        return bool(off > 0.5 * spread)

    def keep_only(self, i: int) -> None:
        """Forget all rows but one, and its repeats."""
        for array in (self.u, self.y, self.count, self.failed, self.age):
            array[0] = array[i]
        self.n = 1
        self.count[0] = 1
