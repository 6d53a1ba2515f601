"""The search space of a study: every knob an axis of few levels, with known constraints cutting corners off.

Levels, because a window of some seconds cannot tell max_num_seqs 47 from 48: neighbours on an axis differ by enough to
matter, no trial is spent on a near copy of another, a small space ends, and the values read like ones a person chose.
A wide scale (a logarithmic knob, or one from 0 to far above 1) moves by 2^k and 3·2^k, with zero as a level of its own;
any other number moves in at most 32 equal steps. The bounds and the default are always levels.

rank        position of a value among its axis's levels, 0 to levels - 1; between two levels interpolated
distance    mean over the axes of |rank - rank'| / (levels - 1), or 0 and 1 for switches and choices
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from flyball.core.errors import InvalidInput, InvalidKnob
from flyball.core.knobs import Configuration, Knob, Space, Value
from flyball.tuner.constraints import Constraint

STEPS = 32  # equal steps of a narrow scale
WIDE = 64.0  # a scale from 0 to here or above is searched by ratio, not by difference

Point = tuple[int, ...]  # a level of each axis, by its number


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A knob that is searched, and the values it may take, in order.

    >>> knob = Knob(name="max_num_seqs", kind="int", default=64, low=1, high=64, log=True)
    >>> Axis.of(knob, "4..32").levels
    (4, 6, 8, 12, 16, 24, 32)
    """

    knob: Knob
    levels: tuple[Value, ...]

    @classmethod
    def of(cls, knob: Knob, text: str | None = None) -> Axis:
        """The axis of a knob, narrowed if a text is given: `LOW..HIGH`, either end left out, `A,B,C` or one value."""
        if text is None:
            return cls(knob=knob, levels=_levels(knob, knob.low, knob.high))
        if ".." not in text:
            listed = tuple(_read(knob, part) for part in text.split(","))
            return cls(knob=knob, levels=tuple(sorted(set(listed))) if knob.kind in ("int", "float") else listed)
        if knob.kind not in ("int", "float"):
            raise InvalidKnob(f"{knob.name}={text}: only a number has a range; list values, as in {knob.name}=A,B")
        low, high = (
            float(_read(knob, part)) if part.strip() else end
            for part, end in zip(text.split("..", 1), (knob.low, knob.high), strict=True)
        )
        assert low is not None
        assert high is not None
        if low > high:
            raise InvalidKnob(f"{knob.name}={text}: the range runs backwards; give the lower end first")
        return cls(knob=knob, levels=_levels(knob, low, high))

    @property
    def ordered(self) -> bool:
        """Whether levels have an order, so that one can be between two others."""
        return self.knob.kind in ("int", "float")

    def rank(self, value: Value) -> float:
        """Position of a value among the levels; one beyond the ends has the position of the end."""
        if not self.ordered:
            return float(self.levels.index(value)) if value in self.levels else 0.0
        return float(np.interp(float(value), [float(level) for level in self.levels], range(len(self.levels))))

    def distance(self, a: Value, b: Value) -> float:
        """How far apart two values are, from 0 to 1."""
        if not self.ordered:
            return float(a != b)
        return abs(self.rank(a) - self.rank(b)) / (len(self.levels) - 1)

    def distribution(self) -> BaseDistribution:
        """The knob's range as Optuna stores and draws it; it holds every level and the default."""
        if not self.ordered:
            choices = self.levels if self.knob.default in self.levels else (*self.levels, self.knob.default)
            return CategoricalDistribution(choices)
        ends = [float(v) for v in (self.levels[0], self.levels[-1], self.knob.default)]
        low, high = min(ends), max(ends)
        if self.knob.kind == "int":
            return IntDistribution(int(low), int(high), log=self.knob.log)
        return FloatDistribution(low, high, log=self.knob.log)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lattice:
    """All configurations that a study may try: the axes, what stays fixed, and the constraints between them."""

    axes: tuple[Axis, ...]
    fixed: Mapping[str, Value] = field(default_factory=dict)  # set with every trial, the default's included
    base: Mapping[str, Value] = field(default_factory=dict)  # knobs left alone, which a constraint may name
    constraints: tuple[Constraint, ...] = ()

    @classmethod
    def of(
        cls,
        space: Space,
        narrow: Mapping[str, str] | None = None,
        constraints: Iterable[str] = (),
        base: Configuration | None = None,
        *,
        restarts: bool = False,
    ) -> Lattice:
        """The live knobs of a space, narrowed by name; a knob narrowed to one value is fixed.

        With `restarts` also those that need one, which a target makes when they are applied. Raises InvalidInput for an
        unknown knob, a knob that needs a restart where none is made, and constraints that the default breaks.
        """
        narrow = narrow or {}
        for name in narrow:
            if not (space[name].live or restarts):
                raise InvalidKnob(f"{name} needs a restart and cannot be tuned live; leave it out")
        axes = [Axis.of(knob, narrow.get(knob.name)) for knob in space if restarts or knob.live]
        lattice = cls(
            axes=tuple(axis for axis in axes if len(axis.levels) > 1),
            fixed={axis.knob.name: axis.levels[0] for axis in axes if len(axis.levels) == 1},
            base={knob.name: knob.default for knob in space if not knob.live} | dict(base or {}),
            constraints=tuple(Constraint(text) for text in constraints),
        )
        for constraint in lattice.constraints:
            constraint.check_names([knob.name for knob in space])
        if broken := lattice.broken(lattice.default):
            raise InvalidInput(
                f"the default configuration breaks {broken}; widen or fix its knobs so that the default is legal"
            )
        return lattice

    @property
    def default(self) -> dict[str, Value]:
        """The engine's own configuration, with the user's fixed values: the reference of every study."""
        return {axis.knob.name: axis.knob.default for axis in self.axes} | dict(self.fixed)

    @property
    def size(self) -> int:
        """How many points there are, legal or not."""
        return math.prod(len(axis.levels) for axis in self.axes)

    def distributions(self) -> dict[str, BaseDistribution]:
        """The axes in Optuna's words."""
        return {axis.knob.name: axis.distribution() for axis in self.axes}

    def values(self, point: Point) -> dict[str, Value]:
        """The configuration at a point, fixed values included."""
        return {a.knob.name: a.levels[i] for a, i in zip(self.axes, point, strict=True)} | dict(self.fixed)

    def point(self, values: Configuration) -> Point | None:
        """The point of a configuration, or None if it is off the lattice (a default outside the narrowed range)."""
        if any(values[axis.knob.name] not in axis.levels for axis in self.axes):
            return None
        return tuple(axis.levels.index(values[axis.knob.name]) for axis in self.axes)

    def broken(self, values: Configuration) -> Constraint | None:
        """The first known constraint that a configuration breaks, if any."""
        whole = {**self.base, **values}
        return next((c for c in self.constraints if not c.holds(whole)), None)

    def legal(self, point: Point) -> bool:
        """Whether a point breaks no known constraint."""
        return self.broken(self.values(point)) is None

    def holds_all(self, columns: Mapping[str, NDArray[Any]], count: int) -> NDArray[np.bool_]:
        """Which of `count` configurations, given as a column of values for each axis, break no known constraint."""
        whole = {**self.base, **self.fixed, **columns}
        held = np.ones(count, dtype=bool)
        for constraint in self.constraints:
            held &= constraint.holds_all(whole)
        return held

    def points(self) -> Iterator[Point]:
        """Every point; look at `size` first."""
        return itertools.product(*(range(len(axis.levels)) for axis in self.axes))

    def at(self, unit: Sequence[float]) -> Point:
        """The point under a position of the unit cube; every level has an equal share of its edge."""
        return tuple(int(u * len(axis.levels)) for axis, u in zip(self.axes, unit, strict=True))

    def distance(self, a: Configuration, b: Configuration) -> float:
        """How far apart two configurations are, from 0 to 1."""
        if not self.axes:
            return 0.0
        return sum(axis.distance(a[axis.knob.name], b[axis.knob.name]) for axis in self.axes) / len(self.axes)

    def neighbours(self, point: Point) -> Iterator[Point]:
        """Points one level away on one axis; any other level, where levels have no order."""
        for i, axis in enumerate(self.axes):
            steps = (point[i] - 1, point[i] + 1) if axis.ordered else range(len(axis.levels))
            for level in steps:
                if 0 <= level < len(axis.levels) and level != point[i]:
                    yield (*point[:i], level, *point[i + 1 :])


def parse_knobs(texts: Collection[str]) -> dict[str, str]:
    """Read `NAME=RANGE` options into names and ranges.

    >>> parse_knobs(["max_num_seqs=1..32", "prefix_caching=true"])
    {'max_num_seqs': '1..32', 'prefix_caching': 'true'}
    """
    ranges: dict[str, str] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals and value):
            raise InvalidInput(f"cannot read the knob {text!r}; write NAME=LOW..HIGH, NAME=A,B,C or NAME=VALUE")
        if name in ranges:
            raise InvalidInput(f"the knob {name} is given twice; give it once")
        ranges[name] = value
    return ranges


def _read(knob: Knob, text: str) -> Value:
    text = text.strip()
    if knob.kind == "choice":
        return knob.check(text)
    if knob.kind == "bool":
        return knob.check({"true": True, "false": False}.get(text.lower(), text))
    try:
        return knob.check(int(text) if text.lstrip("+-").isdecimal() else float(text))
    except ValueError as error:
        if isinstance(error, InvalidKnob):
            raise
        raise InvalidKnob(f"{knob.name}={text!r} is no number; give one from {knob.low:g} to {knob.high:g}") from None


def _levels(knob: Knob, low: float | None, high: float | None) -> tuple[Value, ...]:
    if knob.kind == "bool":
        return (False, True)
    if knob.kind == "choice":
        return knob.choices
    assert low is not None
    assert high is not None
    if knob.kind == "int" and not knob.log and high - low <= STEPS:
        return tuple(range(int(low), int(high) + 1))
    if knob.log or (low == 0 and high >= WIDE):
        inner = _ratios(low, high)
    else:
        inner = [float(x) for x in np.linspace(low, high, STEPS + 1)]
    default = [float(knob.default)] if low <= float(knob.default) <= high else []
    numbers = {low, high, *default, *inner}
    if knob.kind == "int":
        return tuple(sorted({round(x) for x in numbers}))
    return tuple(sorted(float(x) for x in numbers))


def _ratios(low: float, high: float) -> list[float]:
    first = low if low > 0 else min(1.0, high / 1024)  # a whole number above zero, or a thousandth of a small scale
    exponents = range(math.floor(math.log2(first)), math.ceil(math.log2(high)) + 1)
    grid = [mantissa * 2.0**k for k in exponents for mantissa in (1.0, 1.5)]
    return [x for x in grid if max(low, first) <= x <= high]
