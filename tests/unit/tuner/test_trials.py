"""Which trial is best."""

from __future__ import annotations

import pytest

from flyball.tuner.objective import Objective, Score
from flyball.tuner.trials import Trial, best, closest, finalists

GOODPUT = Objective.parse("goodput")


def trial(number: int, value: float, margin: float = -0.2, failure: str | None = None) -> Trial:
    """A trial of one knob, whose value is its number."""
    return Trial(
        number=number, kind="search", values={"x": number},
        score=Score(value=value, margins={"p95_ttft<=1s": margin}, failure=failure),
    )  # fmt: skip


def test_a_broken_promise_is_never_best() -> None:
    """However good its value."""
    assert best([trial(0, 10.0), trial(1, 99.0, margin=0.01)], GOODPUT) == trial(0, 10.0)
    assert best([trial(1, 99.0, margin=0.01), trial(2, 1.0, failure="crash")], GOODPUT) is None


@pytest.mark.parametrize(("maximise", "winner"), [(True, 1), (False, 0)])
def test_direction_decides(maximise: bool, winner: int) -> None:
    """The largest goodput, the smallest latency."""
    objective = Objective.parse("throughput", maximise=maximise)
    found = best([trial(0, 1.0), trial(1, 2.0)], objective)
    assert found is not None
    assert found.number == winner


def test_of_equal_values_the_safer_then_the_nearer_wins() -> None:
    """A saturated objective is decided by slack, and equal slack by distance from the default."""
    safe = best([trial(0, 10.0, -0.1), trial(1, 9.95, -0.5), trial(2, 9.0, -0.9)], GOODPUT)
    assert safe is not None
    assert safe.number == 1  # 0 is 0.5 % better but has less slack; 2 is 10 % worse
    near = best(
        [trial(3, 10.0, -0.5), trial(7, 10.0, -0.52), trial(5, 10.0, -0.49)], GOODPUT, lambda v: abs(v["x"] - 6)
    )  # type: ignore[operator,arg-type]
    assert near is not None
    assert near.number in (5, 7)
    assert near.number == 5  # of equally near ones the earlier


def test_finalists_come_in_order_and_never_repeat() -> None:
    """As many as there are, no infeasible one among them."""
    trials = [trial(0, 5.0), trial(1, 9.0), trial(2, 7.0), trial(3, 8.0, margin=1.0)]
    assert [t.number for t in finalists(trials, GOODPUT, 5, lambda _: 0.0)] == [1, 2, 0]


def test_the_closest_breaks_least() -> None:
    """Where nothing is feasible the smallest sum of broken margins is named; what failed is not near anything."""
    found = closest([trial(0, 9.0, 2.0), trial(1, 1.0, 0.3), trial(2, 0.0, 0.0, failure="crash")])
    assert found is not None
    assert found.number == 1
    assert closest([]) is None
