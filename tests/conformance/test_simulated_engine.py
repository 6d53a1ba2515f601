"""The tests' own engine keeps the contract of every target, so that what is proven on it means something."""

from __future__ import annotations

import pytest

from conformance.target import TargetConformance
from flyball.core.slo import Slo
from helpers.simulated_engine import SimulatedEngine, poisson


class TestSimulatedEngine(TargetConformance):
    """As every target."""

    @pytest.fixture
    def target(self) -> SimulatedEngine:
        """At its defaults."""
        return SimulatedEngine()


def test_every_token_arrives_in_order_and_none_before_its_request() -> None:
    """Traces are causal and complete, whatever the policy."""
    workload = poisson(count=40)
    for values in ({"max_num_seqs": 1}, {"max_num_batched_tokens": 64}, {}):
        engine = SimulatedEngine(noise=0.2)
        engine.apply(values)
        window = engine.run(workload, Slo(), "g")
        assert sorted((t.scheduled_s, t.output_tokens) for t in window.traces) == sorted(
            (r.arrival_s, r.output_tokens) for r in workload.requests
        )
        for trace in window.traces:
            assert len(trace.token_times_s) == trace.output_tokens
            assert list(trace.token_times_s) == sorted(trace.token_times_s)
            assert trace.token_times_s[0] > trace.scheduled_s
