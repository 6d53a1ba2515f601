"""A bandit over approved variants: whole configurations that somebody has looked at, and nothing else.

m_i, n_i    discounted mean cost and number of measurements of variant i (Garivier and Moulines, 2011: D-UCB)
index       m_i - s sqrt(2 log N / n_i), s the spread of all costs; the least is measured next

Variants that broke a promise in the mean, or failed, are measured again only when their discounted number has faded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flyball.core.errors import InvalidInput
from flyball.tuner.online.cube import Cube, Matrix, Vector
from flyball.tuner.online.points import Points, Seen, Suggestion, among

FADE = 0.98  # what a measurement still counts after the next one


class Bandit:
    """See the module."""

    name = "bandit"

    def __init__(
        self, cube: Cube, *, seed: int, constraints: int = 0, start: Vector | None = None, variants: Sequence[Vector]
    ) -> None:
        if len(variants) < 2:
            raise InvalidInput(f"a bandit needs at least 2 approved variants, not {len(variants)}; add some")
        self.variants = cube.snap(np.array(variants))
        self._rng = np.random.default_rng(seed)
        self.points = Points(room=len(self.variants), size=cube.size, constraints=constraints)
        self._pulls = np.zeros(len(self.variants))
        self._cost = np.zeros(len(self.variants))
        self._broken = np.zeros(len(self.variants))
        self._first = [] if start is None else [i for i, v in enumerate(self.variants) if (v == start).all()]

    def ask(self, pending: Matrix) -> Suggestion:
        """The variant whose cost may be lowest; with all pending, again the least often measured of them."""
        free = np.array([not among(v, pending) for v in self.variants])
        if not free.any():
            free[:] = True
        if self._first and free[self._first[0]]:
            return Suggestion(self.variants[self._first.pop(0)].copy(), "the variant in force")
        new = free & (self._pulls < 0.5)
        if new.any():
            return Suggestion(self.variants[int(new.argmax())].copy(), "a variant not measured lately")
        spread = float(np.std(self._cost)) + 1e-12
        width = spread * np.sqrt(2.0 * np.log(max(self._pulls.sum(), 2.0)) / np.maximum(self._pulls, 1e-9))
        index = np.where(free, self._cost - width, np.inf)
        index = np.where(self._broken > 0, index + 1e12 * (1.0 + self._broken), index)
        return Suggestion(self.variants[int(index.argmin())].copy(), "lowest confidence bound of its cost")

    def tell(self, seen: Seen) -> None:
        """One measurement of a variant; any other point says nothing about them."""
        same = (self.variants == seen.u).all(axis=1)
        if not same.any():
            return
        i = int(same.argmax())
        self._pulls *= FADE
        self._pulls[i] += 1.0
        rate = 1.0 / self._pulls[i]
        broken = 1.0 if seen.failed else sum(max(0.0, m) for m in seen.margins)
        self._broken[i] += rate * (broken - self._broken[i])
        if not seen.failed:
            self._cost[i] += rate * (seen.cost - self._cost[i])
        self.points.add(seen, self.points.best())

    def recheck(self) -> None:
        """All means fade at once, so that every variant is measured again soon."""
        self._pulls *= 0.5

    def forget(self, row: int | None = None) -> None:  # noqa: ARG002  # the means are forgotten, not a row
        """The world has changed: every variant is to be measured anew."""
        self._pulls[:] = 0.0
        best = self.points.best()
        if best is not None:
            self.points.keep_only(best)

    @property
    def incumbent(self) -> int | None:
        """The row of the variant with the least discounted mean that keeps its promises."""
        if not self.points.n:
            return None
        known = np.array([self.points.find(v) is not None for v in self.variants])
        order = np.lexsort((self._cost, np.maximum(self._broken, 0.0), ~known))
        return self.points.find(self.variants[int(order[0])])
