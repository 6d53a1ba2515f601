"""A contextual Gaussian process over a bounded set of points: knobs and context in, cost and margins out.

x           a point of the cube, then the context scaled by its own spread                 [n, d + c]
K           exp(-|x - x'|² / 2 over lengths) + noise: covariance of the points kept         [n, n]
μ, σ        mean and deviation at a candidate under the context of now
LCB         μ - κ σ: the least is proposed, among candidates that probably keep every promise

At most `ROOM` points are kept, the nearest in context and the latest; lengths are chosen every `FIT` tells from a small
grid by marginal likelihood. Context is an input (Krause and Ong, 2011), so that a traffic pattern that comes back is
answered with what was learnt under it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flyball.tuner.online.cube import Cube, Matrix, Vector
from flyball.tuner.online.points import Points, Seen, Suggestion, among

ROOM = 64
_FIT = 8
_STARTS = 6
_CANDIDATES = 48
_KAPPA = 1.0
_LENGTHS = (0.1, 0.2, 0.35, 0.6)


class Bayes:
    """See the module."""

    name = "bayes"

    def __init__(
        self, cube: Cube, *, seed: int, constraints: int = 0, start: Vector | None = None, context: int = 0
    ) -> None:
        self._cube = cube
        self._rng = np.random.default_rng(seed)
        self._c = context
        self.points = Points(room=ROOM, size=cube.size + context, constraints=constraints, spread_out=True)
        self._context = np.zeros(context)
        self._start = start
        self._length = 0.35
        self._check = False
        self._asks = 0

    def enter(self, context: Sequence[float]) -> None:
        """From now on points are measured under this context."""
        self._context = np.asarray(context, dtype=float)

    def ask(self, pending: Matrix) -> Suggestion:
        """The candidate whose cost may be lowest under the context of now."""
        self._asks += 1
        if self._start is not None:
            start, self._start = self._start, None
            return Suggestion(start, "the start")
        best = self.incumbent
        if best is None or self.points.n < _STARTS:
            return Suggestion(self._free(self._rng.random((16, self._cube.size)), pending), "one of the first")
        known = self.points.u[best, : self._cube.size]
        if (self._check or self._asks % 10 == 0) and not among(known, pending):
            self._check = False
            return Suggestion(known.copy(), "the incumbent again")
        u = self._around(known)
        mean, deviation = self._predict(u)
        bound = mean[:, 0] - _KAPPA * deviation
        if mean.shape[1] > 1:
            broken = np.maximum(mean[:, 1:] + 0.5 * deviation[:, None], 0.0).sum(axis=1)
            bound = np.where(broken > broken.min() + 1e-12, np.inf, bound)
        order = np.argsort(bound, kind="stable")
        chosen = next((u[i] for i in order if not among(u[i], pending)), None)
        if chosen is None:
            return Suggestion(self._free(self._rng.random((16, self._cube.size)), pending), "at random")
        return Suggestion(chosen, "lowest confidence bound of the cost under this context")

    def _around(self, known: Vector) -> Matrix:
        third = _CANDIDATES // 3
        d = self._cube.size
        near = known + self._rng.standard_normal((2 * third, d)) * np.repeat([0.03, 0.15], third)[:, None]
        return self._cube.snap(np.concatenate([near, self._rng.random((third, d)), known[None, :]]))

    def _free(self, u: Matrix, pending: Matrix) -> Vector:
        u = self._cube.snap(u)
        return np.asarray(next((x for x in u if not among(x, pending)), u[0]))

    def _scaled(self, x: Matrix) -> Matrix:
        return np.asarray(x / self._length)

    def _predict(self, u: Matrix) -> tuple[Matrix, Vector]:
        points, n = self.points, self.points.n
        good = ~points.failed[:n]
        rows, y = points.u[:n][good], points.y[:n][good].copy()
        centre, scale = y.mean(axis=0), y.std(axis=0) + 1e-12
        y = (y - centre) / scale
        kernel = _kernel(self._scaled(rows), self._scaled(rows))
        kernel.flat[:: len(rows) + 1] += 1e-4 + min(points.noise / scale[0] ** 2, 1.0)
        at = np.concatenate([u, np.tile(self._context, (len(u), 1))], axis=1)
        cross = _kernel(self._scaled(at), self._scaled(rows))
        weights = np.linalg.solve(kernel, np.concatenate([y, cross.T], axis=1))
        mean = cross @ weights[:, : y.shape[1]]
        variance = np.maximum(1.0 - np.einsum("ij,ji->i", cross, weights[:, y.shape[1] :]), 1e-12)
        margins = mean[:, 1:] * scale[1:] + centre[1:]
        return np.concatenate([mean[:, :1], margins], axis=1), np.sqrt(variance)

    def tell(self, seen: Seen) -> None:
        """One measurement under the context of now."""
        x = np.concatenate([seen.u, self._context])
        best, at = self.incumbent, self.points.find(x)
        seen = seen._replace(u=x)
        if at is not None and at == best and not seen.failed and self.points.changed(at, seen):
            self.points.y[at, 0], self.points.y[at, 1:] = seen.cost, seen.margins
            self.forget(at)
            return
        self.points.add(seen, best)
        if self.points.tick % _FIT == 0 and self.points.n >= _STARTS:
            self._length = max(_LENGTHS, key=self._likelihood)

    def _likelihood(self, length: float) -> float:
        points, n = self.points, self.points.n
        good = ~points.failed[:n]
        rows, y = points.u[:n][good] / length, points.y[:n, 0][good]
        if len(rows) < 3:
            return 0.0
        y = (y - y.mean()) / (y.std() + 1e-12)
        kernel = _kernel(rows, rows)
        kernel.flat[:: len(rows) + 1] += 1e-4 + 1e-2
        lower = np.linalg.cholesky(kernel)
        white = np.linalg.solve(lower, y)
        return float(-0.5 * white @ white - np.log(np.diag(lower)).sum())

    def recheck(self) -> None:
        """Measure the incumbent before anything else."""
        self._check = True

    def forget(self, row: int | None = None) -> None:
        """The world has changed under this context: what was seen near it is forgotten."""
        row = self.incumbent if row is None else row
        if row is not None:
            self.points.keep_only(row)

    @property
    def incumbent(self) -> int | None:
        """The row of the best point under the context of now; of all, if none was measured under it."""
        points, n = self.points, self.points.n
        if not n or not self._c:
            return points.best()
        near = np.abs(points.u[:n, self._cube.size :] - self._context).max(axis=1) < 0.15
        usable = near & ~points.failed[:n]
        if not usable.any():
            return points.best()
        broken = np.maximum(points.y[:n, 1:], 0.0).sum(axis=1)
        return int(np.lexsort((points.y[:n, 0], broken, ~usable))[0])


def _kernel(a: Matrix, b: Matrix) -> Matrix:
    square = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2.0 * a @ b.T
    return np.asarray(np.exp(-0.5 * np.maximum(square, 0.0)))
