"""Percentiles against requests sent one by one through the same law, and what must hold whatever the numbers."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from flyball.core.errors import InvalidInput
from flyball.performance.percentiles import percentiles
from flyball.performance.queueing import Replicas, queue_model
from flyball.performance.requests import simulate

LAW = queue_model("v3")
ONE = {"alpha_s": 0.008, "beta_s": 2e-5, "gamma_s": 2e-7, "input_tokens": 512, "output_tokens": 64, "max_queue": 32}
LEVELS = (50.0, 90.0, 99.0)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="the simulation is C++")
@pytest.mark.parametrize(("share", "cv"), [(0.6, (0.8, 0.6)), (0.8, (0.0, 0.0)), (0.8, (0.0, 1.0))])
def test_percentiles_are_those_of_simulated_requests(share: float, cv: tuple[float, float]) -> None:
    """P50, P90 and P99 of TTFT, ITL and E2E within 10 %, means within 3 % (all cases: benchmarks/percentiles.py)."""
    queues = LAW.prepare(Replicas.of(**ONE, max_batch=12, input_cv=cv[0], output_cv=cv[1]))
    rate = share * queues.capacity_rps
    ours = percentiles(queues, rate, LEVELS)
    seen = simulate(queues.anatomy(), 0, float(rate[0]), 1_500_000, np.random.default_rng(4))  # type: ignore[attr-defined]
    assert ours.ttft_s[0] == pytest.approx(np.percentile(seen.ttft_s, LEVELS), rel=0.1)
    assert ours.e2e_s[0] == pytest.approx(np.percentile(seen.e2e_s, LEVELS), rel=0.1)
    assert ours.itl_s[0] == pytest.approx(seen.gap_percentiles(LEVELS), rel=0.1)
    assert ours.mean_ttft_s[0] == pytest.approx(seen.ttft_s.mean(), rel=0.03)
    assert ours.mean_e2e_s[0] == pytest.approx(seen.e2e_s.mean(), rel=0.03)
    assert ours.mean_itl_s[0] == pytest.approx(seen.mean_gap_s, rel=0.03)


def test_m_m_1_waits_are_the_textbook_s() -> None:
    """One at a time, exponential service, a long queue: response times are exponential with rate mu - lambda."""
    one = Replicas.of(
        alpha_s=0.01, beta_s=0.0, gamma_s=0.0, input_tokens=0, output_tokens=100, max_batch=1, max_queue=2000,
        output_cv=1.0,
    )  # fmt: skip
    queues = LAW.prepare(one)
    seen = percentiles(queues, 0.7 * queues.capacity_rps, LEVELS)
    free = 0.3 * queues.capacity_rps[0]
    assert seen.e2e_s[0] == pytest.approx(-np.log(1 - np.array(LEVELS) / 100) / free, rel=0.03)
    assert seen.mean_e2e_s[0] == pytest.approx(1 / free, rel=0.02)


@pytest.mark.parametrize("cv", [0.0, 0.6, 1.0, 1.5])
def test_m_g_1_waits_are_pollaczek_and_khinchine_s(cv: float) -> None:
    """One at a time, a long queue: mean waits grow with the variation of lengths as the textbook says, within 4 %."""
    one = Replicas.of(
        alpha_s=0.01, beta_s=0.0, gamma_s=0.0, input_tokens=0, output_tokens=500, max_batch=1, max_queue=2000,
        output_cv=cv,
    )  # fmt: skip
    queues = LAW.prepare(one)
    for load in (0.5, 0.7, 0.9):
        rate = load * queues.capacity_rps
        exact = load / (1 - load) * (1 + cv**2) / 2 / queues.capacity_rps
        assert queues.analyze(rate).wait_s == pytest.approx(exact, rel=0.04)
        seen = percentiles(queues, rate)
        assert seen.mean_e2e_s == pytest.approx(exact + 1 / queues.capacity_rps, rel=0.03)


def test_an_idle_replica_varies_in_lengths_only() -> None:
    """Without load nobody waits: TTFT is the prefill's, and E2E spreads as the answers do."""
    queues = LAW.prepare(Replicas.of(**ONE, max_batch=12, input_cv=0.0, output_cv=0.0))
    seen = percentiles(queues, np.array([0.0]), LEVELS)
    assert seen.ttft_s[0] == pytest.approx(seen.ttft_s[0, 0])
    assert seen.e2e_s[0] == pytest.approx(seen.e2e_s[0, 0], rel=1e-3)
    varied = LAW.prepare(Replicas.of(**ONE, max_batch=12, input_cv=0.0, output_cv=1.0))
    seen = percentiles(varied, np.array([0.0]), LEVELS)
    assert seen.e2e_s[0, 2] > 4 * seen.e2e_s[0, 0]


def test_more_load_shortens_nothing_and_overload_is_answered() -> None:
    """Every percentile grows with load, up to far beyond the capacity."""
    many = Replicas.of(**ONE, max_batch=np.full(9, 12))
    queues = LAW.prepare(many)
    seen = percentiles(queues, np.linspace(0.0, 4.0, 9) * queues.capacity_rps, LEVELS)
    for array in (seen.ttft_s, seen.itl_s, seen.e2e_s):
        assert np.isfinite(array).all()
        assert (np.diff(array, axis=0) > -0.01 * array[:-1]).all()
        assert (np.diff(array, axis=1) >= 0).all()


def test_v3_engine_s_percentiles_lie_around_its_own_means() -> None:
    """The rest of a step and bursts, which its means know, are in the percentiles on average."""
    law = queue_model("v3-engine")
    queues = law.prepare(Replicas.of(**ONE, max_batch=12))
    rate = 0.5 * queues.capacity_rps
    means, seen = queues.analyze(rate), percentiles(queues, rate, LEVELS)
    assert seen.mean_ttft_s[0] == pytest.approx(means.ttft_s[0], rel=0.02)
    assert seen.mean_itl_s[0] == pytest.approx(means.itl_s[0], rel=0.02)
    assert seen.ttft_s[0, 0] < 2 * means.ttft_s[0] < 10 * seen.ttft_s[0, 2]


def test_the_same_question_has_the_same_answer() -> None:
    """The points are fixed: no random generator is involved."""
    queues = LAW.prepare(Replicas.of(**ONE, max_batch=12))
    first, second = (percentiles(queues, np.array([5.0])) for _ in range(2))
    assert first.ttft_s.tolist() == second.ttft_s.tolist()


def test_models_that_tell_means_only_are_refused() -> None:
    """A model without parts has no percentiles, and an impossible level is named."""
    with pytest.raises(InvalidInput, match="tells means only; use v3"):
        percentiles(queue_model("v1").prepare(Replicas.of(**ONE, max_batch=12)), np.array([1.0]))
    with pytest.raises(InvalidInput, match="give numbers between 0 and 100"):
        percentiles(LAW.prepare(Replicas.of(**ONE, max_batch=12)), np.array([1.0]), (100.0,))


@pytest.mark.parametrize("rate", [0.0, 10.0, 1e3, 1e6])
def test_overload_and_silence_have_percentiles_too(rate: float) -> None:
    """Far beyond capacity the queue is always full and waits are finite; without load nobody waits."""
    queues = LAW.prepare(Replicas.of(**ONE, max_batch=12))
    seen = percentiles(queues, np.array([rate]), LEVELS).ttft_s[0]
    assert np.all(np.isfinite(seen))
    assert np.all(np.diff(seen) >= 0)
