"""Knobs accept what is in their bounds, in their own type, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyball.core.errors import InvalidInput, InvalidKnob
from flyball.core.knobs import Knob, Space, generation_of

SEQS = Knob(name="max_num_seqs", kind="int", default=16, low=1, high=64, log=True)
SHARE = Knob(name="share", kind="float", default=0.5, low=0.0, high=1.0)
CACHE = Knob(name="cache", kind="bool", default=True)
ORDER = Knob(name="order", kind="choice", default="fcfs", choices=("fcfs", "shortest"))
SPACE = Space((SEQS, SHARE, CACHE, ORDER))


@pytest.mark.parametrize(
    ("knob", "value", "kept"),
    [(SEQS, 8, 8), (SEQS, 8.0, 8), (SEQS, 64, 64), (SHARE, 1, 1.0), (CACHE, False, False), (ORDER, "fcfs", "fcfs")],
)
def test_a_good_value_takes_the_knobs_type(knob: Knob, value: object, kept: object) -> None:
    """What is accepted comes back in the knob's own type."""
    assert knob.check(value) == kept
    assert type(knob.check(value)) is type(knob.default)


@pytest.mark.parametrize(
    ("knob", "value", "sentence"),
    [
        (SEQS, 65, "max_num_seqs=65 is out of bounds; give a value from 1 to 64"),
        (SEQS, 0, "out of bounds"),
        (SEQS, 2.5, "give a whole number from 1 to 64"),
        (SEQS, True, "give a number"),
        (SEQS, "8", "give a number"),
        (SEQS, None, "give a number"),
        (SHARE, math.nan, "share=nan: give a number from 0 to 1"),
        (SHARE, math.inf, "give a number"),
        (CACHE, 1, "cache=1: give true or false"),
        (ORDER, "lifo", "order='lifo': give one of fcfs, shortest"),
        (ORDER, ["fcfs"], "give one of"),
    ],
)
def test_a_bad_value_is_refused(knob: Knob, value: object, sentence: str) -> None:
    """The knob, what was given and what is needed are named."""
    with pytest.raises(InvalidKnob) as error:
        knob.check(value)
    assert sentence in str(error.value)


@given(low=st.integers(-100, 100), width=st.integers(0, 100), value=st.integers(-300, 300))
def test_bounds_are_inclusive(low: int, width: int, value: int) -> None:
    """A value passes exactly when it lies within the bounds."""
    knob = Knob(name="k", kind="int", default=low, low=low, high=low + width)
    if low <= value <= low + width:
        assert knob.check(value) == value
    else:
        with pytest.raises(InvalidKnob):
            knob.check(value)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "int", "default": 1},
        {"kind": "int", "default": 1, "low": 1},
        {"kind": "float", "default": 1, "low": 2, "high": 1},
        {"kind": "float", "default": 1, "low": math.nan, "high": 1},
        {"kind": "int", "default": 1, "low": 0, "high": 8, "log": True},
        {"kind": "choice", "default": "a"},
        {"kind": "choice", "default": "a", "choices": ("b",)},
        {"kind": "int", "default": 9, "low": 1, "high": 8},
        {"kind": "bool", "default": 1},
    ],
)
def test_a_knob_is_whole_at_birth(fields: dict[str, Any]) -> None:
    """Bounds, choices and default are checked when a knob is made."""
    with pytest.raises(InvalidInput):
        Knob(name="k", **fields)


def test_a_space_answers_by_name_and_in_order() -> None:
    """Knobs keep their order and are found by name; an unknown one is answered with the known."""
    assert [knob.name for knob in SPACE] == ["max_num_seqs", "share", "cache", "order"]
    assert SPACE["share"] is SHARE
    assert "share" in SPACE
    assert "Share" not in SPACE
    assert SPACE.defaults() == {"max_num_seqs": 16, "share": 0.5, "cache": True, "order": "fcfs"}
    assert [knob.name for knob in SPACE.subset(["order", "share"])] == ["order", "share"]
    with pytest.raises(InvalidKnob, match="unknown knob 'speed'; known knobs: max_num_seqs, share, cache, order"):
        SPACE["speed"]


def test_a_space_names_each_knob_once() -> None:
    """Two knobs of one name are refused."""
    with pytest.raises(InvalidInput, match="once"):
        Space((SEQS, SEQS))


def test_a_configuration_is_checked_whole() -> None:
    """One bad value among good ones refuses them all."""
    assert SPACE.check({"share": 1, "order": "shortest"}) == {"share": 1.0, "order": "shortest"}
    for bad in ({"share": 0.5, "order": "lifo"}, {"share": 0.5, "speed": 1}):
        with pytest.raises(InvalidKnob):
            SPACE.check(bad)


@given(values=st.dictionaries(st.sampled_from("abcd"), st.integers() | st.booleans() | st.text(max_size=3)))
def test_a_generation_is_of_the_values_alone(values: dict[str, Any]) -> None:
    """The order of knobs does not matter; any other value does."""
    assert generation_of(values) == generation_of(dict(reversed(values.items())))
    assert generation_of(values) != generation_of(values | {"a": "another value"})
