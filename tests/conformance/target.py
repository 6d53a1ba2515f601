"""What every tuning target must do, whichever engine is behind it; a test class inherits this and gives `target`."""

from __future__ import annotations

import pytest

from flyball.core.errors import InvalidKnob
from flyball.core.knobs import Configuration, Knob, Value
from flyball.core.ports import Target


def other_value(knob: Knob, now: Value) -> Value:
    """A legal value of a knob that differs from the one in force."""
    if knob.kind == "bool":
        return not now
    if knob.kind == "choice":
        return next(choice for choice in knob.choices if choice != now)
    assert knob.low is not None
    assert knob.high is not None
    return knob.check(knob.high if now != knob.high else knob.low)


class TargetConformance:
    """Inherit, and define a fixture `target` that gives a target at its defaults."""

    def test_the_space_knows_every_knob_in_force(self, target: Target) -> None:
        """Whatever is in force has bounds, and lies within them."""
        space = target.space()
        in_force = target.configuration()
        assert set(in_force) == {knob.name for knob in space}
        assert space.check(in_force) == dict(in_force)

    def test_it_starts_at_its_defaults(self, target: Target) -> None:
        """The reference of a study is what the engine does when nobody tunes it."""
        assert dict(target.configuration()) == target.space().defaults()

    def test_a_change_acts_and_the_rest_stays(self, target: Target) -> None:
        """Exactly the knobs named change."""
        before = dict(target.configuration())
        knob = next(iter(target.space()))
        change: Configuration = {knob.name: other_value(knob, before[knob.name])}
        target.apply(change)
        assert dict(target.configuration()) == before | dict(change)

    def test_the_generation_names_the_configuration(self, target: Target) -> None:
        """Another configuration has another generation, and coming back brings the first one back."""
        knob = next(iter(target.space()))
        now = target.configuration()[knob.name]
        first = target.apply({knob.name: now})
        second = target.apply({knob.name: other_value(knob, now)})
        assert first != second
        assert target.apply({knob.name: now}) == first

    def test_an_unknown_knob_is_refused_by_name(self, target: Target) -> None:
        """The message says which name is wrong."""
        with pytest.raises(InvalidKnob, match="no_such_knob"):
            target.apply({"no_such_knob": 1})

    def test_a_bad_value_leaves_everything_as_it_was(self, target: Target) -> None:
        """A change of several knobs of which one is bad changes none."""
        before = dict(target.configuration())
        good = next(iter(target.space()))
        number = next(knob for knob in target.space() if knob.kind in ("int", "float") and knob.name != good.name)
        assert number.high is not None
        with pytest.raises(InvalidKnob, match=number.name):
            target.apply({good.name: other_value(good, before[good.name]), number.name: number.high * 2 + 1})
        assert dict(target.configuration()) == before
