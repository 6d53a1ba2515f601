"""The points a study may still try, as arrays: legal ones only, listed or, where there are too many, drawn and walked.

An ordered axis becomes one column, level number / (levels - 1); an unordered one a column a choice, 1/√2 where it is
taken, so that two choices are as far apart as the ends of an ordered axis.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from flyball.core.knobs import Configuration
from flyball.tuner.space import Lattice, Point

Points = NDArray[np.int64]  # [m, axes], level numbers
LISTED = 6000  # lattices up to this size are listed whole
DRAWN = 2000  # points drawn of larger ones
TRIES = 20  # batches drawn in search of so many


class Pool:
    """Every point of a lattice that no known constraint forbids, or of some listed ones."""

    def __init__(self, lattice: Lattice, listed: Sequence[Point] | None = None) -> None:
        self.lattice = lattice
        self._sizes = np.array([len(axis.levels) for axis in lattice.axes], dtype=np.int64)
        widths = [1 if axis.ordered else len(axis.levels) for axis in lattice.axes]
        self.groups: NDArray[np.int64] = np.repeat(np.arange(len(widths)), widths)
        self._values = [  # switches as 0 and 1, with which a constraint may reckon
            np.array(axis.levels, dtype=int if axis.knob.kind == "bool" else None) for axis in lattice.axes
        ]
        self.listed: Points | None = None
        if listed is not None:
            self.listed = np.array(listed, dtype=np.int64).reshape(len(listed), len(lattice.axes))
        elif lattice.size <= LISTED:
            points = np.array(list(lattice.points()), dtype=np.int64).reshape(lattice.size, len(lattice.axes))
            self.listed = points[self.legal(points)]

    def legal(self, points: Points) -> NDArray[np.bool_]:
        """Which points break no known constraint."""
        columns = {
            axis.knob.name: values[points[:, i]]
            for i, (axis, values) in enumerate(zip(self.lattice.axes, self._values, strict=True))
        }
        return self.lattice.holds_all(columns, len(points))

    def allows(self, points: Points) -> NDArray[np.bool_]:
        """Which points are legal and, of a table, in it."""
        if self.listed is None:
            return self.legal(points)
        known = set(map(tuple, self.listed.tolist()))
        return np.array([tuple(point) in known for point in points.tolist()], dtype=bool)

    def encode(self, points: Points) -> NDArray[np.float64]:
        """Points as inputs of a model."""
        columns = []
        for i, axis in enumerate(self.lattice.axes):
            if axis.ordered:
                columns.append(points[:, i : i + 1] / max(len(axis.levels) - 1, 1))
            else:
                columns.append((points[:, i : i + 1] == np.arange(len(axis.levels))) / math.sqrt(2))
        return np.hstack(columns) if columns else np.zeros((len(points), 0))

    def encode_values(self, values: Configuration) -> NDArray[np.float64]:
        """One configuration, which may lie between or beyond the levels (a default outside a narrowed range)."""
        columns: list[float] = []
        for axis in self.lattice.axes:
            value = values[axis.knob.name]
            if axis.ordered:
                columns.append(axis.rank(value) / max(len(axis.levels) - 1, 1))
            else:
                columns += [(value == level) / math.sqrt(2) for level in axis.levels]
        return np.array(columns, dtype=float)

    def candidates(self, taken: Collection[Point | None], rng: np.random.Generator) -> Points:
        """Free points to choose among: all, or some drawn evenly."""
        points = self.listed if self.listed is not None else self._drawn(rng)
        return self.free(points, taken)

    def free(self, points: Points, taken: Collection[Point | None]) -> Points:
        """Those not taken, each once."""
        known = set(taken)
        keep = []
        for i, point in enumerate(map(tuple, points.tolist())):
            if point not in known:
                known.add(point)
                keep.append(i)
        return points[keep]

    def _drawn(self, rng: np.random.Generator) -> Points:
        found: list[Points] = []
        count = 0
        for _ in range(TRIES):
            points = (rng.random((DRAWN, len(self._sizes))) * self._sizes).astype(np.int64)
            found.append(points[self.legal(points)])
            count += len(found[-1])
            if count >= DRAWN:
                break
        return np.vstack(found)[:DRAWN]

    def around(self, points: Points) -> Points:
        """Legal neighbours of points: on one axis one, two or a quarter of its levels away, or any other choice."""
        if self.listed is not None:
            return np.zeros((0, len(self._sizes)), dtype=np.int64)
        moved = []
        for i, axis in enumerate(self.lattice.axes):
            size = len(axis.levels)
            if axis.ordered:
                steps = sorted({s for n in (1, 2, max(size // 4, 1)) for s in (-n, n)})
                levels = [points[:, i] + step for step in steps]
            else:
                levels = [np.full(len(points), level) for level in range(size)]
            for level in levels:
                near = points.copy()
                near[:, i] = level
                moved.append(near[(level >= 0) & (level < size)])
        near = np.vstack(moved)
        return near[self.legal(near)]
