"""Candidates: every way to run a server, as the Go optimizer sizes and prices it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flyball.core.fleet import FleetSpec, Placement
from flyball.planner.problem import build, transition_value

RECORDED = Path(__file__).parents[2] / "data" / "inferno" / "optimizer_light_v07_small_candidates.json"


@pytest.mark.parametrize("max_queue", [0, 128])
def test_candidates_are_those_recorded(sample: Callable[..., FleetSpec], max_queue: int) -> None:
    """The same accelerators are feasible, with the same batch, replicas and cost; latencies and values to 1e-4."""
    recorded = json.loads(RECORDED.read_text())[f"candidates_maxQueue{max_queue}"]
    for choice in build(sample("small", max_queue), "v3-compat").choices:
        ours = {c.allocation.accelerator: c for c in choice.candidates}
        theirs = recorded[choice.server.name]
        assert ours.keys() == theirs.keys()
        for name, their in theirs.items():
            a = ours[name].allocation
            assert a.max_batch == their["maxBatch"]
            if their["numReplicas"] < 100_000:  # beyond, float32 rounds the rate that the count is divided by
                assert (a.replicas, a.cost_per_h) == (their["numReplicas"], their["cost"])
            seen = (a.ttft_s * 1e3, a.itl_s * 1e3, ours[name].value)
            assert seen == pytest.approx((their["ttftAverage"], their["itlAverage"], their["value"]), rel=1e-4)


def test_corrected_candidates_differ_only_where_the_original_errs(sample: Callable[..., FleetSpec]) -> None:
    """A batch of 1 without a queue is solved, and one whose ITL is over its target is not let through."""

    def feasible(max_queue: int) -> dict[str, set[str]]:
        choices = build(sample("small", max_queue)).choices
        return {c.server.name: {x.allocation.accelerator for x in c.candidates} for c in choices}

    recorded = json.loads(RECORDED.read_text())
    for max_queue, changed in ((0, {"Free-llama_70b"}), (128, {"Free-llama_70b", "Bronze-llama_70b"})):
        ours, theirs = feasible(max_queue), recorded[f"candidates_maxQueue{max_queue}"]
        assert {name for name in ours if ours[name] != set(theirs[name])} == changed
        assert "L4" not in ours["Bronze-llama_70b"]  # its ITL is 282 ms, its target 160 ms


def test_staying_is_free_and_moving_costs_a_tenth_of_both() -> None:
    """Same placement 0; same accelerator the cost added; another one a penalty besides."""
    here = Placement(accelerator="A", replicas=2, cost_per_h=80.0)
    assert transition_value(here, here) == 0
    assert transition_value(here, Placement(accelerator="A", replicas=1, cost_per_h=40.0)) == -40
    assert transition_value(here, Placement(accelerator="B", replicas=1, cost_per_h=20.0)) == 10 - 60
