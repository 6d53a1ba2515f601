"""The greedy solver against all recorded runs of the Go optimizer on the small set."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flyball.core.fleet import FleetPlan, FleetSpec, Placement
from flyball.planner.plan import plan

RUNS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "data" / "inferno" / "optimizer_light_v07_small_runs.json").read_text()
)["runs"]
POLICIES = [run for run in RUNS if "scenario" not in run]
SCENARIOS = [run for run in RUNS if "scenario" in run]

TIED = {("Free-granite_34b", "A100", "4xA100")}  # of one value and cost: the original takes either, by its map's order


def solved(spec: FleetSpec) -> FleetPlan:
    """As the original solves it."""
    return plan(spec, queue_model="v3-compat", solver="unlimited" if spec.unlimited else "greedy")


def agree(ours: FleetPlan, theirs: dict[str, Any]) -> None:
    """The same servers run in the same way; latencies too, where the original has those of the real load."""
    assert ours.cost_per_h == pytest.approx(theirs["totalCost"])
    assert ours.allocations.keys() == theirs["allocations"].keys()
    for name, their in theirs["allocations"].items():
        a = ours.allocations[name]
        assert a.cost_per_h == pytest.approx(their["cost"]), name
        if (name, a.accelerator, their["accelerator"]) in TIED:
            continue
        assert (a.accelerator, a.replicas) == (their["accelerator"], their["numReplicas"]), name
        if a.slo_met:
            seen = (a.itl_s * 1e3, a.ttft_s * 1e3)
            assert seen == pytest.approx((their["itlAverage"], their["ttftAverage"]), rel=1e-4)


def named(run: dict[str, Any]) -> str:
    """What tells a run from the others."""
    keys = ("saturationPolicy", "capacityScale", "maxQueueSize", "delayedBestEffort", "unlimited")
    return "-".join(str(run[key]) for key in keys)


def limited(sample: Callable[..., FleetSpec], run: dict[str, Any]) -> FleetSpec:
    """The spec of a run."""
    spec = sample("small", run["maxQueueSize"], capacity=run["capacityScale"], unlimited=run["unlimited"])
    return replace(spec, saturation_policy=run["saturationPolicy"], delayed_best_effort=run["delayedBestEffort"])


@pytest.mark.parametrize("run", POLICIES, ids=named)
def test_every_recorded_run_is_met(sample: Callable[..., FleetSpec], run: dict[str, Any]) -> None:
    """Four saturation policies, delayed or not, from all of the capacity to a tenth of it."""
    agree(solved(limited(sample, run)), run["result"])


@pytest.mark.parametrize("run", SCENARIOS, ids=lambda r: r["scenario"])
def test_every_recorded_transition_is_met(sample: Callable[..., FleetSpec], run: dict[str, Any]) -> None:
    """From the unlimited solution to another load.

    Without load there is no error, as there is in the original, and replicas held ready run where they can keep their
    targets: the original takes the cheapest accelerator (551.5) even if it cannot.
    """
    spec = sample("small", 0, unlimited=run["unlimited"])
    start = solved(replace(spec, unlimited=True)).allocations
    scale = {"load x2": 2.0, "load x0.3": 0.3, "zero load": 0.0}
    factor = next((f for name, f in scale.items() if run["scenario"].startswith(name)), 1.0)
    least = 1 if "minReplicas=1" in run["scenario"] else 0

    def moved(server: Any) -> Any:
        now = start[server.name]
        return replace(
            server,
            current=Placement(accelerator=now.accelerator, replicas=now.replicas, cost_per_h=now.cost_per_h),
            demand=replace(server.demand, arrival_rps=server.demand.arrival_rps * factor),
            keep_accelerator=run["keepAccelerator"],
            min_replicas=least,
        )

    ours = solved(replace(spec, servers=tuple(moved(s) for s in spec.servers)))
    if run["result"].get("error"):
        assert len(ours.allocations) == len(spec.servers)
        assert ours.cost_per_h == 0
    elif least:
        assert len(ours.allocations) == len(spec.servers)
        assert ours.cost_per_h == 659 > run["result"]["totalCost"]
    else:
        agree(ours, run["result"])


def test_best_effort_tells_the_latencies_of_the_real_load(sample: Callable[..., FleetSpec]) -> None:
    """Fewer replicas than the targets need are flagged, and lose more or wait longer than those that would do."""
    spec = sample("small", 0, capacity=0.25)
    spec = replace(spec, saturation_policy="PriorityExhaustive")
    ours, whole = solved(spec), solved(replace(spec, unlimited=True))
    short = {name: a for name, a in ours.allocations.items() if not a.slo_met}
    assert 0 < len(short) < len(ours.allocations)
    for name, a in short.items():
        if a.accelerator == whole.allocations[name].accelerator:
            assert a.replicas < whole.allocations[name].replicas
            assert (a.loss, a.utilization) > (whole.allocations[name].loss, whole.allocations[name].utilization)


def test_order_is_no_matter(sample: Callable[..., FleetSpec]) -> None:
    """A hundred shuffles of servers, accelerators and profiles give the same plan."""
    spec = replace(sample("small", 0, capacity=0.1), saturation_policy="RoundRobin")
    first, shuffle = solved(spec), random.Random(0)
    for _ in range(100):
        mixed = replace(
            spec,
            servers=tuple(shuffle.sample(spec.servers, len(spec.servers))),
            profiles=tuple(shuffle.sample(spec.profiles, len(spec.profiles))),
            accelerators=tuple(shuffle.sample(spec.accelerators, len(spec.accelerators))),
        )
        assert solved(mixed) == first
