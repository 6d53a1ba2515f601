"""Arrival processes: their mean, their spread, and how they change over time."""

from __future__ import annotations

import numpy as np
import pytest

from flyball.adapters.arrivals import Arrivals
from flyball.core.errors import InvalidInput


def gaps(text: str, rng: np.random.Generator, count: int = 8000) -> np.ndarray:
    """Gaps of a process at 5 requests a second."""
    return np.diff(Arrivals.parse(text).times_s(5.0, rng, count, None), prepend=0.0)


@pytest.mark.parametrize(
    ("text", "variation"),
    [("poisson", 1.0), ("constant", 0.0), ("gamma:0.25", 2.0), ("gamma:4", 0.5), ("burst:4", 7**0.5)],
)
def test_gaps_have_the_mean_and_the_variation_of_their_process(
    text: str, variation: float, rng: np.random.Generator
) -> None:
    """The mean gap is 1/rate, and its coefficient of variation the one that the process is defined by.

    Of a burst of k: k - 1 gaps of 0 and one of mean k, so the second moment is 2k and the variation sqrt(2k - 1).
    """
    seen = gaps(text, rng)
    assert seen.mean() == pytest.approx(0.2, rel=0.1)
    assert seen.std() / seen.mean() == pytest.approx(variation, rel=0.12, abs=1e-9)


def test_a_burst_comes_at_once(rng: np.random.Generator) -> None:
    """Groups of the stated size share their time."""
    times = Arrivals.parse("burst:4").times_s(5.0, rng, 40, None)
    assert all(len(set(times[i : i + 4])) == 1 for i in range(0, 40, 4))
    assert len(set(times)) == 10


@pytest.mark.parametrize(
    ("text", "first", "second"),
    [
        ("step:3:200", 1000, 3000),
        ("ramp:3:400", 1500, 2500),
        ("diurnal:0.5:400", 1000 * (1 + 1 / np.pi), 1000 * (1 - 1 / np.pi)),
    ],
)
def test_a_changing_rate_is_the_integral_of_its_law(
    text: str, first: float, second: float, rng: np.random.Generator
) -> None:
    """Arrivals in each half of 400 s: the integral of the rate, within four standard deviations."""
    times = np.array(Arrivals.parse(text).times_s(5.0, rng, None, 400.0))
    assert abs((times < 200).sum() - first) < 4 * first**0.5
    assert abs((times >= 200).sum() - second) < 4 * second**0.5


def test_equal_seeds_make_equal_arrivals() -> None:
    """A workload can be made again."""
    first, second = (Arrivals.parse("gamma:0.5").times_s(2.0, np.random.default_rng(7), 50, 20.0) for _ in range(2))
    assert first == second
    assert first[-1] <= 20.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("weekly", "cannot read the arrivals 'weekly'; write poisson, constant, gamma:SHAPE"),
        ("gamma", "cannot read the arrivals 'gamma'"),
        ("gamma:x", "cannot read the arrivals 'gamma:x'"),
        ("gamma:0", "need a last number above 0"),
        ("burst:2.5", "need a whole number of requests a burst"),
        ("diurnal:2:60", "negative rate at night"),
    ],
)
def test_a_process_that_cannot_be_is_one_sentence(text: str, said: str) -> None:
    """The message shows what may be written."""
    with pytest.raises(InvalidInput, match=said):
        Arrivals.parse(text)
