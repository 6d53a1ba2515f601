"""Tree-structured Parzen estimator (Bergstra et al. 2011) over the latest points: good ones against the others.

l, g        densities of the good points and of the others: a sum of Gaussians, one a point, and a flat prior
score       log l - log g of candidates drawn from l; the highest is proposed

Points are ranked by feasibility first: one that breaks a promise less comes before one that breaks it more, and one
that failed comes last.
"""

from __future__ import annotations

import numpy as np

from flyball.tuner.online.cube import Cube, Matrix, Vector
from flyball.tuner.online.points import Suggestion
from flyball.tuner.online.remembering import Remembering

_STARTS = 10
_GOOD = 0.15  # share of the points that count as good
_MOST_GOOD = 15
_CANDIDATES = 24


class Tpe(Remembering):
    """See the module."""

    name = "tpe"

    def __init__(self, cube: Cube, *, seed: int, constraints: int = 0, start: Vector | None = None) -> None:
        super().__init__(cube, seed=seed, constraints=constraints, start=start, room=120)

    def _propose(self, pending: Matrix) -> Suggestion:
        points = self.points
        if points.n < _STARTS:
            return Suggestion(self._spread(pending), "one of the first, at random")
        order = self._ranked()
        count = min(max(2, int(_GOOD * points.n)), _MOST_GOOD)
        good, others = points.u[order[:count]], points.u[order[count:]]
        if len(pending):
            others = np.concatenate([others, pending])
        d = self._cube.size
        width = np.clip(good.std(axis=0) * 1.06 * count ** (-1.0 / (d + 4)), 0.02, 0.4)
        drawn = good[self._rng.integers(0, count, _CANDIDATES)] + width * self._rng.standard_normal((_CANDIDATES, d))
        drawn[-4:] = self._rng.random((4, d))
        drawn = self._cube.snap(np.where((drawn < 0) | (drawn > 1), self._rng.random(drawn.shape), drawn))
        score = _density(drawn, good, width) - _density(drawn, others, np.maximum(width, 0.1))
        rows = np.concatenate([points.u[: points.n], pending]) if len(pending) else points.u[: points.n]
        known = (np.abs(drawn[:, None, :] - rows).max(axis=2) < 1e-12).any(axis=1)
        if known.all():
            return Suggestion(self._spread(pending), "at random: every candidate is known")
        best = int(np.where(known, -np.inf, score).argmax())
        return Suggestion(drawn[best], f"likeliest to be among the best {count}")

    def _ranked(self) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
        points, n = self.points, self.points.n
        broken = np.maximum(points.y[:n, 1:], 0.0).sum(axis=1)
        return np.lexsort((points.y[:n, 0], broken, points.failed[:n]))


def _density(at: Matrix, points: Matrix, width: Vector) -> Vector:
    """Log density of a sum of Gaussians with one flat component."""
    z = (at[:, None, :] - points) / width
    peaks = np.exp(-0.5 * (z**2).sum(axis=2)).sum(axis=1) / float(np.prod(width * np.sqrt(2 * np.pi)))
    return np.asarray(np.log((peaks + 1.0) / (len(points) + 1)))
