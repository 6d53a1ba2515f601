"""Queue model v3 against the Go code's own answers, and where it departs from them on purpose."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flyball.core.errors import InvalidInput
from flyball.performance.queue_engine import V3_ENGINE
from flyball.performance.queue_v3 import V3, V3_COMPAT
from flyball.performance.queueing import Metrics, Replicas, queue_model

THEIRS = {  # ours -> theirs, ours in seconds where theirs are milliseconds
    "throughput_rps": "throughput",
    "ttft_s": "avgTTFT",
    "itl_s": "avgTokenTime",
    "prefill_s": "avgPrefillTime",
    "response_s": "avgRespTime",
    "in_service": "avgNumInServ",
    "utilization": "rho",
}
ONE = {"alpha_s": 0.01, "beta_s": 5e-5, "gamma_s": 5e-7, "input_tokens": 128, "output_tokens": 128}


def numbers(metrics: Metrics, index: int = 0) -> dict[str, float]:
    """One entry of each array, in their units."""
    return {
        theirs: float(getattr(metrics, ours)[index]) * (1e3 if ours.endswith("_s") else 1)
        for ours, theirs in THEIRS.items()
    }


def test_every_recorded_analysis_is_met(cases: dict[str, Any]) -> None:
    """All points that the Go code solved agree to 1e-4, waits to 1e-3 of the response time (theirs is float32)."""
    points = 0
    for case in cases.values():
        solved = [point for point in case.body["analyze"] if "error" not in point]
        seen = V3_COMPAT.prepare(case.replicas()).analyze(np.array([[point["rate"] for point in solved]]))
        for column, point in enumerate(solved):
            theirs = point["metrics"]
            ours = numbers(Metrics(*(getattr(seen, f)[:, column] for f in Metrics.__slots__)))
            assert ours == pytest.approx({name: theirs[name] for name in ours}, rel=1e-4), (case.name, point["rate"])
            assert seen.wait_s[0, column] * 1e3 == pytest.approx(
                theirs["avgWaitTime"], abs=1e-3 * theirs["avgRespTime"]
            )
            points += 1
    assert points >= 150


def test_ranges_of_rates_and_chunks_are_exact(cases: dict[str, Any]) -> None:
    """The slowest and fastest rate, and the number of prefill chunks at every batch, are those recorded."""
    for case in cases.values():
        queues = V3_COMPAT.prepare(case.replicas())
        assert queues.min_rate_rps[0] == pytest.approx(case.body["rateRange"]["min"], rel=1e-6)
        assert queues.max_rate_rps[0] == pytest.approx(case.body["rateRange"]["max"], rel=1e-6)
        table = case.body["numChunksByBatch"]
        assert queues.life.chunks(np.arange(1.0, len(table))[None, :])[0].tolist() == table[1:], case.name


def test_a_replica_without_room_for_two_is_solved(cases: dict[str, Any]) -> None:
    """Batch 1 without a queue: invalid in the original; its idle probability is 1 / (1 + lambda tau)."""
    replicas = cases["batch1-noqueue"].replicas()
    assert np.isnan(V3_COMPAT.prepare(replicas).analyze(np.array([0.5])).ttft_s).all()
    queues = V3.prepare(replicas)
    tau = 1 / queues.capacity_rps[0]
    seen = queues.analyze(np.array([0.5]))
    assert seen.loss[0] == pytest.approx(0.5 * tau / (1 + 0.5 * tau))
    assert seen.response_s[0] == pytest.approx(tau)


def test_capacity_is_the_largest_rate_of_service(cases: dict[str, Any]) -> None:
    """With chunked prefill the rate peaks at 97 requests, 4.296/s, where the original takes that of 256, 3.627/s."""
    replicas = cases["chunked-4096-64"].replicas()
    theirs, ours = V3_COMPAT.prepare(replicas), V3.prepare(replicas)
    assert (theirs.best_batch[0], theirs.capacity_rps[0]) == (256, pytest.approx(3.6267, rel=1e-4))
    assert (ours.best_batch[0], ours.capacity_rps[0]) == (97, pytest.approx(4.2964, rel=1e-4))
    assert ours.max_rate_rps[0] >= 4.29


@pytest.mark.parametrize("rate", [0.0, 1e-30])
def test_an_idle_replica_has_its_latencies_and_no_traffic(rate: float) -> None:
    """No load is a load like any other: the latencies of a request that comes alone."""
    seen = V3.prepare(Replicas.of(**ONE, max_batch=16, max_queue=16)).analyze(np.array([rate]))
    assert seen.throughput_rps[0] == rate
    assert (seen.wait_s[0], seen.loss[0], seen.utilization[0]) == pytest.approx((0, 0, 0), abs=1e-12)
    assert 0.01 < seen.itl_s[0] < 0.02 < seen.ttft_s[0] < 0.04


@pytest.mark.parametrize("lengths", [(0.0, 64.0), (64.0, 0.0), (512.0, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize("model", [V3, V3_COMPAT, V3_ENGINE])
def test_requests_of_one_kind_only_are_solved(lengths: tuple[float, float], model: Any) -> None:
    """No tokens in, or none out (embeddings): finite metrics; without output the first answer is the whole answer."""
    replicas = Replicas.of(**ONE | {"input_tokens": lengths[0], "output_tokens": lengths[1]}, max_batch=8, max_queue=8)
    queues = model.prepare(replicas)
    seen = queues.analyze(queues.capacity_rps * 0.5)
    assert all(np.isfinite(getattr(seen, f)).all() for f in Metrics.__slots__)
    if lengths[1] == 0:
        assert seen.ttft_s == pytest.approx(seen.response_s)
        assert seen.itl_s == 0


@pytest.mark.parametrize("rate", [10.0, 1e6, 1e300])
def test_overload_is_answered(rate: float) -> None:
    """However much is offered, the replica serves what it can with a full batch, and turns the rest away."""
    queues = V3.prepare(Replicas.of(**ONE, max_batch=4, max_queue=100))
    seen = queues.analyze(np.array([rate]))
    assert seen.throughput_rps[0] == pytest.approx(queues.capacity_rps[0], rel=0.05)
    assert seen.utilization[0] == pytest.approx(1, abs=0.02)
    assert seen.loss[0] == pytest.approx(1 - seen.throughput_rps[0] / rate)
    assert math.isfinite(seen.ttft_s[0])


def test_many_are_solved_like_one(cases: dict[str, Any]) -> None:
    """Replicas of all sizes in one batch, at several rates each, get the answers they get alone."""
    alone = [case.replicas() for case in cases.values()]
    together = Replicas(*(np.concatenate([getattr(r, f) for r in alone]) for f in Replicas.__slots__))
    rates = np.linspace(0.1, 1.2, 4) * V3.prepare(together).capacity_rps[:, None]
    seen = V3.prepare(together).analyze(rates)
    for row, replicas in enumerate(alone):
        single = V3.prepare(replicas).analyze(rates[row : row + 1])
        for f in Metrics.__slots__:
            assert getattr(seen, f)[row] == pytest.approx(getattr(single, f)[0], rel=1e-9, abs=1e-12)


def test_the_engine_reading_gives_the_first_token_a_step_earlier() -> None:
    """A prompt alone that fits one step waits for that step only, where the last prefill step emits a token."""
    replicas = Replicas.of(**ONE, max_batch=16, max_queue=16)
    idle = np.array([0.0])
    step = 0.01 + 128 * 5e-5 + 128 * 5e-7
    assert V3_ENGINE.prepare(replicas).analyze(idle).ttft_s[0] == pytest.approx(step)


def test_a_model_is_found_by_name_and_a_wrong_name_says_which_there_are() -> None:
    """The registry hands out our models and names them to who asks for another."""
    assert queue_model("v3") is V3
    with pytest.raises(InvalidInput, match="unknown queue model 'v9'; use one of v3, v3-compat, v3-engine"):
        queue_model("v9")


@pytest.mark.parametrize(
    ("field", "value"), [("alpha_s", -1.0), ("beta_s", math.nan), ("max_batch", 0), ("max_queue", -1)]
)
def test_a_replica_that_cannot_be_is_refused(field: str, value: float) -> None:
    """The complaint names the quantity, what was given and what is needed."""
    given = {**ONE, "max_batch": 4, "max_queue": 4, field: value}
    with pytest.raises(InvalidInput, match=f"a replica's {field} is {value:g}; give a finite number of at least"):
        Replicas.of(**given)


def test_some_rows_of_replicas_are_those_rows(cases: dict[str, Any]) -> None:
    """Taking rows before or after preparing makes no difference."""
    replicas = Replicas.of(**ONE, max_batch=[2, 8, 32], max_queue=[0, 5, 9])
    rows, rates = np.array([2, 0]), np.array([3.0, 1.0])
    after = V3.prepare(replicas).take(rows).analyze(rates)
    before = V3.prepare(replicas.take(rows)).analyze(rates)
    assert after.ttft_s == pytest.approx(before.ttft_s)
    assert replace(replicas, max_batch=np.array([2, 8, 33])).max_batch[2] == 33
