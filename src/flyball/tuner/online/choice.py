"""Which proposer, and why: a rule from what is known of the space, told as data."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from flyball.core.errors import InvalidInput
from flyball.core.knobs import Configuration, Value
from flyball.tuner.online.bandit import Bandit
from flyball.tuner.online.bayes import Bayes
from flyball.tuner.online.cube import Cube, Matrix, Vector
from flyball.tuner.online.local import Local
from flyball.tuner.online.nelder_mead import NelderMead
from flyball.tuner.online.points import Points, Seen, Suggestion
from flyball.tuner.online.tpe import Tpe

SMALL = 16  # configurations of which each can be measured
PROPOSERS: Mapping[str, str] = {
    "local": "a quadratic model near the incumbent, within a trust radius: few, ordered knobs",
    "bayes": "a Gaussian process over knobs and context: what was learnt under one traffic helps under another",
    "tpe": "densities of good and other points: many switches and choices",
    "nelder-mead": "a simplex: smooth costs without noise",
    "bandit": "a choice among approved variants only",
}


class Proposer(Protocol):
    """Asked for points of the cube, told what they cost."""

    name: str
    points: Points

    def ask(self, pending: Matrix) -> Suggestion: ...  # noqa: D102
    def tell(self, seen: Seen) -> None: ...  # noqa: D102
    def forget(self, row: int | None = None) -> None: ...  # noqa: D102
    def recheck(self) -> None: ...  # noqa: D102

    @property
    def incumbent(self) -> int | None: ...  # noqa: D102


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A proposer and the reason for it."""

    proposer: str
    reason: str
    asked_for: str  # "auto", or the proposer's own name
    knobs: int
    unordered: int  # of the knobs: switches and choices
    configurations: float
    variants: int  # approved ones; 0: no catalogue
    context: int  # entries

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        return {k: v if v != float("inf") else "continuum" for k, v in asdict(self).items()}


def choose(asked_for: str, cube: Cube, *, variants: int, context: int) -> Choice:
    """The proposer for a space; raises InvalidInput for an unknown one, or a bandit without a catalogue."""
    unordered = int(cube.unordered.sum())
    if asked_for != "auto":
        if asked_for not in PROPOSERS:
            raise InvalidInput(f"unknown proposer {asked_for!r}; use auto, {', '.join(PROPOSERS)}")
        if asked_for == "bandit" and not variants and cube.count > 10_000:
            raise InvalidInput("a bandit needs a catalogue of approved variants; give one, or another proposer")
        name, reason = asked_for, f"asked for: {PROPOSERS[asked_for]}"
    elif variants:
        name, reason = "bandit", f"only {variants} approved variants may be tried"
    elif 2 <= cube.count <= SMALL:
        name, reason = "bandit", f"there are only {cube.count:g} configurations: each can be measured"
    elif 2 * unordered > cube.size:
        name, reason = "tpe", f"{unordered} of {cube.size} knobs are switches or choices, which have no slope"
    else:
        name, reason = "local", f"{cube.size - unordered} of {cube.size} knobs are numbers: a slope can be followed"
    return Choice(
        proposer=name, reason=reason, asked_for=asked_for, knobs=cube.size, unordered=unordered,
        configurations=cube.count, variants=variants, context=context,
    )  # fmt: skip


def make(
    choice: Choice, cube: Cube, *, seed: int, constraints: int, start: Vector | None, catalogue: Sequence[Configuration]
) -> Proposer:
    """A new proposer of the kind that was chosen."""
    match choice.proposer:
        case "local":
            return Local(cube, seed=seed, constraints=constraints, start=start)
        case "bayes":
            return Bayes(cube, seed=seed, constraints=constraints, start=start, context=choice.context)
        case "tpe":
            return Tpe(cube, seed=seed, constraints=constraints, start=start)
        case "nelder-mead":
            return NelderMead(cube, seed=seed, constraints=constraints, start=start)
    variants = [cube.point(values) for values in catalogue] or _all(cube)
    return Bandit(cube, seed=seed, constraints=constraints, start=start, variants=variants)


def _all(cube: Cube) -> list[Vector]:
    axes: list[list[Value]] = []
    for knob in cube.knobs:
        if knob.kind == "bool":
            axes.append([False, True])
        elif knob.kind == "choice":
            axes.append(list(knob.choices))
        else:
            axes.append(list(range(int(knob.low or 0), int(knob.high or 0) + 1)))
    names = [knob.name for knob in cube.knobs]
    return [np.asarray(cube.point(dict(zip(names, v, strict=True)))) for v in itertools.product(*axes)]
