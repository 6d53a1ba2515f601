"""Knobs: what may be set on an engine, within which bounds, and when a change takes effect."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from flyball.core.errors import InvalidInput, InvalidKnob

Value = int | float | bool | str
Configuration = Mapping[str, Value]  # knob name -> value; names and units are the engine's own
KnobKind = Literal["int", "float", "bool", "choice"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """One setting of an engine: its type, bounds, default and meaning.

    >>> Knob(name="max_num_seqs", kind="int", default=16, low=1, high=64, log=True).check(8)
    8
    """

    name: str
    kind: KnobKind
    default: Value
    low: float | None = None  # inclusive, for int and float
    high: float | None = None  # inclusive
    log: bool = False  # search on a logarithmic scale
    choices: tuple[str, ...] = ()
    live: bool = True  # takes effect without a restart
    doc: str = ""

    def __post_init__(self) -> None:
        if self.kind in ("int", "float"):
            if self.low is None or self.high is None or not self.low <= self.high:
                raise InvalidInput(f"knob {self.name}: bounds [{self.low}, {self.high}] must be given, low first")
            if self.log and not self.low > 0:
                raise InvalidInput(
                    f"knob {self.name}: a logarithmic scale needs a lower bound above 0, not {self.low:g}"
                )
        if self.kind == "choice" and not self.choices:
            raise InvalidInput(f"knob {self.name}: list the choices")
        self.check(self.default)

    def check(self, value: object) -> Value:
        """Return the value in the knob's own type, or say why it cannot be."""
        if self.kind == "bool":
            if isinstance(value, bool):
                return value
            raise InvalidKnob(f"{self.name}={value!r}: give true or false")
        if self.kind == "choice":
            if isinstance(value, str) and value in self.choices:
                return value
            raise InvalidKnob(f"{self.name}={value!r}: give one of {', '.join(self.choices)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
            raise InvalidKnob(f"{self.name}={value!r}: give a number from {self.low:g} to {self.high:g}")
        if self.kind == "int" and value != int(value):
            raise InvalidKnob(f"{self.name}={value!r}: give a whole number from {self.low:g} to {self.high:g}")
        assert self.low is not None
        assert self.high is not None
        if not self.low <= value <= self.high:
            raise InvalidKnob(f"{self.name}={value} is out of bounds; give a value from {self.low:g} to {self.high:g}")
        return int(value) if self.kind == "int" else float(value)


@dataclass(frozen=True, slots=True)
class Space:
    """The knobs of one engine, by name, in a fixed order."""

    knobs: tuple[Knob, ...]
    _by_name: Mapping[str, Knob] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_name = {knob.name: knob for knob in self.knobs}
        if len(by_name) != len(self.knobs):
            raise InvalidInput("a space names each knob once; remove the duplicate")
        object.__setattr__(self, "_by_name", by_name)

    def __iter__(self) -> Iterator[Knob]:
        return iter(self.knobs)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Knob:
        try:
            return self._by_name[name]
        except KeyError:
            raise InvalidKnob(f"unknown knob {name!r}; known knobs: {', '.join(self._by_name)}") from None

    def check(self, values: Mapping[str, object]) -> dict[str, Value]:
        """Check every value; raises on the first bad one, so that nothing is half accepted."""
        return {name: self[name].check(value) for name, value in values.items()}

    def defaults(self) -> dict[str, Value]:
        """Every knob at its default."""
        return {knob.name: knob.default for knob in self.knobs}

    def subset(self, names: list[str]) -> Space:
        """The space of some of the knobs, in the order named."""
        return Space(tuple(self[name] for name in names))


def generation_of(values: Configuration) -> str:
    """A short hash of a configuration; windows and profiles are attributed by it.

    >>> generation_of({"a": 1, "b": 2}) == generation_of({"b": 2, "a": 1})
    True
    """
    canonical = json.dumps(dict(sorted(values.items())), separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=6).hexdigest()
