"""Nelder and Mead's simplex (1965), asked and told; once collapsed it starts again, smaller, at its best."""

from __future__ import annotations

from typing import Literal

import numpy as np

from flyball.tuner.online.cube import Cube, Matrix, Vector
from flyball.tuner.online.points import Seen, Suggestion, among
from flyball.tuner.online.remembering import Remembering

_FIRST = 0.25  # edge of the first simplex
_LEAST = 0.02  # of a later one
_COLLAPSED = 1e-3
_BROKEN = 1e30  # cost of a broken promise, beyond any other
_Move = Literal["build", "reflect", "expand", "contract", "shrink"]


class NelderMead(Remembering):
    """Reflect, expand, contract, shrink; a point that failed or breaks a promise counts as worse than any other."""

    name = "nelder-mead"

    def __init__(self, cube: Cube, *, seed: int, constraints: int = 0, start: Vector | None = None) -> None:
        super().__init__(cube, seed=seed, constraints=constraints)
        self._edge = _FIRST
        self._begin(start if start is not None else self._rng.random(cube.size))

    def _begin(self, corner: Vector) -> None:
        self._simplex: list[tuple[float, Vector]] = []
        self._asked: list[tuple[_Move, Vector]] = []
        self._reflected: tuple[float, Vector] | None = None
        points = np.tile(corner, (self._cube.size + 1, 1))
        for i in range(self._cube.size):
            points[i + 1, i] += self._edge if corner[i] < 0.5 else -self._edge
        self._queue: list[tuple[_Move, Vector]] = [("build", u) for u in self._cube.snap(points)]

    def _propose(self, pending: Matrix) -> Suggestion:
        if not self._queue:
            return Suggestion(self._near(pending), "near the best, while the simplex waits")
        move, u = self._queue.pop(0)
        if among(u, pending):
            u = self._near(pending)
        self._asked.append((move, u))
        return Suggestion(u, f"the simplex: {move}")

    def _near(self, pending: Matrix) -> Vector:
        best = self.incumbent
        if best is not None:
            for reach in (0.02, 0.1, 0.5):
                steps = reach * self._rng.standard_normal((8, self._cube.size))
                for u in self._cube.snap(self.points.u[best] + steps):
                    if not among(u, pending):
                        return np.asarray(u)
        return self._spread(pending)

    def _told(self, seen: Seen) -> None:
        """Only the simplex's own points move it."""
        for i, (move, u) in enumerate(self._asked):
            if (u == seen.u).all():
                del self._asked[i]
                broken = sum(max(0.0, m) for m in seen.margins)
                self._moved(move, np.inf if seen.failed else _BROKEN * (1 + broken) if broken else seen.cost, u)
                return

    def _moved(self, move: _Move, cost: float, u: Vector) -> None:
        if move in ("build", "shrink"):
            self._simplex.append((cost, u))
        elif move == "reflect":
            self._reflect_told(cost, u)
        elif move == "expand" and self._reflected is not None:
            self._replace(min((cost, u), self._reflected, key=lambda vertex: vertex[0]))
        elif self._reflected is not None and cost <= min(self._reflected[0], self._simplex[-1][0]):
            self._replace((cost, u))
        else:
            self._shrink()
        if not self._queue and not self._asked and len(self._simplex) == self._cube.size + 1:
            self._next()

    def _next(self) -> None:
        self._simplex.sort(key=lambda vertex: vertex[0])
        best = self._simplex[0][1]
        if max(float(np.abs(u - best).max()) for _, u in self._simplex) < _COLLAPSED:
            self._edge = max(self._edge * 0.5, _LEAST)
            self._begin(best)
            return
        self._put("reflect", 2.0 * self._centre() - self._simplex[-1][1])

    def _centre(self) -> Vector:
        """Of all corners but the worst."""
        return np.asarray(np.mean([u for _, u in self._simplex[:-1]], axis=0))

    def _put(self, move: _Move, u: Vector) -> None:
        self._queue.append((move, self._cube.snap(u[None, :])[0]))

    def _reflect_told(self, cost: float, u: Vector) -> None:
        centre = self._centre()
        self._reflected = (cost, u)
        if cost < self._simplex[0][0]:
            self._put("expand", centre + 2.0 * (u - centre))
        elif cost < self._simplex[-2][0]:
            self._replace((cost, u))
        else:
            toward = u if cost < self._simplex[-1][0] else self._simplex[-1][1]
            self._put("contract", centre + 0.5 * (toward - centre))

    def _replace(self, vertex: tuple[float, Vector]) -> None:
        self._simplex[-1] = vertex
        self._reflected = None

    def _shrink(self) -> None:
        self._reflected = None
        best, *others = self._simplex
        self._simplex = [best]
        for _, u in others:
            self._put("shrink", best[1] + 0.5 * (u - best[1]))

    def forget(self, row: int | None = None) -> None:
        """The world has changed: a wide simplex at the incumbent."""
        super().forget(row)
        self._edge = _FIRST
        self._begin(self.points.u[0].copy() if self.points.n else self._rng.random(self._cube.size))
