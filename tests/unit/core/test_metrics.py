"""Windows and traces: definitions worked out by hand, percentiles as numpy has them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyball.core.errors import InvalidInput
from flyball.core.metrics import MetricsWindow, RequestTrace, Summary, percentile
from flyball.core.slo import Slo, SloBound

VALUES = st.lists(st.floats(0, 1e6), min_size=1, max_size=60)
QS = st.floats(0, 100)
NO_PROMISE = Slo()


def _trace(
    *times_s: float,
    scheduled_s: float = 0.0,
    sent_s: float = 0.0,
    output_tokens: int | None = None,
    error: str | None = None,
) -> RequestTrace:
    return RequestTrace(
        scheduled_s=scheduled_s,
        sent_s=sent_s,
        input_tokens=5,
        output_tokens=len(times_s) if output_tokens is None else output_tokens,
        token_times_s=times_s,
        error=error,
    )


def _window(*traces: RequestTrace, slo: Slo = NO_PROMISE, duration_s: float = 10.0) -> MetricsWindow:
    return MetricsWindow(duration_s=duration_s, generation="g", traces=traces, slo=slo)


@given(values=VALUES, q=QS)
def test_percentiles_are_numpys(values: list[float], q: float) -> None:
    """Our percentile is numpy's default one."""
    assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)), rel=1e-9, abs=1e-9)


@given(values=VALUES, q=QS, other=QS)
def test_percentiles_rise_and_stay_inside(values: list[float], q: float, other: float) -> None:
    """A higher percentile is never smaller, and all lie between the extremes, up to rounding."""
    low, high = sorted((q, other))
    assert percentile(values, low) <= percentile(values, high) * (1 + 1e-12)
    assert min(values) * (1 - 1e-12) <= percentile(values, low) <= max(values) * (1 + 1e-12)


@given(values=VALUES, late=st.integers(1, 60), q=st.floats(1, 99))
def test_the_infinitely_late_stay_so(values: list[float], late: int, q: float) -> None:
    """With infinities among the values a percentile is finite or infinite, never undefined."""
    assert not math.isnan(percentile(values + [math.inf] * late, q))


@given(values=VALUES)
def test_a_summary_is_numpys(values: list[float]) -> None:
    """Count, mean, percentiles and maximum agree with numpy."""
    seen = Summary.of(values)
    expected = [np.mean(values), *np.percentile(values, [50, 90, 95, 99]), max(values)]
    assert seen.count == len(values)
    assert [seen.mean, seen.p50, seen.p90, seen.p95, seen.p99, seen.max] == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_of_nothing_nothing_is_known() -> None:
    """The summary of no value has no numbers, rather than zeros."""
    assert math.isnan(percentile([], 50))
    seen = Summary.of([])
    assert seen.count == 0
    assert all(math.isnan(v) for v in (seen.mean, seen.p50, seen.p90, seen.p95, seen.p99, seen.max))


def test_latencies_of_one_request() -> None:
    """TTFT and E2E count from the schedule, not from the send; TPOT is the mean gap, ITL each of them."""
    seen = _trace(3.0, 3.5, 4.5, scheduled_s=1.0, sent_s=1.25)
    assert (seen.lag_s, seen.ttft_s, seen.e2e_s, seen.tpot_s, seen.itl_s) == (0.25, 2.0, 3.5, 0.75, (0.5, 1.0))


def test_tpot_divides_by_the_tokens_made() -> None:
    """When chunks carry several tokens, TPOT uses the count of tokens, not of chunks."""
    assert _trace(1.0, 2.0, 3.0, output_tokens=9).tpot_s == 0.25


def test_latencies_that_do_not_exist() -> None:
    """A request without tokens has no latency, and one with a single token no gap."""
    assert (_trace().ttft_s, _trace().e2e_s, _trace().tpot_s, _trace().itl_s) == (None, None, None, ())
    assert (_trace(1.0).tpot_s, _trace(1.0).itl_s) == (None, ())
    assert _trace(1.0, output_tokens=5).tpot_s is None


@pytest.mark.parametrize(
    ("slo", "kept"),
    [
        (Slo(), True),
        (Slo(ttft_s=1.0), True),
        (Slo(ttft_s=0.99), False),
        (Slo(tpot_s=0.75), True),
        (Slo(tpot_s=0.74), False),
        (Slo(itl_s=1.0), True),
        (Slo(itl_s=0.99), False),
        (Slo(e2e_s=2.5), True),
        (Slo(e2e_s=2.49), False),
        (Slo(ttft_s=1.0, e2e_s=2.49), False),
    ],
)
def test_a_request_meets_what_was_promised(slo: Slo, kept: bool) -> None:
    """A limit met exactly is kept; one broken limit breaks the promise."""
    assert _trace(1.0, 1.5, 2.5).meets(slo) is kept


def test_a_failed_request_meets_nothing() -> None:
    """A failure, or an answer without a token, keeps no promise, not even an empty one."""
    assert not _trace(1.0, error="truncated").meets(Slo())
    assert not _trace().meets(Slo())


def test_attainment_and_goodput_count_everyone() -> None:
    """Failed and slow requests are in the denominator of attainment; goodput is good requests over time."""
    seen = _window(_trace(0.1), _trace(0.9), _trace(error="timeout"), _trace(0.2), slo=Slo(ttft_s=0.5), duration_s=4.0)
    assert (seen.good, seen.attainment, seen.goodput_rps, seen.throughput_rps) == (2, 0.5, 0.5, 0.75)
    assert seen.output_tps == 0.75
    assert seen.errors == {"timeout": 1}
    assert math.isnan(_window().attainment)


def test_statistics_count_failures_as_late() -> None:
    """A bound on a percentile or a mean sees failed requests as infinitely late."""
    p50, p95, mean = (SloBound.parse(f"{stat}_ttft<1s") for stat in ("p50", "p95", "mean"))
    seen = _window(*[_trace(0.5)] * 9, _trace(error="http_500"))
    assert seen.statistic(p50) == 0.5
    assert seen.statistic(p95) == math.inf
    assert seen.statistic(mean) == math.inf
    assert seen.margin(p50) == -0.5
    assert seen.margin(p95) == math.inf
    assert _window(_trace(0.5), _trace(1.0)).statistic(mean) == 0.75


def test_failures_weigh_in_itl_as_much_as_answers() -> None:
    """Half the requests failed, so half of all gaps are infinitely long, however many gaps an answer has."""
    answered = [_trace(*(i * 0.01 for i in range(101)))] * 5
    seen = _window(*answered, *[_trace(error="timeout")] * 5)
    assert seen.statistic(SloBound.parse("p49_itl<1s")) == pytest.approx(0.01)
    assert seen.statistic(SloBound.parse("p51_itl<1s")) == math.inf


def test_nothing_measured_is_no_promise_kept() -> None:
    """Without a value a statistic is undefined and its margin infinite."""
    bound = SloBound.parse("p95_itl<50ms")
    assert math.isnan(_window(_trace(1.0)).statistic(bound))
    assert _window(_trace(1.0)).margin(bound) == math.inf


@pytest.mark.parametrize("duration_s", [0.0, -1.0, math.nan])
def test_a_window_lasts(duration_s: float) -> None:
    """A window without duration is refused."""
    with pytest.raises(InvalidInput, match="measures nothing"):
        _window(duration_s=duration_s)
