"""SLOs are read as people write them, and refused in one sentence when they promise nothing."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyball.core.errors import InvalidInput
from flyball.core.slo import Slo, SloBound


@pytest.mark.parametrize(
    ("text", "metric", "percentile", "limit_s"),
    [
        ("p95_ttft<500ms", "ttft", 95, 0.5),
        ("p99_itl <= 60ms", "itl", 99, 0.06),
        ("P99.9_TPOT<0.05s", "tpot", 99.9, 0.05),
        ("mean_e2e<8s", "e2e", None, 8),
        ("  p50 ttft < 250us ", "ttft", 50, 0.00025),
    ],
)
def test_bounds_are_read(text: str, metric: str, percentile: float | None, limit_s: float) -> None:
    """Statistic, latency, limit and unit, with either sign, any case and blanks."""
    bound = SloBound.parse(text)
    assert (bound.metric, bound.percentile, bound.limit_s) == (metric, percentile, pytest.approx(limit_s))


@given(
    metric=st.sampled_from(["ttft", "tpot", "itl", "e2e"]),
    percentile=st.none() | st.integers(1, 99) | st.sampled_from([99.5, 99.9]),
    limit_ms=st.integers(1, 100_000),
)
def test_a_bound_reads_what_it_prints(metric: str, percentile: float | None, limit_ms: int) -> None:
    """Printing and reading give the same bound."""
    bound = SloBound(metric=metric, percentile=percentile, limit_s=limit_ms / 1e3)  # type: ignore[arg-type]
    again = SloBound.parse(str(bound))
    assert (again.metric, again.percentile, again.limit_s) == (metric, percentile, pytest.approx(limit_ms / 1e3))
    assert str(bound).startswith(bound.name)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "cannot read the SLO ''"),
        ("fast", "write it like p95_ttft<500ms"),
        ("p95_ttft<500", "write it like p95_ttft<500ms"),
        ("p95_ttft>500ms", "write it like p95_ttft<500ms"),
        ("p95_latency<500ms", "unknown latency 'latency'; use one of ttft, tpot, itl, e2e"),
        ("p95_ttft<0ms", "must exceed 0 s"),
        ("p0_ttft<1s", "must lie between 0 and 100"),
        ("p100_ttft<1s", "cannot read the SLO"),
        ("p95_ttft<1.2.3s", "'1.2.3' in the SLO"),
    ],
)
def test_a_bad_bound_is_refused(text: str, sentence: str) -> None:
    """What cannot be read, or could not be kept or broken, is answered in a sentence."""
    with pytest.raises(InvalidInput) as error:
        SloBound.parse(text)
    assert sentence in str(error.value)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_a_promise_is_positive(value: float) -> None:
    """No latency bound of zero or less, or of no number, is a promise."""
    for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s"):
        with pytest.raises(InvalidInput, match=f"{name} is"):
            Slo(**{name: value})


def test_bounds_become_the_promise_to_one_request() -> None:
    """The strictest limit of each latency holds for a request; an ITL percentile is one of its own gaps."""
    bounds = map(SloBound.parse, ["p95_ttft<500ms", "p50_ttft<200ms", "p99_itl<60ms", "mean_tpot<50ms", "p95_e2e<8s"])
    assert Slo.from_bounds(bounds) == Slo(ttft_s=0.2, tpot_s=0.05, itl_s=0.06, itl_percentile=99, e2e_s=8)
    assert Slo.from_bounds([]) == Slo()
