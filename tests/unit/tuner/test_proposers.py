"""What is tried next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from flyball.core.errors import InvalidInput
from flyball.core.knobs import Configuration, Knob, Space
from flyball.tuner.objective import Objective, Score
from flyball.tuner.proposer import spread
from flyball.tuner.proposers import Observation, Strategy, exhausted, propose
from flyball.tuner.space import Lattice

GOODPUT = Objective.parse("goodput")
SPACE = Space((
    Knob(name="seqs", kind="int", default=64, low=1, high=64, log=True),
    Knob(name="tokens", kind="int", default=2048, low=1, high=2048, log=True),
    Knob(name="wait_ms", kind="float", default=0.0, low=0.0, high=1000.0),
    Knob(name="policy", kind="choice", default="fcfs", choices=("fcfs", "lpm", "priority")),
))  # fmt: skip
LATTICE = Lattice.of(SPACE, constraints=["seqs <= tokens"])
SMALL = Lattice.of(SPACE, {"seqs": "1,2,4,64", "tokens": "2,4,2048", "wait_ms": "0", "policy": "fcfs"},
                   ["seqs <= tokens"])  # fmt: skip


def bowl(values: Configuration) -> Score:
    """Best at 8 sequences; more than 32 break the promise."""
    seqs = float(values["seqs"])
    return Score(value=10 - abs(seqs - 8), margins={"p95_ttft<=1s": seqs / 32 - 1})


def search(
    lattice: Lattice, strategy: Strategy, count: int, judge: Callable[[Configuration], Score] = bowl
) -> list[Observation]:
    """The first trials of a study."""
    seen: list[Observation] = []
    while len(seen) < count and not exhausted(lattice, seen):
        values = propose(lattice, GOODPUT, seen, strategy)
        seen.append(Observation(values=values, score=judge(values)))
    return seen


def test_the_default_comes_first() -> None:
    """It is the reference of everything after."""
    assert propose(LATTICE, GOODPUT, [], Strategy()) == LATTICE.default


@pytest.mark.parametrize("count", [1, 4, 6])
def test_the_start_is_spread_over_every_knob(count: int, rng: np.random.Generator) -> None:
    """Of n start points one lies in each n-th part of each axis that has at least n levels."""
    points = spread(LATTICE, count, rng)
    for i, axis in enumerate(LATTICE.axes):
        if len(axis.levels) % count == 0:
            assert sorted(p[i] * count // len(axis.levels) for p in points) == list(range(count))
        if len(axis.levels) >= count:
            assert len({p[i] for p in points}) == count


@pytest.mark.parametrize("sampler", ["flyball", "tpe", "random"])
def test_no_trial_repeats_or_breaks_a_known_constraint(sampler: str) -> None:
    """Forty trials are forty configurations, all legal, on levels, within bounds."""
    seen = search(LATTICE, Strategy(sampler=sampler, seed=3), 40)
    assert len({LATTICE.point(o.values) for o in seen}) == 40
    assert all(LATTICE.broken(o.values) is None for o in seen)
    assert None not in {LATTICE.point(o.values) for o in seen}


@pytest.mark.parametrize("sampler", ["flyball", "tpe", "random"])
def test_equal_seeds_and_results_give_equal_proposals(sampler: str) -> None:
    """A study that is resumed goes on as if it had never stopped; another seed goes another way."""
    whole = search(LATTICE, Strategy(sampler=sampler, seed=1), 12)
    half = whole[:7]
    again = propose(LATTICE, GOODPUT, half, Strategy(sampler=sampler, seed=1))
    assert again == whole[7].values
    assert [o.values for o in search(LATTICE, Strategy(sampler=sampler, seed=2), 12)] != [o.values for o in whole]


@pytest.mark.parametrize("sampler", ["flyball", "tpe", "random"])
def test_a_small_space_is_tried_whole_and_then_ends(sampler: str) -> None:
    """Nine legal configurations: nine trials, none twice, then nothing is left."""
    seen = search(SMALL, Strategy(sampler=sampler), 100)
    legal = [p for p in SMALL.points() if SMALL.legal(p)]
    assert len(legal) == 9
    assert sorted(SMALL.point(o.values) or () for o in seen) == sorted(legal)
    assert exhausted(SMALL, seen)


def test_a_study_without_a_free_knob_ends_after_the_default() -> None:
    """Everything fixed: the default is the only trial."""
    fixed = Lattice.of(SPACE, {"seqs": "64", "tokens": "2048", "wait_ms": "0", "policy": "fcfs"})
    assert len(search(fixed, Strategy(), 5)) == 1


def test_pending_trials_are_not_proposed_again() -> None:
    """Six suggestions before any result are six configurations."""
    seen: list[Observation] = []
    for _ in range(6):
        seen.append(Observation(values=propose(LATTICE, GOODPUT, seen, Strategy())))
    assert len({LATTICE.point(o.values) for o in seen}) == 6


def test_tpe_learns_from_values_and_from_broken_promises() -> None:
    """After 30 trials the search sits near the optimum more often than chance would."""
    seen = search(LATTICE, Strategy(sampler="tpe", seed=5), 40)
    late = [float(o.values["seqs"]) for o in seen[20:]]
    assert sum(4 <= seqs <= 16 for seqs in late) >= len(late) / 2  # 5 of 12 levels by chance, and few above 32
    assert sum(seqs > 32 for seqs in late) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [Strategy(), Strategy(sampler="tpe")])
def test_failed_trials_teach_to_stay_away(strategy: Strategy) -> None:
    """A corner where the engine fails is tried less and less, by our sampler and by TPE."""

    def crashes(values: Configuration) -> Score:
        if float(values["tokens"]) >= 256:
            return Score(value=0.0, margins={"p95_ttft<=1s": 10.0}, failure="out of memory")
        return bowl(values)

    def share_failed(trials: list[Observation]) -> float:
        return sum(o.score is not None and o.score.failure is not None for o in trials) / len(trials)

    runs = [search(LATTICE, replace(strategy, seed=s), 26, crashes) for s in range(2)]
    late = [o for run in runs for o in run[15:]]
    assert share_failed(late) <= 0.25  # 32 % by chance


def test_scoots_forest_learns_what_fails() -> None:
    """Nine trials of a small space whose large half fails: no further failure among the next five."""

    def crashes(values: Configuration) -> Score:
        failure = "out of memory" if float(values["seqs"]) >= 16 else None
        return Score(value=float(values["seqs"]), margins={}, failure=failure)

    lattice = Lattice.of(SPACE, {"wait_ms": "0", "policy": "fcfs"}, ["seqs <= tokens"])
    seen = search(lattice, Strategy(feasibility="forest"), 14, crashes)
    assert sum(o.score is not None and o.score.failure is not None for o in seen[9:]) <= 1


def test_an_off_lattice_default_does_not_confuse_the_sampler() -> None:
    """The default may lie outside the narrowed range; proposals stay inside."""
    lattice = Lattice.of(SPACE, {"seqs": "1..8"})
    seen = search(lattice, Strategy(starts=0), 8)
    assert seen[0].values["seqs"] == 64
    assert all(float(o.values["seqs"]) <= 8 for o in seen[1:])


def test_an_unknown_sampler_lists_the_known_ones() -> None:
    """One sentence."""
    with pytest.raises(
        InvalidInput, match="unknown sampler 'grid'; use flyball, tpe, gp, random, or the class of one of Optuna's"
    ):
        Strategy(sampler="grid")


@pytest.mark.slow
def test_gp_proposes_legally_too() -> None:
    """Optuna's Gaussian process sampler fits the same seam."""
    seen = search(LATTICE, Strategy(sampler="gp", seed=0), 7)
    assert len({LATTICE.point(o.values) for o in seen}) == 7
    assert all(LATTICE.broken(o.values) is None for o in seen)


def test_any_sampler_of_optuna_serves_by_its_class() -> None:
    """A quasi-random one, which this package knows nothing about."""
    seen = search(LATTICE, Strategy(sampler="QMCSampler"), 8)
    assert len({LATTICE.point(o.values) for o in seen}) == 8
    assert all(LATTICE.broken(o.values) is None for o in seen)
