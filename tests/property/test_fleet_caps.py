"""Caps of a fleet hold at every instant, whatever loads, faults and plans come."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball.planner.cycle import turn
from flyball.planner.loop import FleetLoop, LoopSettings, controller
from helpers.toy_fleet import ToyFleet, fleet_spec


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    cards=st.tuples(st.integers(1, 6), st.integers(0, 4)),
    budget=st.none() | st.floats(2.0, 12.0),
    name=st.sampled_from(["slo", "hpa", "kpa", "slo+saturation-v2"]),
)
def test_cards_and_budget_are_never_exceeded(
    seed: int, cards: tuple[int, int], budget: float | None, name: str
) -> None:
    """Replicas that run, start and drain never take more cards or money than allowed, through faults and moves."""
    rng = random.Random(seed)
    spec = fleet_spec(
        {"chat": 1, "code": 5, "batch": 9},
        {"A": (1.0, 1.0), "B": (1.5, 0.9)},
        capacity={"A": cards[0], "B": cards[1]},
    )
    levels = {server.name: [rng.choice([0.0, 1.0, 6.0, 20.0]) for _ in range(8)] for server in spec.servers}
    fleet = ToyFleet(
        spec=spec,
        rates={n: lambda t, own=own: own[int(t // 150) % 8] * rng.gauss(1.0, 0.1) for n, own in levels.items()},
        drain_s=rng.choice([0.0, 40.0, 200.0]),
        start_up_s=rng.choice([30.0, 120.0]),
    )
    loop: FleetLoop = controller(name, spec, LoopSettings(budget_per_h=budget, retention_s=60.0))
    period_s = max(loop.period_s, 15.0)
    memory = loop.start()
    for _ in range(60):
        fleet.advance(period_s)
        fleet.blind = rng.random() < 0.05
        fleet.refusing = rng.random() < 0.1
        fleet.silent = rng.choice([0.0, 0.0, 0.0, 0.5])
        for own in fleet.replicas.values():  # some die
            for r in [r for r in own if rng.random() < 0.01]:
                own.remove(r)
        _, memory = turn(fleet, loop, fleet, memory, window_s=period_s)
    assert all(fleet.most_cards.get(n, 0) <= most for n, most in zip("AB", cards, strict=True))
    assert budget is None or fleet.most_cost_per_h <= budget + 1e-9
