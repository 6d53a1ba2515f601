"""Replicas of one server on several accelerators, against the recorded optima of the integer program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from flyball.core.fleet import FleetSpec, ServerSpec
from flyball.planner.plan import plan
from flyball.planner.problem import build
from flyball.planner.solvers import solver
from flyball.planner.solvers.heterogeneous import _Columns
from flyball.planner.solvers.program import Budget

OPTIMA = [  # set, queue, share of the capacity, optimum
    ("small", 0, 1.0, 22343.5),
    ("small", 128, 1.0, 30155.75),
    ("small", 0, 0.75, 22759.5),
    ("small", 128, 0.75, 31075.75),
    pytest.param("large", 0, 1.0, 20653.5, marks=pytest.mark.slow),
    pytest.param("large", 128, 1.0, 23886.25, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "max_queue", "capacity", "optimum"), OPTIMA)
def test_the_optimum_is_reached(
    sample: Callable[..., FleetSpec], name: str, max_queue: int, capacity: float, optimum: float
) -> None:
    """Everybody is served within 1 % of the optimum, the stated bound is below it, and every part keeps its targets."""
    spec = sample(name, max_queue, capacity=capacity)
    found = plan(spec, queue_model="v3-compat", solver="heterogeneous", time_limit_s=20)
    assert optimum * (1 - 1e-4) <= found.cost_per_h <= optimum * 1.01
    assert found.bound is not None
    assert found.bound <= 1.1 * optimum * (1 + 1e-6)  # moving from nothing costs a tenth
    assert found.gap is not None
    assert found.gap < 0.01
    assert len(found.allocations) == len(spec.servers)
    cards = dict.fromkeys(spec.capacity, 0)
    types = {a.name: a for a in spec.accelerators}
    each = {(p.model, p.accelerator): p.accelerators for p in spec.profiles}
    for server in spec.servers:
        whole = found.allocations[server.name]
        parts = (whole, *whole.also)
        assert sum(part.capacity_rps for part in parts) >= server.demand.arrival_rps * (1 - 1e-6)
        for part in parts:
            assert part.slo_met
            a = types[part.accelerator]
            cards[a.type] += part.replicas * a.units * each[server.model, a.name]
    assert all(cards[name] <= spec.capacity[name] for name in cards)


def test_priorities_are_kept_where_capacity_is_short(
    fleet: Callable[..., FleetSpec], server: Callable[..., ServerSpec]
) -> None:
    """With room for one of two servers the one of the higher priority is served, and the other told why not."""
    gold, iron = server("gold"), server("iron", service_class="iron")
    need = plan(fleet(gold)).allocations["gold"]
    spec = fleet(gold, iron, capacity={"S": need.replicas, "F": 0})
    found = plan(spec, solver="heterogeneous")
    assert set(found.allocations) == {"gold"}
    assert "the capacity is too small" in found.unserved["iron"]


def test_fewest_replicas_are_kept(fleet: Callable[..., FleetSpec], server: Callable[..., ServerSpec]) -> None:
    """A server may ask for more replicas than its load needs, and gets them on the cheapest accelerators."""
    found = plan(fleet(server(min_replicas=30), capacity={"S": 20, "F": 40}), solver="heterogeneous")
    parts = (found.allocations["s"], *found.allocations["s"].also)
    assert sum(part.replicas for part in parts) == 30
    assert {part.accelerator: part.replicas for part in parts} == {"slow": 20, "fast": 10}


def test_order_is_no_matter(sample: Callable[..., FleetSpec]) -> None:
    """Servers in another order get the same plan."""
    spec = sample("small", 128)
    turned = replace(spec, servers=spec.servers[::-1])
    assert plan(turned, solver="heterogeneous") == plan(spec, solver="heterogeneous")


def test_without_time_nothing_is_mixed_and_nothing_proven(sample: Callable[..., FleetSpec]) -> None:
    """A limit that leaves no time for any mixed plan yields one without, which says that it proves nothing."""
    found = solver("heterogeneous")(build(sample("large", 128)), time_limit_s=0.0)
    assert found.bound is None
    assert sum(c is not None for c in found.chosen) > 20
    assert not any(c.also for c in found.chosen if c)


@pytest.mark.parametrize("short", [False, True])
def test_listed_mixes_and_counted_replicas_agree(
    fleet: Callable[..., FleetSpec], server: Callable[..., ServerSpec], short: bool
) -> None:
    """Choosing among listed mixes costs what counting replicas does, with room for all and without."""
    load = server().demand
    servers = [
        server(f"s{i}", service_class=("gold", "iron")[i % 2], min_replicas=i % 3, max_replicas=40 - i,
               demand=replace(load, arrival_rps=7.0 + 3 * i)) for i in range(6)
    ]  # fmt: skip
    problem = build(fleet(*servers, capacity={"S": 3, "F": 4} if short else {"S": 20, "F": 30}))
    columns = _Columns.of([c for c in problem.choices if c.candidates])
    listed = columns.by_mixes(problem.capacity, Budget(20.0))
    counted = columns.by_counts(problem.capacity, Budget(20.0))
    assert listed is not None
    assert listed.cost == pytest.approx(counted.cost, rel=2e-4)
    served = listed.amounts[len(columns.candidates) :]
    assert served.sum() == counted.amounts[len(columns.candidates) :].sum()
    assert (served.sum() < len(servers)) == short
