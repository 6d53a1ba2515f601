"""What the guard allows: limits by rule, three presets of them, and the forms in which they are written.

The short form of other controllers is taken as it stands; its lists follow the order of the knobs:
`{"bounds": [[1, 64], [10, 500]], "max_delta": [8, 100], "max_updates_per_second": 1.0}`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from flyball.core.errors import InvalidInput
from flyball.core.knobs import Space, Value

StepKind = Literal["fraction", "absolute", "relative"]
Preset = Literal["conservative", "balanced", "aggressive"]


@dataclass(frozen=True, slots=True)
class Step:
    """The largest change of a knob at once: a share of its range (on its own scale), a difference, or a share of its
    current value. A whole number may always move by one."""

    kind: StepKind
    size: float

    def __post_init__(self) -> None:
        if self.kind not in get_args(StepKind) or not 0 < self.size < math.inf:
            raise InvalidInput(
                f"a step of {self.size} ({self.kind}) is none; give a size above 0 as {', '.join(get_args(StepKind))}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Every limit of the guard. The defaults are the preset `balanced`."""

    max_step: float = 0.10  # share of a knob's range, on its own scale
    steps: Mapping[str, Step] = field(default_factory=dict)  # by knob, in place of max_step
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # by knob, within the knob's own
    allowed: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)  # by knob: no other value
    knobs: tuple[str, ...] | None = None  # no other knob; None: all
    updates_per_second: float = 10.0
    min_interval_s: float = 0.100
    flips: int = 3  # changes of direction of one knob within the window
    cooldown_s: float = 30.0  # after the flip limit
    cumulative: float = 0.50  # change of one knob within the window, as a share of its range
    window_s: float = 60.0  # for flips and cumulative change
    regressions: int = 5  # windows worse than the baseline before it is restored
    rollbacks_per_hour: int = 4
    breaches: int = 3  # rollbacks for a broken promise in a row before safe mode
    stable_s: float = 60.0  # a configuration must do well for so long before it becomes the last known good
    stable_windows: int = 3  # and in so many windows
    safe_s: float = 300.0  # after which safe mode ends by itself
    recovery: int = 5  # good windows in a row that end safe mode earlier

    def __post_init__(self) -> None:
        for name in (
            "max_step", "updates_per_second", "cumulative", "window_s", "regressions", "rollbacks_per_hour", "breaches",
            "stable_windows", "recovery",
        ):  # fmt: skip
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidInput(f"guard limit {name} is {getattr(self, name)}; give a number above 0")
        for name in ("min_interval_s", "cooldown_s", "stable_s", "safe_s", "flips"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidInput(f"guard limit {name} is {getattr(self, name)}; give a number of at least 0")
        for name, (low, high) in self.bounds.items():
            if not -math.inf < low <= high < math.inf:
                raise InvalidInput(f"guard bounds of {name} are [{low}, {high}]; give two numbers, the low one first")

    def check_names(self, space: Space) -> None:
        """Raise InvalidKnob if a limit speaks of a knob that the space does not have."""
        for name in (*self.steps, *self.bounds, *self.allowed, *(self.knobs or ())):
            space[name]

    def describe(self) -> dict[str, Any]:
        """As plain data that `from_config` reads."""
        return asdict(self) | {"steps": {name: asdict(step) for name, step in self.steps.items()}}


PRESETS: Mapping[Preset, Limits] = {
    "conservative": Limits(
        max_step=0.05, updates_per_second=2, min_interval_s=0.5, flips=2, cooldown_s=60, cumulative=0.25, regressions=3,
        rollbacks_per_hour=2,
    ),
    "balanced": Limits(),
    "aggressive": Limits(
        max_step=0.20, updates_per_second=20, min_interval_s=0.05, flips=5, cooldown_s=10, cumulative=1.0,
        regressions=8, rollbacks_per_hour=10,
    ),
}  # fmt: skip

_SHORT = ("bounds", "max_delta", "max_updates_per_second")


def preset(name: str) -> Limits:
    """The limits of a preset.

    >>> preset("conservative").max_step
    0.05
    """
    if name not in PRESETS:
        raise InvalidInput(f"unknown guard preset {name!r}; use {', '.join(PRESETS)}")
    return PRESETS[name]  # type: ignore[index]  # just checked


def from_config(config: str | Mapping[str, Any], space: Space) -> Limits:
    """Limits from JSON or a mapping: `preset` and any limit by name, or the short form; unknown keys are refused.

    >>> from flyball.core.knobs import Knob
    >>> space = Space((Knob(name="batch", kind="int", default=8, low=1, high=64),))
    >>> from_config('{"bounds": [[1, 64]], "max_delta": [8], "max_updates_per_second": 1.0}', space).steps["batch"]
    Step(kind='absolute', size=8.0)
    """
    given = _mapping(config)
    base = preset(str(given.pop("preset", "balanced")))
    known = {f.name for f in fields(Limits)}
    if unknown := [key for key in given if key not in known and key not in _SHORT]:
        raise InvalidInput(
            f"unknown guard setting {', '.join(map(repr, unknown))}; known: preset, {', '.join(sorted(known))}, "
            f"{', '.join(_SHORT[1:])}"
        )
    names = [knob.name for knob in space]
    if "max_delta" in given:
        deltas = _by_name(given.pop("max_delta"), names, "max_delta")
        given["steps"] = {n: Step("absolute", _number(d, f"max_delta of {n}")) for n, d in deltas.items()}
    elif "steps" in given:
        given["steps"] = {n: s if isinstance(s, Step) else _step(s, n) for n, s in dict(given["steps"]).items()}
    if "bounds" in given:
        bounds = _by_name(given["bounds"], names, "bounds")
        given["bounds"] = {n: _pair(b, n) for n, b in bounds.items()}
    if "allowed" in given:
        given["allowed"] = {n: tuple(values) for n, values in dict(given["allowed"]).items()}
    if given.get("knobs") is not None:
        given["knobs"] = tuple(given["knobs"])
    if "max_updates_per_second" in given:
        rate = _number(given.pop("max_updates_per_second"), "max_updates_per_second")
        given |= {"updates_per_second": rate, "min_interval_s": given.get("min_interval_s", 0.0)}
    try:
        limits = replace(base, **given)
    except TypeError as error:
        raise InvalidInput(f"a guard setting has the wrong type ({error}); give numbers for limits") from None
    limits.check_names(space)
    return limits


def _mapping(config: str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(config, str):
        try:
            config = json.loads(config)
        except ValueError as error:
            raise InvalidInput(f"the guard settings are not JSON ({error}); correct them") from None
    if not isinstance(config, Mapping):
        raise InvalidInput('the guard settings are no JSON object; give one such as {"preset": "balanced"}')
    return dict(config)


def _by_name(given: object, names: Sequence[str], what: str) -> dict[str, Any]:
    """A mapping as it stands; a list is in the order of the knobs."""
    if isinstance(given, Mapping):
        return dict(given)
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != len(names):
        raise InvalidInput(f"guard {what} must have one entry for each knob, in this order: {', '.join(names)}")
    return dict(zip(names, given, strict=True))


def _step(given: object, name: str) -> Step:
    if isinstance(given, Mapping) and set(given) == {"kind", "size"}:
        return Step(given["kind"], _number(given["size"], f"step of {name}"))
    return Step("fraction", _number(given, f"step of {name}"))


def _pair(given: object, name: str) -> tuple[float, float]:
    if isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 2:
        return _number(given[0], f"bound of {name}"), _number(given[1], f"bound of {name}")
    raise InvalidInput(f"guard bounds of {name} are {given!r}; give [low, high]")


def _number(given: object, what: str) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
        raise InvalidInput(f"guard {what} is {given!r}; give a number")
    return float(given)
