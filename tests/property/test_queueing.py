"""What holds for every replica and every load."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyball.performance.percentiles import percentiles
from flyball.performance.queueing import Metrics, Replicas, queue_model

MODELS = ("v3", "v3-engine")


@st.composite
def replicas(draw: st.DrawFn, least_batch: int = 1, whole_prompt: bool = False, varied: bool = False) -> Replicas:
    """A replica of any size; with `whole_prompt`, its prompts are never cut; with `varied`, lengths vary."""
    batch = draw(st.integers(least_batch, 80))
    tokens_in, out = draw(st.integers(1, 2000)), draw(st.integers(8, 500))
    return Replicas.of(
        alpha_s=draw(st.floats(1e-3, 0.1)),
        beta_s=draw(st.floats(1e-7, 1e-3)),
        gamma_s=draw(st.floats(1e-10, 1e-5)),
        input_tokens=tokens_in,
        output_tokens=out,
        max_batch=batch,
        max_queue=draw(st.integers(0, 100)),
        max_step_tokens=(tokens_in + 1) * (batch + 1) if whole_prompt else draw(st.integers(64, 8192)),
        input_cv=draw(st.floats(0.0, 3.0)) if varied else np.nan,
        output_cv=draw(st.floats(0.0, 3.0)) if varied else np.nan,
    )


def seen(replica: Replicas, model: str, shares: list[float]) -> Metrics:
    """Metrics at some shares of the capacity, in one row."""
    queues = queue_model(model).prepare(replica)
    return queues.analyze(np.array([shares]) * queues.capacity_rps[:, None])


@pytest.mark.parametrize(("model", "most", "slack"), [("v3", 1.5, 1e-9), ("v3-engine", 0.9, 0.02)])
@given(replica=replicas(least_batch=2, whole_prompt=True))
def test_more_load_is_never_faster(model: str, most: float, slack: float, replica: Replicas) -> None:
    """TTFT and ITL do not fall as load rises (prompts whole: a change of chunks is a jump).

    v3 from idle to overload; the engine's reading, which joins two approximations, to nine tenths of the capacity.
    """
    metrics = seen(replica, model, np.linspace(0.0, most, 31).tolist())
    for latency in (metrics.ttft_s[0], metrics.itl_s[0]):
        assert (np.diff(latency) >= -slack * latency[:-1]).all()


@pytest.mark.parametrize("model", MODELS)
@given(replica=replicas(), share=st.floats(0.0, 100.0))
def test_served_is_at_most_offered_and_at_most_capacity(model: str, replica: Replicas, share: float) -> None:
    """Throughput stays under both, and what is lost is the difference to what was offered."""
    queues = queue_model(model).prepare(replica)
    offered = share * queues.capacity_rps
    metrics = queues.analyze(offered)
    assert metrics.throughput_rps[0] <= min(offered[0], queues.capacity_rps[0]) * (1 + 1e-9)
    assert metrics.throughput_rps[0] == pytest.approx(offered[0] * (1 - metrics.loss[0]), rel=1e-6, abs=1e-12)


@given(replica=replicas(whole_prompt=True), share=st.floats(0.1, 3.0), more=st.integers(1, 100))
def test_a_longer_queue_loses_less(replica: Replicas, share: float, more: int) -> None:
    """With more places to wait in fewer are turned away (prompts whole: chunks can make a full batch slower)."""
    longer = Replicas.of(
        **{f: getattr(replica, f) for f in Replicas.__slots__} | {"max_queue": replica.max_queue + more}
    )
    loss = [seen(r, "v3", [share]).loss[0, 0] for r in (replica, longer)]
    assert loss[1] <= loss[0] + 1e-12


@given(replica=replicas(), share=st.floats(0.0, 3.0))
def test_littles_law(replica: Replicas, share: float) -> None:
    """Those in service are the throughput times the time they are served."""
    metrics = seen(replica, "v3", [share])
    served_s = metrics.response_s[0, 0] - metrics.wait_s[0, 0]
    assert metrics.in_service[0, 0] == pytest.approx(metrics.throughput_rps[0, 0] * served_s, rel=1e-6, abs=1e-12)


@given(replica=replicas(varied=True), share=st.floats(0.0, 3.0))
def test_lengths_that_vary_leave_shares_and_percentiles_in_order(replica: Replicas, share: float) -> None:
    """Whatever the variation and the load, a share is turned away, nobody waits less than nothing, P50 is below P99."""
    queues = queue_model("v3").prepare(replica)
    rate = share * queues.capacity_rps
    metrics, found = queues.analyze(rate), percentiles(queues, rate)
    assert -1e-12 <= metrics.loss[0] <= 1
    assert metrics.wait_s[0] >= -1e-12
    for latencies in (found.ttft_s[0], found.itl_s[0], found.e2e_s[0]):
        assert np.isfinite(latencies).all()
        assert (latencies > 0).all()
        assert (np.diff(latencies) >= 0).all()
