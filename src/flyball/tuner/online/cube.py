"""The unit cube under the knobs of a service: proposers move in it, knobs are what comes out, always within bounds.

u           a point of the cube [0, 1]^d, one coordinate a knob, on the knob's own scale
snapped     the point whose knobs are exactly the ones that u stands for (whole numbers and choices have few)

A choice has its list as coordinate, each entry an equal share of the edge; a periodic knob's ends are neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from flyball.core.errors import InvalidInput
from flyball.core.knobs import Knob, Space, Value

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


class Cube:
    """Knobs to coordinates and back."""

    def __init__(self, space: Space, periodic: Collection[str] = ()) -> None:
        self.knobs = tuple(space)
        if not self.knobs:
            raise InvalidInput("a space without knobs leaves nothing to tune; give at least one")
        self.size = len(self.knobs)
        self.periodic = np.array([knob.name in periodic for knob in self.knobs])
        self.wraps = bool(self.periodic.any())
        self._levels = [_levels(knob) for knob in self.knobs]
        self._discrete = [i for i, n in enumerate(self._levels) if n]
        self.unordered = np.array([knob.kind in ("bool", "choice") for knob in self.knobs])

    def values(self, u: Vector) -> dict[str, Value]:
        """The knobs at a point."""
        return {knob.name: _value(knob, float(x)) for knob, x in zip(self.knobs, u, strict=True)}

    def point(self, values: Mapping[str, object]) -> Vector:
        """The point of a configuration, which must give every knob; raises InvalidKnob for a value out of bounds."""
        for knob in self.knobs:
            if knob.name not in values:
                raise InvalidInput(f"the configuration {dict(values)} lacks {knob.name}; give every knob")
        return np.array([_coordinate(knob, knob.check(values[knob.name])) for knob in self.knobs])

    def snap(self, points: Matrix) -> Matrix:
        """Points (n, d) whose coordinates stand exactly for their knobs; in place, and within the cube."""
        if self.wraps:
            points[:, self.periodic] %= 1.0
        np.clip(points, 0.0, 1.0, out=points)
        for i in self._discrete:
            knob, column = self.knobs[i], points[:, i]
            if knob.kind in ("bool", "choice"):
                column[:] = (np.minimum(np.floor(column * self._levels[i]), self._levels[i] - 1) + 0.5) / self._levels[
                    i
                ]
                continue
            low, high = _ends(knob)
            raw = np.exp(low + column * (high - low)) if knob.log else low + column * (high - low)
            whole = np.clip(np.rint(raw), float(knob.low or 0), float(knob.high or 0))
            column[:] = ((np.log(whole) if knob.log else whole) - low) / max(high - low, 1e-300)
        return points

    def differences(self, points: Matrix, origin: Vector) -> Matrix:
        """From an origin to points, the short way round along periodic knobs."""
        away = points - origin
        if self.wraps:
            away[:, self.periodic] = (away[:, self.periodic] + 0.5) % 1.0 - 0.5
        return away

    @property
    def count(self) -> float:
        """How many configurations there are; infinite with a continuous knob."""
        return math.prod(n or math.inf for n in self._levels)


def low_discrepancy(start: int, count: int, size: int, shift: Vector) -> Matrix:
    """Points start, start+1, ... of Roberts' sequence: u = frac(shift + (i + 1) · φ^-j), φ^(d+1) = φ + 1."""
    phi = 2.0
    for _ in range(40):
        phi = (1.0 + phi) ** (1.0 / (size + 1))
    slopes = phi ** -np.arange(1.0, size + 1)
    return np.asarray((shift + np.outer(np.arange(start + 1, start + count + 1), slopes)) % 1.0)


def _levels(knob: Knob) -> int:
    """How many values a knob has; 0: a continuum."""
    if knob.kind == "bool":
        return 2
    if knob.kind == "choice":
        return len(knob.choices)
    return 0 if knob.kind == "float" else int(knob.high or 0) - int(knob.low or 0) + 1


def _ends(knob: Knob) -> tuple[float, float]:
    assert knob.low is not None
    assert knob.high is not None
    return (math.log(knob.low), math.log(knob.high)) if knob.log else (float(knob.low), float(knob.high))


def _value(knob: Knob, x: float) -> Value:
    if knob.kind == "bool":
        return x >= 0.5
    if knob.kind == "choice":
        return knob.choices[min(int(x * len(knob.choices)), len(knob.choices) - 1)]
    low, high = _ends(knob)
    raw = math.exp(low + x * (high - low)) if knob.log else low + x * (high - low)
    assert knob.low is not None
    assert knob.high is not None
    bounded = min(max(raw, float(knob.low)), float(knob.high))  # rounding must not leave the bounds
    if knob.kind == "float":
        return bounded
    return min(max(round(bounded), math.ceil(knob.low)), math.floor(knob.high))


def _coordinate(knob: Knob, value: Value) -> float:
    if knob.kind == "bool":
        return 0.75 if value else 0.25
    if isinstance(value, str):
        return (knob.choices.index(value) + 0.5) / len(knob.choices)
    low, high = _ends(knob)
    return ((math.log(value) if knob.log else float(value)) - low) / max(high - low, 1e-300)
