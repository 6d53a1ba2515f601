"""Scores of windows."""

from __future__ import annotations

import math

import pytest

from flyball.core.errors import InvalidInput
from flyball.core.metrics import MetricsWindow, RequestTrace
from flyball.core.slo import Slo, SloBound
from flyball.tuner.objective import MARGIN_CAP, Objective, Score, failed, score

BOUNDS = (SloBound.parse("p50_ttft<200ms"), SloBound.parse("mean_e2e<1s"))


def window(ttfts_s: list[float], failures: int = 0) -> MetricsWindow:
    """Requests that each bring two tokens, and some that fail."""
    good = [
        RequestTrace(
            scheduled_s=0, sent_s=0, input_tokens=1, output_tokens=2, token_times_s=(ttft, ttft + 0.1)
        )
        for ttft in ttfts_s
    ]  # fmt: skip
    bad = [RequestTrace(scheduled_s=0, sent_s=0, input_tokens=1, error="timeout")] * failures
    return MetricsWindow(duration_s=2.0, generation="g", traces=(*good, *bad), slo=Slo.from_bounds(BOUNDS))


def test_margins_are_relative_to_the_limit() -> None:
    """Half the limit is -50 %, half as much again +50 %; feasible means none is above zero."""
    kept = score(window([0.1, 0.1, 0.1]), Objective.parse("throughput"), BOUNDS)
    assert kept.margins == pytest.approx({"p50_ttft<=200ms": -0.5, "mean_e2e<=1s": -0.8})
    assert (kept.value, kept.feasible, kept.violation) == (1.5, True, 0)
    assert kept.slack == pytest.approx(0.5)
    broken = score(window([0.3, 0.3, 0.3]), Objective.parse("throughput"), BOUNDS)
    assert not broken.feasible
    assert broken.violation == pytest.approx(0.5)


def test_each_metric_is_what_its_name_says() -> None:
    """Goodput counts requests within the SLO, throughput all completed ones, a latency is in seconds."""
    seen = window([0.1, 0.3], failures=2)
    values = {name: Objective.parse(name).value(seen) for name in ("goodput", "throughput", "output_tps", "attainment")}
    assert values == {"goodput": 0.5, "throughput": 1.0, "output_tps": 2.0, "attainment": 0.25}
    assert Objective.parse("p50_ttft", maximise=False).value(window([0.1, 0.2, 0.4])) == 0.2


def test_a_failed_request_makes_a_promise_hopeless_but_finite() -> None:
    """Surrogates need numbers: an infinite margin is capped."""
    seen = score(window([0.1], failures=3), Objective.parse("goodput"), BOUNDS)
    assert seen.margins == {"p50_ttft<=200ms": MARGIN_CAP, "mean_e2e<=1s": MARGIN_CAP}
    assert seen.failure is None


def test_a_window_without_a_completed_request_failed() -> None:
    """It says how the requests failed, and never counts as feasible."""
    for objective in (Objective.parse("goodput"), Objective.parse("p95_ttft", maximise=False)):
        seen = score(window([], failures=3), objective, ())
        assert seen.failure == "no request completed (3 timeout)"
        assert not seen.feasible
        assert seen.value == objective.worst


def test_an_objective_that_is_infinite_failed() -> None:
    """Minimising a latency over failed requests measures nothing."""
    seen = score(window([0.1], failures=3), Objective.parse("p95_ttft", maximise=False), ())
    assert seen.failure is not None
    assert math.isinf(seen.value)


def test_a_failure_is_further_from_feasible_than_any_broken_promise() -> None:
    """What could not run is worse than what ran badly."""
    bad = Score(value=1.0, margins={"a": MARGIN_CAP})
    assert failed("crash", Objective.parse("goodput"), BOUNDS[:1]).violation > bad.violation


def test_gain_points_the_better_way() -> None:
    """Higher goodput and lower latency are both gains."""
    assert Objective.parse("goodput").gain(3, 2) == 1
    assert Objective.parse("p95_ttft", maximise=False).gain(0.2, 0.5) == pytest.approx(0.3)


@pytest.mark.parametrize("text", ["speed", "p95_speed", "95_ttft", ""])
def test_an_unknown_objective_lists_the_known_ones(text: str) -> None:
    """One sentence with every choice."""
    with pytest.raises(InvalidInput, match="use goodput, throughput, output_tps, attainment, or a latency statistic"):
        Objective.parse(text)
