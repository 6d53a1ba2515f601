"""The lattice of configurations."""

from __future__ import annotations

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from flyball.core.errors import InvalidInput, InvalidKnob
from flyball.core.knobs import Knob, Space
from flyball.tuner.space import Axis, Lattice, parse_knobs

SEQS = Knob(name="seqs", kind="int", default=64, low=1, high=64, log=True)
TOKENS = Knob(name="tokens", kind="int", default=100, low=1, high=2048, log=True)
WAIT = Knob(name="wait_ms", kind="float", default=0.0, low=0.0, high=1000.0)
SHARE = Knob(name="share", kind="float", default=0.9, low=0.5, high=1.0)
CACHE = Knob(name="cache", kind="bool", default=True)
POLICY = Knob(name="policy", kind="choice", default="fcfs", choices=("fcfs", "priority", "lpm"))
COLD = Knob(name="block", kind="int", default=16, low=8, high=32, live=False)
ALL = Space((SEQS, TOKENS, WAIT, SHARE, CACHE, POLICY, COLD))


@pytest.mark.parametrize(
    ("knob", "levels"),
    [
        (SEQS, (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)),
        (Knob(name="n", kind="int", default=3, low=0, high=5), (0, 1, 2, 3, 4, 5)),
        (CACHE, (False, True)),
        (POLICY, ("fcfs", "priority", "lpm")),
    ],
)
def test_levels_are_those_a_person_would_choose(knob: Knob, levels: tuple[object, ...]) -> None:
    """Wide scales go by ratio, narrow ones by difference, the rest by name."""
    assert Axis.of(knob).levels == levels


def test_a_scale_from_zero_has_zero_and_then_ratios() -> None:
    """A knob from 0 to 1000 is searched by ratio, with 0 as a level of its own."""
    levels = Axis.of(WAIT).levels
    assert levels[:6] == (0.0, 1.0, 1.5, 2.0, 3.0, 4.0)
    assert levels[-2:] == (768.0, 1000.0)


@pytest.mark.parametrize("knob", [SEQS, TOKENS, WAIT, SHARE], ids=lambda k: k.name)
def test_bounds_and_default_are_levels(knob: Knob) -> None:
    """Neither end and no default is out of reach; few levels are enough."""
    levels = Axis.of(knob).levels
    assert levels[0] == knob.low
    assert levels[-1] == knob.high
    assert knob.default in levels
    assert len(levels) <= 34


@pytest.mark.parametrize(
    ("knob", "text", "levels"),
    [
        (SEQS, "4..16", (4, 6, 8, 12, 16)),
        (SEQS, "5..20", (5, 6, 8, 12, 16, 20)),
        (TOKENS, "512..", (512, 768, 1024, 1536, 2048)),
        (SEQS, "..4", (1, 2, 3, 4)),
        (SEQS, "32, 8,8", (8, 32)),
        (WAIT, "20", (20.0,)),
        (CACHE, "false", (False,)),
        (POLICY, "lpm,fcfs", ("lpm", "fcfs")),
    ],
)
def test_a_user_narrows_an_axis(knob: Knob, text: str, levels: tuple[object, ...]) -> None:
    """A range, an open one, a list, or one value."""
    assert Axis.of(knob, text).levels == levels


@pytest.mark.parametrize(
    ("knob", "text", "said"),
    [
        (SEQS, "1..100", "seqs=100 is out of bounds; give a value from 1 to 64"),
        (SEQS, "8..4", "runs backwards"),
        (SEQS, "many", "'many' is no number; give one from 1 to 64"),
        (SEQS, "2.5", "give a whole number"),
        (CACHE, "maybe", "give true or false"),
        (POLICY, "random", "give one of fcfs, priority, lpm"),
        (POLICY, "fcfs..lpm", "only a number has a range"),
    ],
)
def test_a_range_that_cannot_be_is_one_sentence(knob: Knob, text: str, said: str) -> None:
    """What was given, and what may be given."""
    with pytest.raises(InvalidKnob, match=said):
        Axis.of(knob, text)


def test_a_lattice_holds_the_live_knobs_and_fixes_single_values() -> None:
    """Restart knobs stay out; one value is no axis; the default carries what the user fixed."""
    lattice = Lattice.of(ALL, {"wait_ms": "20", "seqs": "1..8"})
    assert [axis.knob.name for axis in lattice.axes] == ["seqs", "tokens", "share", "cache", "policy"]
    assert lattice.fixed == {"wait_ms": 20.0}
    assert lattice.default == {
        "seqs": 64, "tokens": 100, "share": 0.9, "cache": True, "policy": "fcfs", "wait_ms": 20.0,
    }  # fmt: skip
    assert lattice.point(lattice.default) is None  # seqs 64 lies outside 1..8


def test_what_cannot_be_tuned_is_said() -> None:
    """Unknown knobs, restart knobs, and constraints that the default breaks end the study before it starts."""
    with pytest.raises(InvalidKnob, match="unknown knob 'speed'"):
        Lattice.of(ALL, {"speed": "1"})
    with pytest.raises(InvalidKnob, match="block needs a restart"):
        Lattice.of(ALL, {"block": "8..16"})
    with pytest.raises(InvalidInput, match="the default configuration breaks tokens < seqs"):
        Lattice.of(ALL, constraints=["tokens < seqs"])
    with pytest.raises(InvalidInput, match="names token; known knobs"):
        Lattice.of(ALL, constraints=["seqs <= token"])


def test_a_constraint_sees_the_knobs_left_alone() -> None:
    """A relation to a knob that is not searched uses the value in force."""
    lattice = Lattice.of(ALL, {"seqs": "1..64"}, ["seqs <= 4 * block"], {"block": 16})
    assert lattice.broken({**lattice.default, "seqs": 64}) is None
    tight = Lattice.of(ALL, {"seqs": "1,64"}, ["seqs <= 8 * block"], {"block": 8})
    assert tight.broken({**tight.default, "seqs": 65}) is not None


def test_distance_counts_levels_not_units() -> None:
    """Doubling a small knob is as far as doubling a large one."""
    axis = Axis.of(SEQS)
    assert axis.distance(2, 4) == axis.distance(32, 64) == pytest.approx(2 / 11)
    assert Axis.of(POLICY).distance("fcfs", "lpm") == 1


def test_distributions_hold_every_level_and_the_default() -> None:
    """Optuna stores any configuration of a study, an off-lattice default included."""
    lattice = Lattice.of(ALL, {"seqs": "1..8", "policy": "lpm,priority"})
    distributions = lattice.distributions()
    assert distributions["seqs"] == IntDistribution(1, 64, log=True)
    assert distributions["share"] == FloatDistribution(0.5, 1.0)
    assert distributions["policy"] == CategoricalDistribution(("lpm", "priority", "fcfs"))


def test_points_round_trip_and_neighbours_are_one_step_away() -> None:
    """Every point has a configuration of its own, and neighbours differ in one knob."""
    lattice = Lattice.of(Space((SEQS, CACHE)))
    assert lattice.size == 24
    assert all(lattice.point(lattice.values(p)) == p for p in lattice.points())
    assert set(lattice.neighbours((0, 1))) == {(1, 1), (0, 0)}
    assert lattice.at([0.0, 0.999]) == (0, 1)


@pytest.mark.parametrize("text", ["seqs", "=4", "seqs=", "seqs:4"])
def test_a_knob_option_must_be_name_equals_range(text: str) -> None:
    """The sentence shows the three forms."""
    with pytest.raises(InvalidInput, match=r"write NAME=LOW\.\.HIGH, NAME=A,B,C or NAME=VALUE"):
        parse_knobs([text])


def test_a_knob_is_given_once() -> None:
    """Two ranges for one knob contradict each other."""
    with pytest.raises(InvalidInput, match="seqs is given twice"):
        parse_knobs(["seqs=1", "seqs=2"])
