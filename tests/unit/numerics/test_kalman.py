"""Kalman filters against the recorded sequences of llm-inferno's, and against what theory says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flyball.numerics.kalman import Belief, extended_update, update
from flyball.numerics.markov import Floats
from flyball.performance.queue_v3 import V3_COMPAT
from flyball.performance.queueing import Replicas

RECORDED = json.loads((Path(__file__).parents[2] / "data" / "inferno" / "kalman_tuner.json").read_text())
NIS_GATE = 7.378  # chi-squared of 2 degrees of freedom, 97.5 %


def test_the_linear_sequence_is_met() -> None:
    """Position and speed from noisy positions: states, covariances and gains to 1e-6."""
    belief, noise = Belief(np.array([0.0, 1.0]), np.eye(2)), np.array([[0.5]])
    transition, added = np.array([[1.0, 1.0], [0.0, 1.0]]), np.diag([0.01, 0.02])
    observation = np.array([[1.0, 0.0]])
    for step in RECORDED["kalman_linear"]["steps"]:
        prior = belief.moved(transition, added)
        seen = update(prior, np.array([step["z"]]) - observation @ prior.mean, observation, noise)
        belief = seen.belief
        assert belief.mean == pytest.approx(np.array(step["x"]), rel=1e-6)
        assert belief.covariance == pytest.approx(np.array(step["P"]), rel=1e-6)
        assert seen.gain == pytest.approx(np.array(step["K"]), rel=1e-6)
        assert seen.innovation == pytest.approx(np.array(step["y"]), rel=1e-6)
        assert seen.innovation_covariance == pytest.approx(np.array(step["S"]), rel=1e-6)


@pytest.mark.parametrize("sequence", RECORDED["ekf_tuner"], ids=lambda s: s["name"])
def test_the_tuner_s_sequences_are_met(sequence: dict[str, Any]) -> None:
    """Latency parameters from TTFT and ITL by the extended filter: states to 1e-4, since theirs are float32.

    The Jacobian's differences of 1 % of theirs have errors of 1e-5, more in what the covariance becomes of them.
    """
    config = sequence["config"]
    start = np.array(config["initState"])
    added = np.diag((config["percentChange"] * start) ** 2)
    noise = np.diag((config["errorLevel"] / 1.96 * np.array(config["expectedObservations"])) ** 2)
    least, most = np.array(config["minState"]), np.array(config["maxState"])
    belief = Belief(start, added)
    for step in sequence["steps"]:

        def shows(x: Floats, step: dict[str, Any] = step) -> Floats:
            replica = Replicas.of(
                alpha_s=x[0] / 1e3, beta_s=x[1] / 1e3, gamma_s=x[2] / 1e3, input_tokens=step["inTokens"],
                output_tokens=step["outTokens"], max_batch=config["maxBatch"], max_queue=config["maxQueue"],
            )  # fmt: skip
            seen = V3_COMPAT.prepare(replica).analyze(np.array([step["rpm"] / 60]))
            return np.array([seen.ttft_s[0], seen.itl_s[0]]) * 1e3

        prior = belief.moved(np.eye(3), added)
        seen = extended_update(prior, np.array([step["ttft"], step["itl"]]), shows, noise)
        rejected = (seen.belief.mean <= 0).any() or (not step["skipNIS"] and seen.nis >= NIS_GATE)
        assert rejected == step["validationFailed"]
        if not rejected:
            belief = Belief(np.clip(seen.belief.mean, least, most), seen.belief.covariance)
        assert belief.mean == pytest.approx(np.array(step["state"]), rel=1e-4), step["k"]
        assert np.diag(belief.covariance) == pytest.approx(np.array(step["Pdiag"]), rel=1e-2), step["k"]


def test_a_tracked_state_is_as_sure_as_it_says() -> None:
    """Over many runs of a random walk the normalised innovation squared has the mean of its chi-squared law."""
    random = np.random.default_rng(7)
    added, noise, one = np.diag([0.1]), np.diag([1.0, 2.0]), np.eye(1)
    observation = np.array([[1.0], [0.5]])
    truth, belief, seen = np.zeros(1), Belief(np.zeros(1), np.eye(1)), []
    for _ in range(4000):
        truth = truth + random.normal(0, np.sqrt(0.1), 1)
        measured = observation @ truth + random.normal(0, np.sqrt(np.diag(noise)))
        prior = belief.moved(one, added)
        result = update(prior, measured - observation @ prior.mean, observation, noise)
        belief = result.belief
        seen.append(result.nis)
    assert np.mean(seen) == pytest.approx(2.0, rel=0.1)
    assert np.mean(np.array(seen) < NIS_GATE) == pytest.approx(0.975, abs=0.01)
