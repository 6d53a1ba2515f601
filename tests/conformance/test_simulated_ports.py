"""The simulator's engine keeps the contract of every target, and measures as a load generator does."""

from __future__ import annotations

import pytest

from conformance.target import TargetConformance
from flyball.adapters.simulated_engine import SimulatedEngine
from flyball.core.errors import InvalidKnob
from flyball.core.slo import Slo
from flyball.performance.simulator import Law
from helpers.simulated_engine import poisson

LAW = Law(alpha_s=0.009, beta_s=3e-5, gamma_s=6e-8)


class TestSimulatedTarget(TargetConformance):
    """As every target."""

    @pytest.fixture
    def target(self) -> SimulatedEngine:
        """At its defaults."""
        return SimulatedEngine(LAW)


def test_every_token_arrives_in_order_and_none_before_its_request() -> None:
    """Windows are causal and complete, whatever the policy and the core."""
    workload = poisson(count=40)
    seen = []
    for values in ({"max_num_seqs": 1}, {"max_num_batched_tokens": 64, "max_num_seqs": 8}, {}):
        for compiled in (None, False):
            engine = SimulatedEngine(LAW, compiled=compiled)
            engine.apply(values)
            window = engine.run(workload, Slo(), "g")
            assert [(t.scheduled_s, t.output_tokens) for t in window.traces] == [
                (r.arrival_s, r.output_tokens) for r in workload.requests
            ]
            for trace in window.traces:
                assert list(trace.token_times_s) == sorted(trace.token_times_s)
                assert trace.token_times_s[0] > trace.scheduled_s
            seen.append(window.summary("e2e").mean)
    assert seen[0] == pytest.approx(seen[1])
    assert seen[0] > 2 * seen[-1]  # one at a time is slower


def test_what_cannot_fit_fails_and_is_counted() -> None:
    """A request longer than the cache is an error in the window, not an exception; a batch above the budget is one."""
    workload = poisson(count=10, inputs=300)
    window = SimulatedEngine(Law(alpha_s=0.01, beta_s=0, gamma_s=0, kv_tokens=256)).run(workload, Slo(), "g")
    assert window.errors["too_long"] > 0
    assert len(window.completed) + window.errors["too_long"] == 10
    with pytest.raises(InvalidKnob, match="token a step"):
        SimulatedEngine(LAW).apply({"max_num_batched_tokens": 16})
