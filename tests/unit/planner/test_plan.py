"""Plans of whole fleets: the totals of llm-inferno's own optimizer, and what ours adds to it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from flyball.core.fleet import Demand, FleetSpec, Placement, ServerSpec
from flyball.planner.plan import plan

Fleets = Callable[..., FleetSpec]
Servers = Callable[..., ServerSpec]


@pytest.mark.parametrize("queue_model", [None, "v3-compat"])
@pytest.mark.parametrize(
    ("name", "max_queue", "total"),
    [("small", 0, 21252), ("small", 128, 28911), ("large", 0, 20439), ("large", 128, 22416)],
)
def test_unlimited_totals_are_exact(
    sample: Fleets, name: str, max_queue: int, total: float, queue_model: str | None
) -> None:
    """Every server of both sample sets is planned, at the cost that the Go optimizer finds."""
    result = plan(sample(name, max_queue, unlimited=True), queue_model=queue_model)
    assert result.cost_per_h == total
    assert not result.unserved


@pytest.mark.parametrize(
    ("name", "max_queue", "capacity", "optimum"),
    [
        ("small", 0, 1.0, 22564), ("small", 128, 1.0, 30619), ("large", 0, 1.0, 21161), ("large", 128, 1.0, 24496),
        ("small", 0, 0.75, 23020), ("small", 128, 0.75, 31352), ("large", 0, 0.75, 22328), ("large", 128, 0.75, 29286),
    ],
)  # fmt: skip
def test_limited_plans_are_optimal(sample: Fleets, name: str, max_queue: int, capacity: float, optimum: float) -> None:
    """Within the capacity every server is served at the proven optimum, also where greedy choice fails."""
    spec = sample(name, max_queue, capacity=capacity)
    result = plan(spec)
    assert (result.cost_per_h, result.unserved) == (optimum, {})


@pytest.mark.parametrize(
    ("factor", "small", "large"), [(1.0, 21252, 20439), (2.0, 42090, 40067), (0.3, 6624, 6514), (0.0, 0, 0)]
)
def test_a_changed_load_moves_the_plan_as_recorded(sample: Fleets, factor: float, small: float, large: float) -> None:
    """From the unlimited plan, loads times 2 and 0.3 and none at all lead to the recorded totals."""
    for name, total in (("small", small), ("large", large)):
        spec = sample(name, 0, unlimited=True)
        before = plan(spec).allocations
        servers = tuple(
            replace(s, current=before[s.name], demand=replace(s.demand, arrival_rps=s.demand.arrival_rps * factor))
            for s in spec.servers
        )
        assert plan(replace(spec, servers=servers)).cost_per_h == total


def test_input_order_changes_nothing(sample: Fleets) -> None:
    """Shuffled servers, profiles and accelerators give the same plan, limited or not."""
    shuffle = random.Random(7).sample
    for unlimited in (False, True):
        spec = sample("small", 128, unlimited=unlimited)
        first = plan(spec)
        for _ in range(3):
            mixed = replace(
                spec,
                servers=tuple(shuffle(spec.servers, len(spec.servers))),
                profiles=tuple(shuffle(spec.profiles, len(spec.profiles))),
                accelerators=tuple(shuffle(spec.accelerators, len(spec.accelerators))),
            )
            assert dict(plan(mixed).allocations) == dict(first.allocations)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"service_class": "lead"}, "its service class 'lead' is not defined; define it or correct the name"),
        ({"model": "x"}, "class 'gold' has no targets for model 'x'; add them"),
        ({"demand": Demand(arrival_rps=1.0)}, "its load of 1 requests/s has no token counts; state them"),
        (
            {"keep_accelerator": True, "current": Placement(accelerator="gone", replicas=1)},
            "model 'm' has no latency profile on any accelerator that it is to keep ('gone'); "
            "measure one (flyball fit)",
        ),
        (
            {"service_class": "strict"},
            "no accelerator keeps ITL <= 4 ms for model 'm' at 256 tokens in, 128 out: "
            "fast needs TTFT 16.38 ms and ITL 5.058 ms when idle; relax the targets or add a faster accelerator",
        ),
    ],
)
def test_who_cannot_be_served_is_told_why_and_the_rest_is(
    fleet: Fleets, server: Servers, changes: dict[str, Any], reason: str
) -> None:
    """One server's fault is its own: it is named with the reason, and the others are planned."""
    result = plan(fleet(server("good"), server("bad", **changes)))
    assert list(result.allocations) == ["good"]
    assert result.unserved == {"bad": reason}


def test_without_a_load_nothing_runs_unless_it_must(fleet: Fleets, server: Servers) -> None:
    """No arrivals: no replicas at no cost; with a minimum, that many, priced, also within a capacity."""
    idle = Demand(arrival_rps=0.0, input_tokens=256, output_tokens=128)
    for capacity in (None, {"S": 1}):
        servers = (server("off", demand=idle), server("on", demand=idle, min_replicas=1))
        allocations = plan(fleet(*servers, capacity=capacity)).allocations
        assert (allocations["off"].accelerator, allocations["off"].replicas, allocations["off"].cost_per_h) == (
            "",
            0,
            0,
        )
        assert (allocations["on"].accelerator, allocations["on"].replicas, allocations["on"].cost_per_h) == (
            "slow",
            1,
            1,
        )


def test_an_embedding_server_is_sized_by_its_prefill(fleet: Fleets, server: Servers) -> None:
    """Requests without output are a load (the original took them for none)."""
    demand = Demand(arrival_rps=50.0, input_tokens=512, output_tokens=0)
    allocation = plan(fleet(server(demand=demand))).allocations["s"]
    assert allocation.replicas >= 1
    assert allocation.itl_s == 0
    assert allocation.capacity_rps >= 50


def test_promised_tokens_add_to_the_load_and_never_replace_it(fleet: Fleets, server: Servers) -> None:
    """Replicas are enough for the arrivals and for the tokens promised, whichever is more."""
    few, many = (plan(fleet(server(), output_tps=tps)).allocations["s"].capacity_rps for tps in (10.0, 12800.0))
    assert few >= 20
    assert many >= 100


def test_a_short_capacity_serves_priorities_first(fleet: Fleets, server: Servers) -> None:
    """With cards for one server only, the one of the higher priority gets them, however the spec is ordered."""
    needed = plan(fleet(server("a"))).allocations["a"].replicas
    servers = (server("iron", service_class="iron"), server("gold"))
    for order in (servers, servers[::-1]):
        result = plan(fleet(*order, capacity={"S": needed + 1}))
        assert list(result.allocations) == ["gold"]
        assert result.unserved["iron"].startswith(f"the capacity is too small: it needs {needed} S (1 left)")


def test_a_server_without_choices_does_not_stop_a_limited_plan(fleet: Fleets, server: Servers) -> None:
    """Nobody can be served: both are named, and the plan is empty."""
    result = plan(fleet(server("a", model="x"), server("b"), capacity={"S": 0}))
    assert set(result.unserved) == {"a", "b"}
    assert result.cost_per_h == 0


def test_a_profile_without_a_batch_gets_the_best_one(fleet: Fleets, server: Servers) -> None:
    """Where the profile states no output length for its batch, the batch is searched for below its ceiling."""
    spec = fleet(server())
    spec = replace(spec, profiles=tuple(replace(p, at_tokens=0, max_batch=200) for p in spec.profiles))
    allocation = plan(spec).allocations["s"]
    assert 1 < allocation.max_batch < 200
    assert (allocation.ttft_s <= 0.5, allocation.itl_s <= 0.05) == (True, True)
