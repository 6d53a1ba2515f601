"""Solvers choose one candidate for each server. They share one interface, and are chosen by name.

A third party adds one through the entry point group `flyball.solvers`: a name, and a function like `Solver`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Protocol, cast

from flyball.core.errors import InvalidInput
from flyball.planner.problem import Candidate, Choice, Problem

ROUNDING = 1e-9  # of sums of amounts
_GROUP = "flyball.solvers"
_BUILT_IN = {
    "unlimited": "flyball.planner.solvers.unlimited:solve",
    "exact": "flyball.planner.solvers.exact:solve",
    "greedy": "flyball.planner.solvers.greedy:solve",
    "heterogeneous": "flyball.planner.solvers.heterogeneous:solve",
    "approximate": "flyball.planner.solvers.approximate:solve",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """A candidate for each choice of a problem, in its order; None, with a reason, where there is none."""

    chosen: tuple[Candidate | None, ...]
    reasons: tuple[str, ...]  # "" where a candidate was chosen
    bound: float | None  # no solution of the same servers has a smaller value; None: nothing is proven


class Solver(Protocol):
    """A way to choose. It depends on nothing but its arguments, and not on the order of the choices."""

    def __call__(self, problem: Problem, *, time_limit_s: float) -> Solution:
        """Choose within the time limit; the best solution found counts, with a bound that says how good it is."""
        ...


def solver(name: str) -> Solver:
    """The solver of this name, ours or a plug-in's."""
    target = _BUILT_IN.get(name)
    if target is not None:
        module, attribute = target.split(":")
        return cast("Solver", getattr(importlib.import_module(module), attribute))
    found = {point.name: point for point in entry_points(group=_GROUP)}
    if name not in found:
        known = ", ".join((*_BUILT_IN, *found))
        raise InvalidInput(f"unknown solver {name!r}; use one of {known}, or install a package that provides it")
    return cast("Solver", found[name].load())


def lacking(candidate: Candidate, left: Mapping[str, float]) -> list[str]:
    """What a candidate takes more of than is left."""
    return [
        f"{amount:g} {name} ({left.get(name, 0):g} left)"
        for name, amount in candidate.uses
        if amount > left.get(name, 0) + ROUNDING
    ]


def left_after(problem: Problem, taken: Iterable[Candidate]) -> dict[str, float]:
    """What is left of each limit."""
    left = dict(problem.capacity)
    for candidate in taken:
        for part in (candidate, *candidate.also):
            for name, amount in part.uses:
                left[name] = left.get(name, 0) - amount
    return left


def no_room(choice: Choice, left: Mapping[str, float]) -> str:
    """Why a choice came to nothing, with so much left of each limit."""
    if choice.reason:
        return choice.reason
    options = [" and ".join(lacking(c, left)) for c in choice.candidates]
    more = f" or {len(options) - 3} other ways" if len(options) > 3 else ""
    return (
        f"the capacity is too small: it needs {' or '.join(options[:3])}{more}; add accelerators or raise its priority"
    )
