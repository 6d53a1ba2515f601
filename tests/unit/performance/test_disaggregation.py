"""Prefill and decode apart: what each stage does, and how many replicas of each a load takes."""

from __future__ import annotations

import numpy as np
import pytest

from flyball.core.errors import InvalidInput
from flyball.performance.disaggregation import analyze, fewest
from flyball.performance.queueing import Replicas, queue_model

LAW = queue_model("v3-engine")
ONE = Replicas.of(
    alpha_s=0.008, beta_s=3e-5, gamma_s=2e-7, input_tokens=2048, output_tokens=256, max_batch=32, max_queue=128
)
COUNT = np.array([4])


def test_decode_is_no_longer_disturbed_by_prompts() -> None:
    """On as many replicas that decode, gaps between tokens are shorter where prompts are computed elsewhere."""
    rate = np.array([12.0])
    apart = analyze(LAW, ONE, ONE, rate, prefill_count=COUNT // 2, decode_count=COUNT)
    together = LAW.prepare(ONE).analyze(rate / COUNT)
    assert apart.itl_s[0] < 0.8 * together.itl_s[0]
    assert apart.throughput_rps[0] == pytest.approx(12.0, rel=1e-3)
    assert apart.e2e_s[0] > apart.ttft_s[0] + 254 * apart.itl_s[0]


def test_the_transfer_is_seen_once() -> None:
    """It delays the second token and the end, and nothing else."""
    rate = np.array([6.0])
    near, far = (
        analyze(LAW, ONE, ONE, rate, prefill_count=COUNT, decode_count=COUNT, transfer_s=t) for t in (0.0, 0.05)
    )
    assert far.second_token_s - near.second_token_s == pytest.approx(0.05)
    assert far.e2e_s - near.e2e_s == pytest.approx(0.05)
    assert (far.ttft_s[0], far.itl_s[0]) == (near.ttft_s[0], near.itl_s[0])


def test_the_fewest_keep_the_targets_and_one_less_does_not() -> None:
    """TTFT decides the prefill replicas, ITL those that decode; targets that nothing keeps have no number."""
    rate = np.array([40.0])
    found = fewest(LAW, ONE, ONE, rate, ttft_s=0.5, itl_s=0.01)
    assert found.seen.ttft_s[0] <= 0.5
    assert found.seen.itl_s[0] <= 0.01
    less = analyze(LAW, ONE, ONE, rate, prefill_count=found.prefill - 1, decode_count=found.decode)
    assert less.ttft_s[0] > 0.5
    less = analyze(LAW, ONE, ONE, rate, prefill_count=found.prefill, decode_count=found.decode - 1)
    assert less.itl_s[0] > 0.01
    tighter = fewest(LAW, ONE, ONE, rate, ttft_s=0.2, itl_s=0.01)
    assert tighter.prefill[0] >= found.prefill[0]
    assert tighter.decode[0] == found.decode[0]
    none = fewest(LAW, ONE, ONE, rate, ttft_s=0.001, itl_s=0.01)
    assert (none.prefill[0], none.decode[0]) == (0, 0)
    assert np.isnan(none.seen.e2e_s[0])


def test_answers_of_one_token_need_no_second_stage() -> None:
    """Embeddings and classifications end with the prefill; that is said."""
    short = Replicas.of(
        alpha_s=0.008, beta_s=3e-5, gamma_s=0, input_tokens=64, output_tokens=1, max_batch=8, max_queue=8
    )
    with pytest.raises(InvalidInput, match="plan them without a decode stage"):
        analyze(LAW, short, short, np.array([1.0]), prefill_count=COUNT, decode_count=COUNT)
