"""Beside a plan: variants, the trade-off of cost and attainment, and the fewest accelerators for a trace."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from flyball.core.errors import InvalidInput
from flyball.core.fleet import FleetSpec, PowerCurve, ServerSpec
from flyball.core.workload import RequestSpec
from flyball.planner.pareto import pareto
from flyball.planner.plan import plan
from flyball.planner.problem import build
from flyball.planner.trace_sizing import size_for_trace
from flyball.planner.whatif import moves, variant

Fleets = Callable[..., FleetSpec]
Servers = Callable[..., ServerSpec]


def test_a_variant_changes_what_it_names_and_nothing_else(fleet: Fleets, server: Servers) -> None:
    """Load, targets, prices, capacity and budget change by factor or value, for all or for the one named."""
    spec = fleet(server("a"), server("b"), capacity={"S": 10, "F": 8})
    changed = variant(spec, "load:a=2,slo:gold=0.5,cost=3,capacity:S=4,budget=9,power=100")
    assert [s.demand.arrival_rps for s in changed.servers] == [40.0, 20.0]
    assert changed.service_classes[0].targets["m"].ttft_s == pytest.approx(0.25)
    assert changed.service_classes[1] == spec.service_classes[1]
    assert [a.cost_per_h for a in changed.accelerators] == [3.0, 15.0]
    assert (changed.capacity, changed.budget_per_h, changed.power_limit_w) == ({"S": 4, "F": 8}, 9.0, 100.0)
    assert variant(spec, "unlimited").unlimited


@pytest.mark.parametrize("text", ["load", "load=-1", "speed=2", "load:nobody=2", "slo=0", "cost=nan", "="])
def test_a_variant_that_cannot_be_read_is_told(fleet: Fleets, server: Servers, text: str) -> None:
    """What is not a change, or names what is not there, says what could be written."""
    with pytest.raises(InvalidInput, match=r"write|use one of|give"):
        variant(fleet(server()), text)


def test_moves_name_who_runs_elsewhere(fleet: Fleets, server: Servers) -> None:
    """More load shows as more replicas of the server that has it; without capacity it is not served."""
    spec = fleet(server("a"), server("b"), capacity={"S": 30, "F": 0})
    before = plan(spec)
    told = moves(before, plan(variant(spec, "load:a=1.5")))
    assert len(told) == 1
    assert told[0].startswith("a: ")
    assert "slow -> " in told[0]
    assert "not served" in moves(before, plan(variant(spec, "capacity:S=0")))[0]


def test_more_money_never_attains_less(fleet: Fleets, server: Servers) -> None:
    """Along the trade-off attainment rises from nothing to everything, within budget and bound; the end is a plan."""
    spec = fleet(server("a"), server("b"), capacity={"S": 30, "F": 20})
    found = pareto(build(spec), points=7, time_limit_s=20)
    assert [found[0].attainment, found[-1].attainment] == pytest.approx([0, 1], abs=2e-3)
    for p, q in itertools.pairwise(found):
        assert p.attainment <= q.attainment + 1e-3
        assert q.cost_per_h <= q.budget_per_h + 1e-6
        assert q.attainment <= q.bound + 1e-9
    assert found[-1].cost_per_h <= plan(spec, solver="heterogeneous").cost_per_h + 1e-6
    with pytest.raises(InvalidInput, match="there is no trade-off"):
        pareto(build(fleet()), points=3, time_limit_s=1)


def requests(rates: list[float], window_s: float) -> list[RequestSpec]:
    """Evenly spaced requests at a rate for each window."""
    return [
        RequestSpec(arrival_s=w * window_s + i / rate, input_tokens=256, output_tokens=128)
        for w, rate in enumerate(rates)
        for i in range(int(rate * window_s))
    ]


def test_a_trace_needs_what_its_busiest_window_needs_and_no_less(fleet: Fleets, server: Servers) -> None:
    """A fixed fleet is that of the peak, one that follows the load each window's; no option is below the bound."""
    one, window_s, rates = server(), 30.0, [4.0, 20.0, 10.0]
    found = size_for_trace(fleet(one), one, requests(rates, window_s), window_s=window_s)
    assert found.rates_rps == pytest.approx(rates)
    for option in found.options:
        each = next(a.units for a in fleet(one).accelerators if a.name == option.accelerator)
        alone = [
            plan(fleet(replace(one, demand=replace(one.demand, arrival_rps=rate), keep_accelerator=True,
                               current=replace(one.current, accelerator=option.accelerator)))).allocations["s"].replicas
            for rate in rates
        ]  # fmt: skip
        assert option.replicas_by_window == tuple(alone)
        assert option.cards == max(alone) * each >= found.least_cards
        assert option.card_hours == pytest.approx(sum(alone) * each * window_s / 3600)
        assert option.card_hours >= found.bound_card_hours
    assert found.least_cards == math.ceil(found.bound_cards)
    with pytest.raises(InvalidInput, match="the trace has no requests"):
        size_for_trace(fleet(one), one, [], window_s=1.0)


def test_a_quota_and_the_cards_there_are_both_bind(fleet: Fleets, server: Servers) -> None:
    """With few cards in a quota a server turns to what it does not count, and who is outside it takes the rest."""
    need = plan(fleet(server("a"))).allocations["a"]
    free = fleet(server("a"), server("b"), capacity={"S": 2 * need.replicas, "F": 100})
    assert {a.accelerator for a in plan(free).allocations.values()} == {"slow"}
    quotas = {"team": {"S": need.replicas - 1}}
    limited = replace(free, servers=(server("a", quota="team"), server("b")), quotas=quotas)
    found = plan(limited)
    assert found.allocations["a"].accelerator == "fast"
    assert found.allocations["b"].accelerator == "slow"
    short = plan(replace(limited, quotas={"team": {"S": 0, "F": 0}}))
    assert "of quota team" in short.unserved["a"]
    with pytest.raises(InvalidInput, match="counts against the quota 'gone'"):
        fleet(server("a", quota="gone"))


def test_a_budget_and_power_are_kept(fleet: Fleets, server: Servers) -> None:
    """What would cost or draw too much is left out by priority, and the reason names the limit."""
    spec = fleet(server("gold"), server("iron", service_class="iron"))
    curve = PowerCurve(idle_w=50, full_w=100)
    powered = replace(spec, accelerators=tuple(replace(a, power=curve) for a in spec.accelerators))
    least_w = min(c.allocation.power_w for c in build(powered).choices[0].candidates)
    thrifty = replace(spec, budget_per_h=plan(spec).cost_per_h * 0.6)
    for limited, name in (
        (thrifty, "cost/h of the budget"),
        (replace(powered, power_limit_w=1.5 * least_w), "W of power"),
    ):
        found = plan(limited)
        assert set(found.allocations) == {"gold"}
        assert name in found.unserved["iron"]


def test_most_replicas_starting_and_energy_count(fleet: Fleets, server: Servers) -> None:
    """Too many replicas on the cheap accelerator force the fast one; a dear start keeps a server where it runs."""
    cheap = plan(fleet(server())).allocations["s"]
    assert cheap.accelerator == "slow"
    assert plan(fleet(server(max_replicas=cheap.replicas - 1))).allocations["s"].accelerator == "fast"
    told = plan(fleet(server(max_replicas=1, demand=replace(server().demand, arrival_rps=500.0)))).unserved["s"]
    assert "it may have 1 replicas and needs" in told
    fast = plan(fleet(server(keep_accelerator=True, current=replace(server().current, accelerator="fast"))))
    running = fast.allocations["s"]
    settled = server(current=running)
    spec = fleet(settled)
    assert plan(spec).allocations["s"].accelerator == "slow"
    dear = replace(spec, accelerators=tuple(replace(a, startup_cost=50.0) for a in spec.accelerators))
    assert plan(dear).allocations["s"].accelerator == "fast"
    hungry = PowerCurve(idle_w=3000, full_w=5000)
    powered = replace(
        fleet(server()),
        accelerators=tuple(replace(a, power=hungry if a.name == "slow" else None) for a in spec.accelerators),
        energy_price_per_kwh=2.0,
    )
    assert plan(powered).allocations["s"].accelerator == "fast"


def test_the_power_curve_bends_where_it_is_told() -> None:
    """Straight from idle to the middle point and on to full load, as llm-inferno's accelerators have it."""
    curve = PowerCurve(idle_w=150, full_w=400, middle_w=320, middle_at=0.6)
    assert [curve.at(u) for u in (0.0, 0.3, 0.6, 0.8, 1.0)] == pytest.approx([150, 235, 320, 360, 400])
    assert np.all(np.diff([curve.at(u) for u in np.linspace(0, 1, 11)]) > 0)
