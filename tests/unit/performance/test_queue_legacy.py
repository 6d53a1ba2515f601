"""The older laws against the Go code's own answers, and the plain queues against textbook numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flyball.performance.queueing import Replicas, queue_model
from flyball.performance.sizing import Goals, optimal_batch, size

RECORDED = json.loads((Path(__file__).parents[2] / "data" / "inferno" / "queue_analysis_legacy.json").read_text())
CASES = [pytest.param(law, case, id=f"{law}-{i}") for law in ("v1", "v2") for i, case in enumerate(RECORDED[law])]


def replicas(given: dict[str, float]) -> Replicas:
    """A recorded input, in seconds."""
    return Replicas.of(
        alpha_s=given["alpha"] / 1e3, beta_s=given["beta"] / 1e3, gamma_s=given["gamma"] / 1e3,
        delta_s=given.get("delta", 0.0) / 1e3, input_tokens=given["avgInputTokens"],
        output_tokens=given["avgOutputTokens"], max_batch=given["maxBatchSize"], max_queue=given["maxQueueSize"],
    )  # fmt: skip


@pytest.mark.parametrize(("law", "case"), CASES)
def test_every_recorded_analysis_is_met(law: str, case: dict[str, Any]) -> None:
    """Rates' range and all points agree to 1e-4, waits to 1e-3 of the response time (theirs is float32)."""
    queues = queue_model(law).prepare(replicas(case["input"]))
    assert queues.min_rate_rps[0] == pytest.approx(case["rateRange"]["Min"], rel=1e-4)
    assert queues.max_rate_rps[0] == pytest.approx(case["rateRange"]["Max"], rel=1e-4)
    seen = queues.analyze(np.array([[point["rate"] for point in case["analyze"]]]))
    for column, point in enumerate(case["analyze"]):
        theirs = point["metrics"]
        for name, ours, unit in (
            ("Throughput", seen.throughput_rps, 1), ("AvgRespTime", seen.response_s, 1e3), ("Rho", seen.utilization, 1),
            ("AvgNumInServ", seen.in_service, 1), ("AvgPrefillTime", seen.prefill_s, 1e3),
        ):  # fmt: skip
            assert ours[0, column] * unit == pytest.approx(theirs[name], rel=1e-4, abs=1e-9), (name, point["rate"])
        if case["input"]["avgOutputTokens"] > 1 or law == "v2":
            assert seen.itl_s[0, column] * 1e3 == pytest.approx(theirs["AvgTokenTime"], rel=1e-4)
        if "AvgTTFT" in theirs:
            assert seen.ttft_s[0, column] * 1e3 == pytest.approx(theirs["AvgTTFT"], rel=1e-3)
        assert seen.wait_s[0, column] * 1e3 == pytest.approx(theirs["AvgWaitTime"], abs=1e-3 * theirs["AvgRespTime"])


@pytest.mark.parametrize(("law", "case"), CASES)
def test_every_recorded_size_is_met(law: str, case: dict[str, Any]) -> None:
    """The largest rates within each target agree to 1e-4, and with them what the replica then does."""
    given = case["input"]
    goals = Goals.of(
        1, ttft_s=given["targetTTFT"] / 1e3 or np.inf, itl_s=given["targetITL"] / 1e3 or np.inf,
        stable=given.get("targetTPS", 0) > 0,
    )  # fmt: skip
    sized = size(queue_model(law).prepare(replicas(given)), goals)
    theirs = case["size"]["targetRate"]
    assert sized.rate_ttft_rps[0] == pytest.approx(theirs["RateTargetTTFT"], rel=1e-4)
    assert sized.rate_itl_rps[0] == pytest.approx(theirs["RateTargetITL"], rel=1e-4)
    assert sized.rate_stable_rps[0] == pytest.approx(theirs["RateTargetTPS"], rel=1e-4)
    assert sized.metrics.throughput_rps[0] == pytest.approx(case["size"]["metrics"]["Throughput"], rel=1e-4)


def test_the_plain_queues_are_those_recorded(vectors: dict[str, Any]) -> None:
    """M/M/1/K and the chain with times a + b n: throughput, mean number and times, at light load and overload."""
    solved = 0
    for raw in vectors["rawQueueModels"]:
        if not raw["valid"]:
            continue
        plain = raw["model"] == "MM1K"
        one = Replicas.of(
            alpha_s=1 / raw["mu"] if plain else raw["a"], beta_s=0.0 if plain else raw["b"], gamma_s=0.0,
            input_tokens=1, output_tokens=0, max_batch=1 if plain else raw["N"],
            max_queue=raw["K"] - (1 if plain else raw["N"]),
        )  # fmt: skip
        seen = queue_model("mm1k" if plain else "linear").prepare(one).analyze(np.array([raw["lambda"]]))
        assert seen.throughput_rps[0] == pytest.approx(raw["throughput"], rel=1e-4)
        assert seen.response_s[0] == pytest.approx(raw["T"], rel=1e-4)
        assert seen.wait_s[0] == pytest.approx(raw["W"], rel=1e-4, abs=1e-3 * raw["T"])
        solved += 1
    assert solved >= 12


@pytest.mark.parametrize("law", ["v1", "v2", "mm1k", "linear"])
def test_the_edges_are_answers(law: str) -> None:
    """No load, overload, no room for two, no prompt and no answer: finite numbers, never an error."""
    numbers = {"alpha_s": 0.01, "beta_s": 1e-4, "gamma_s": 1e-6, "delta_s": 1e-6}
    many = Replicas.of(
        **numbers, input_tokens=[64, 64, 0, 64], output_tokens=[32, 32, 32, 0], max_batch=[8, 1, 8, 8],
        max_queue=[4, 0, 4, 4],
    )  # fmt: skip
    seen = queue_model(law).prepare(many).analyze(np.tile([0.0, 1e6], (4, 1)))
    for name in type(seen).__slots__:
        assert np.isfinite(getattr(seen, name)).all(), name
    assert (seen.throughput_rps[:, 0] == 0).all()
    assert (seen.loss[:, 1] > 0.5).all()
    best = optimal_batch(queue_model(law), many.take(np.array([0])), Goals.of(1, itl_s=0.1, ttft_s=5.0))
    assert 1 <= best.batch[0] <= 8
