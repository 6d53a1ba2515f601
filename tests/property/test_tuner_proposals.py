"""Proposals over any space: legal, on a level, within bounds, never twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyball.core.knobs import Knob, Space
from flyball.tuner.objective import Objective, Score
from flyball.tuner.proposers import Observation, Strategy, exhausted, propose
from flyball.tuner.space import Lattice


@st.composite
def knobs(draw: st.DrawFn, name: str) -> Knob:
    """Any knob."""
    kind = draw(st.sampled_from(["int", "float", "bool", "choice"]))
    if kind == "bool":
        return Knob(name=name, kind="bool", default=draw(st.booleans()))
    if kind == "choice":
        choices = tuple("abcde"[: draw(st.integers(1, 5))])
        return Knob(name=name, kind="choice", default=draw(st.sampled_from(choices)), choices=choices)
    low = draw(st.integers(0, 50))
    high = low + draw(st.integers(0, 5000))
    log = low > 0 and draw(st.booleans())
    if kind == "int":
        return Knob(name=name, kind="int", default=draw(st.integers(low, high)), low=low, high=high, log=log)
    default = draw(st.floats(low, high))
    return Knob(name=name, kind="float", default=default, low=low, high=high, log=log)


@st.composite
def lattices(draw: st.DrawFn) -> Lattice:
    """Any space of one to four knobs, at times with a relation that its default satisfies."""
    space = Space(tuple(draw(knobs(f"k{i}")) for i in range(draw(st.integers(1, 4)))))
    numbers = [knob for knob in space if knob.kind in ("int", "float")]
    if len(numbers) < 2 or draw(st.booleans()):
        return Lattice.of(space)
    a, b = numbers[:2]
    relation = "<=" if float(a.default) <= float(b.default) else ">="
    return Lattice.of(space, constraints=[f"{a.name} {relation} {b.name}"])


@pytest.mark.parametrize("sampler", ["random", "tpe", "flyball"])
@given(lattice=lattices(), seed=st.integers(0, 2**31), values=st.lists(st.floats(-5, 5), min_size=9, max_size=9))
def test_proposals_are_legal_and_distinct(sampler: str, lattice: Lattice, seed: int, values: list[float]) -> None:
    """Whatever was measured, each of ten proposals is new, breaks nothing, and is a value its knob accepts."""
    space = Space(tuple(axis.knob for axis in lattice.axes))
    seen: list[Observation] = []
    for value in [0.0, *values]:
        if exhausted(lattice, seen):
            break
        proposal = propose(lattice, Objective.parse("goodput"), seen, Strategy(sampler=sampler, seed=seed))
        assert lattice.broken(proposal) is None
        searched = {name: v for name, v in proposal.items() if name in space}
        assert space.check(searched) == searched
        assert proposal not in [o.values for o in seen]
        failure = "crash" if value < -4 else None
        seen.append(Observation(values=proposal, score=Score(value=value, margins={"slo": -value}, failure=failure)))


@given(lattice=lattices())
def test_points_and_configurations_are_one_to_one(lattice: Lattice) -> None:
    """The default is a level of every axis, and every point comes back from its configuration."""
    assert lattice.point(lattice.default) is not None
    for point in list(lattice.points())[:50] if lattice.size < 10_000 else [lattice.point(lattice.default) or ()]:
        assert lattice.point(lattice.values(point)) == point
        assert lattice.distance(lattice.values(point), lattice.values(point)) == 0
