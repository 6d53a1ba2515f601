"""What Nelder-Mead, TPE and the Bayesian proposer share: points, the incumbent measured again, and forgetting."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from flyball.tuner.online.cube import Cube, Matrix, Vector
from flyball.tuner.online.points import Points, Seen, Suggestion, among

AGAIN = 10  # asks from one measurement of the incumbent to the next


class Remembering(ABC):
    """Every tenth ask the incumbent is measured again; if it is not what it was, the world has changed."""

    def __init__(
        self, cube: Cube, *, seed: int, constraints: int = 0, start: Vector | None = None, room: int = 200
    ) -> None:
        self._cube = cube
        self._rng = np.random.default_rng(seed)
        self.points = Points(room=room, size=cube.size, constraints=constraints)
        self._start = start
        self._asks = 0
        self._check = False

    def ask(self, pending: Matrix) -> Suggestion:
        """The next point; it differs from every pending one."""
        self._asks += 1
        best = self.incumbent
        due = self._check or self._asks % AGAIN == 0
        if best is not None and due and not among(self.points.u[best], pending):
            self._check = False
            return Suggestion(self.points.u[best].copy(), "the incumbent again")
        if self._start is not None:
            start, self._start = self._start, None
            return Suggestion(start, "the start")
        return self._propose(pending)

    def tell(self, seen: Seen) -> None:
        """One measurement, asked for or not."""
        best, at = self.incumbent, self.points.find(seen.u)
        if at is not None and at == best and not seen.failed and self.points.changed(at, seen):
            self.points.y[at, 0], self.points.y[at, 1:] = seen.cost, seen.margins
            self.forget(at)
            return
        self.points.add(seen, best)
        self._told(seen)

    def recheck(self) -> None:
        """Measure the incumbent before anything else."""
        self._check = True

    def forget(self, row: int | None = None) -> None:
        """The world has changed: only the incumbent is kept."""
        row = self.incumbent if row is None else row
        if row is not None:
            self.points.keep_only(row)

    @property
    def incumbent(self) -> int | None:
        """The row of the best point."""
        return self.points.best()

    def _spread(self, pending: Matrix) -> Vector:
        """A random point that is not pending."""
        around = self._cube.snap(self._rng.random((16, self._cube.size)))
        return np.asarray(next((u for u in around if not among(u, pending)), around[0]))

    @abstractmethod
    def _propose(self, pending: Matrix) -> Suggestion: ...

    def _told(self, seen: Seen) -> None:  # noqa: B027  # most have nothing to add
        """Learn from a measurement that was added."""
