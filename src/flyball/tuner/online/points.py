"""What a proposer remembers: measured points, bounded in number, repeated measurements merged into one row.

A row holds the point, mean and number of its measurements, the means of its margins, and whether it failed. When
there is no room the oldest row goes, never the protected one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flyball.tuner.online.cube import Matrix, Vector

REPEATS = 12  # measurements that a row's mean remembers: older ones fade, so that a slow drift is followed


class Seen(NamedTuple):
    """One measurement as proposers see it: cost to be minimised, margins to stay at or below 0."""

    u: Vector
    cost: float  # finite, unless it failed
    margins: tuple[float, ...] = ()
    failed: bool = False


@dataclass
class Points:
    """The rows; arrays have `room` rows of which the first `n` are in use."""

    room: int
    size: int
    constraints: int

    def __post_init__(self) -> None:
        self.n = 0
        self.u: Matrix = np.zeros((self.room, self.size))
        self.y = np.zeros((self.room, 1 + self.constraints))  # cost, then margins
        self.count = np.zeros(self.room)
        self.failed = np.zeros(self.room, dtype=bool)
        self.age = np.zeros(self.room)  # the tick of the last measurement
        self.tick = 0
        self.noise = 0.0  # variance of one measurement of the cost
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
        delta = seen.cost - self.y[i, 0]
        spread = delta * delta * (count - 1) / count  # its expectation is the variance of one measurement
        self.pairs = min(self.pairs + 1, 4 * REPEATS)
        self.noise += (spread - self.noise) / self.pairs
        self.y[i, 0] += delta / count
        if self.constraints:
            self.y[i, 1:] += (np.asarray(seen.margins) - self.y[i, 1:]) / count
        self.count[i] = count
        self.age[i] = self.tick

    def _oldest(self, keep: int | None) -> int:
        ages = self.age[: self.n].copy()
        if keep is not None:
            ages[keep] = np.inf
        return int(ages.argmin())

    def feasible(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Which rows were measured and kept every promise."""
        good = ~self.failed[: self.n]
        if self.constraints:
            good &= (self.y[: self.n, 1:] <= 0).all(axis=1)
        return good

    def best(self) -> int | None:
        """The incumbent: the least cost of the rows that kept every promise, each counted with its own uncertainty;
        if none did, the row that was nearest to it; None if nothing was measured."""
        n = self.n
        if not n or self.failed[:n].all():
            return None
        if self.constraints:
            broken = np.where(self.failed[:n], np.inf, np.maximum(self.y[:n, 1:], 0.0).sum(axis=1))
            least = broken.min()
            cost = np.where(broken > least, np.inf, self.y[:n, 0])
        else:
            cost = np.where(self.failed[:n], np.inf, self.y[:n, 0])
        if self.noise > 0:
            cost = cost + np.sqrt(self.noise / self.count[:n])
        return int(cost.argmin())

    def keep_only(self, i: int) -> None:
        """Forget all rows but one, and its repeats."""
        for array in (self.u, self.y, self.count, self.failed, self.age):
            array[0] = array[i]
        self.n = 1
        self.count[0] = 1
