"""The fleet's loop on a small fleet in virtual time: steady, blind, capped, idle, and explained."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from flyball.core.errors import InvalidInput
from flyball.core.fleet import LatencyProfile
from flyball.planner.analyzers import NAMES
from flyball.planner.cycle import Turn, turn
from flyball.planner.loop import FleetLoop, LoopMemory, LoopSettings, controller
from helpers.toy_fleet import ToyFleet, fleet_spec, with_server


def run(
    fleet: ToyFleet,
    loop: FleetLoop,
    seconds: float,
    memory: LoopMemory | None = None,
    each: Callable[[Turn], None] | None = None,
) -> LoopMemory:
    """Turn after turn, a period apart."""
    memory = memory or loop.start()
    for _ in range(int(seconds / loop.period_s)):
        fleet.advance(loop.period_s)
        told, memory = turn(fleet, loop, fleet, memory)
        if each:
            each(told)
    return memory


def counts_over(fleet: ToyFleet, loop: FleetLoop, seconds: float, memory: LoopMemory | None = None) -> list[int]:
    """Replicas of the server `chat` after every turn."""
    seen: list[int] = []
    run(fleet, loop, seconds, memory, lambda _: seen.append(fleet.count("chat")))
    return seen


def direction_changes(counts: list[int]) -> int:
    """How often a move was followed by one the other way."""
    moves = [b - a for a, b in itertools.pairwise(counts) if a != b]
    return sum((a > 0) != (b > 0) for a, b in itertools.pairwise(moves))


@pytest.mark.parametrize("level", [4.0, 5.2, 8.0, 10.4, 15.6, 40.0])
def test_noise_at_constant_load_turns_the_loop_round_at_most_once_in_ten_cycles(level: float) -> None:
    """At constant load with 5 % noise: at most one change of direction in any 10 cycles (Must show 2)."""
    rng = random.Random(7)
    spec = fleet_spec()
    fleet = ToyFleet(spec=spec, rates={"chat": lambda _: level * rng.gauss(1.0, 0.05)})
    fleet.put("chat", "H100", 1)
    counts = counts_over(fleet, FleetLoop(spec), 3 * 3600)
    worst = max(direction_changes(counts[i : i + 11]) for i in range(len(counts) - 10))
    assert worst <= 1
    assert direction_changes(counts[40:]) <= 2  # and over three hours next to never


def test_load_is_followed_up_and_down() -> None:
    """When load triples replicas come, when it falls they go, and the backlog is worked off."""
    spec = fleet_spec()
    fleet = ToyFleet(spec=spec, rates={"chat": lambda t: 15.0 if 1800 <= t < 3600 else 3.0})
    fleet.put("chat", "H100", 1)
    counts = counts_over(fleet, FleetLoop(spec), 7200)
    assert counts[100] == 1
    assert max(counts[130:240]) >= 3
    assert counts[-1] == 1
    assert fleet.backlog["chat"] < 1


def test_demand_is_what_arrives_and_not_what_is_served() -> None:
    """Without a gateway's counter, an overloaded replica's demand is found from what piles up, within 5 %."""
    spec = fleet_spec()
    fleet = ToyFleet(spec=spec, rates={"chat": lambda _: 20.0}, counted=False, serves_rps=5.0)
    fleet.put("chat", "H100", 1)
    loop = FleetLoop(spec)
    memory = run(fleet, loop, 30)
    fleet.advance(loop.period_s)
    told, _ = turn(fleet, loop, None, memory)
    assert told.decision is not None
    figures = told.decision.explanations["chat"].figures
    assert figures["demand_rps"] - figures["backlog_rps"] >= 0.95 * 20.0


def test_a_decision_is_a_function_of_state_and_memory() -> None:
    """The same state and memory give the same decision and the same next memory."""
    spec = fleet_spec()
    fleet = ToyFleet(spec=spec, rates={"chat": lambda _: 12.0})
    fleet.put("chat", "H100", 1)
    loop = FleetLoop(spec)
    memory = run(fleet, loop, 300)
    state = fleet.observe(15.0)
    state = replace(state, now_s=state.now_s + 15)
    assert loop.decide(state, memory) == FleetLoop(spec).decide(state, memory)


def test_metrics_down_holds_the_plan_and_recovers() -> None:
    """With nothing to read for twenty minutes the count stays, and afterwards the load is followed again."""
    spec = fleet_spec()
    fleet = ToyFleet(spec=spec, rates={"chat": lambda t: 4.0 if t < 2400 else 16.0})
    fleet.put("chat", "H100", 1)
    loop = FleetLoop(spec)
    memory = run(fleet, loop, 1800)
    before = fleet.count("chat")
    fleet.blind = True
    told: list[Turn] = []
    memory = run(fleet, loop, 1200, memory, told.append)
    assert fleet.count("chat") == before
    assert all("does not answer" in one.blind for one in told)
    fleet.blind = False
    run(fleet, loop, 900, memory)
    assert fleet.count("chat") >= 3


@pytest.mark.parametrize("counted", [True, False])
def test_silent_replicas_take_nothing_away(counted: bool) -> None:
    """While half the replicas report nothing none is taken away, though the load has gone; then the loop recovers."""
    spec = fleet_spec()
    fleet = ToyFleet(spec=spec, rates={"chat": lambda t: 15.0 if t < 1200 else 1.0}, counted=counted)
    fleet.put("chat", "H100", 4)
    loop = FleetLoop(spec)
    memory = run(fleet, loop, 1200)
    before = fleet.count("chat")
    fleet.silent = 0.5
    told: list[Turn] = []
    memory = run(fleet, loop, 1800, memory, told.append)
    assert fleet.count("chat") == before >= 3
    assert told[-1].decision is not None
    assert "silent" in " ".join(told[-1].decision.reasons["chat"])
    fleet.silent = 0.0
    run(fleet, loop, 2400, memory)
    assert fleet.count("chat") == 1


@pytest.mark.parametrize("jump_s", [-7200.0, 86_400.0])
def test_a_clock_that_jumps_changes_nothing(jump_s: float) -> None:
    """A jump of the metrics' clock, back or ahead, is said and held; it neither ages idleness nor moves replicas."""
    spec = fleet_spec()
    fleet = ToyFleet(spec=spec, rates={"chat": lambda _: 0.0 if fleet.now_s > 1e9 else 8.0})
    fleet.put("chat", "H100", 2)
    loop = FleetLoop(spec)
    memory = run(fleet, loop, 900)
    before = fleet.count("chat")
    fleet.now_s += jump_s
    for own in fleet.replicas.values():
        for r in own:
            r.asked_s += jump_s
    fleet.advance(loop.period_s)
    told, memory = turn(fleet, loop, fleet, memory)
    assert told.decision is not None
    assert told.decision.explanations["chat"].held
    run(fleet, loop, 900, memory)
    assert fleet.count("chat") == before


def test_a_refused_plan_is_asked_for_again_and_nothing_is_believed_meanwhile() -> None:
    """A plan that the cluster refuses is repeated until it is carried out, and the refusal is told."""
    spec = fleet_spec()
    fleet = ToyFleet(spec=spec, rates={"chat": lambda _: 15.0})
    fleet.put("chat", "H100", 1)
    loop = FleetLoop(spec)
    fleet.refusing = True
    told: list[Turn] = []
    memory = run(fleet, loop, 300, None, told.append)
    assert fleet.count("chat") == 1
    assert all("quota" in one.refused["chat"] for one in told)
    fleet.refusing = False
    run(fleet, loop, 120, memory)
    assert fleet.count("chat") >= 3


@pytest.mark.parametrize("name", NAMES)
def test_no_rule_goes_to_zero_while_requests_come(name: str) -> None:
    """Whatever the analyzer, a server with load keeps a replica, through faults too."""
    spec = fleet_spec()
    fleet = ToyFleet(spec=spec, rates={"chat": lambda _: 0.4})
    fleet.put("chat", "H100", 2)
    loop = controller(name, spec)
    counts = counts_over(fleet, loop, 900)
    fleet.silent = 1.0
    counts += counts_over(fleet, loop, 300)
    assert min(counts) >= 1


def test_it_sleeps_after_the_retention_and_wakes_only_the_cheapest() -> None:
    """Without a request for the retention it goes to zero; the first request wakes one replica of the cheapest kind."""
    spec = fleet_spec(accelerators={"dear": (5.0, 0.8), "cheap": (1.0, 1.0)})
    fleet = ToyFleet(spec=spec, rates={"chat": lambda t: 0.3 if t < 600 or t > 3600 else 0.0})
    fleet.put("chat", "cheap", 1)
    loop = FleetLoop(spec, LoopSettings(retention_s=600))
    memory = run(fleet, loop, 1500)
    assert fleet.count("chat") == 0 or fleet.now_s < 1800
    memory = run(fleet, loop, 1500, memory)
    assert fleet.count("chat") == 0
    run(fleet, loop, 660, memory)
    assert [r.accelerator for r in fleet.replicas["chat"] if r.draining_s is None] == ["cheap"]


def test_min_replicas_and_a_warm_buffer_are_kept() -> None:
    """An idle server keeps its least, a busy one its spare replicas, and none goes over its most."""
    spec = with_server(fleet_spec(), min_replicas=2)
    fleet = ToyFleet(spec=spec, rates={"chat": lambda t: 9.0 if t < 1800 else 0.0})
    fleet.put("chat", "H100", 1)
    loop = FleetLoop(spec, LoopSettings(warm_buffer=1, max_replicas=3))
    memory = run(fleet, loop, 900)
    assert fleet.count("chat") == 3
    run(fleet, loop, 4800, memory)
    assert fleet.count("chat") in (2, 3)


def test_an_infeasible_server_stops_nobody() -> None:
    """A server that no accelerator can serve keeps what it has, with the reason; the other is scaled as ever."""
    spec = fleet_spec({"chat": 1, "hard": 1})
    impossible = replace(
        spec.service_classes[1], targets={"m": replace(spec.service_classes[1].targets["m"], itl_s=1e-4)}
    )
    spec = replace(spec, service_classes=(spec.service_classes[0], impossible))
    fleet = ToyFleet(spec=spec, rates={"chat": lambda _: 15.0, "hard": lambda _: 2.0})
    fleet.put("chat", "H100", 1)
    fleet.put("hard", "H100", 1)
    told: list[Turn] = []
    run(fleet, FleetLoop(spec), 300, None, told.append)
    assert fleet.count("chat") >= 3
    assert fleet.count("hard") == 1
    assert told[-1].decision is not None
    assert "no accelerator keeps" in told[-1].decision.reasons["hard"][0]


def test_every_decision_names_its_binding_constraint_and_priced_alternatives() -> None:
    """A decision says what the count follows from, what it costs, and what else there was, with cost and why not."""
    spec = fleet_spec(accelerators={"dear": (5.0, 0.8), "cheap": (1.0, 1.0)})
    fleet = ToyFleet(spec=spec, rates={"chat": lambda _: 12.0})
    fleet.put("chat", "cheap", 3)
    told: list[Turn] = []
    run(fleet, FleetLoop(spec), 600, None, told.append)
    assert told[-1].decision is not None
    explained = told[-1].decision.explanations["chat"]
    assert explained.binding == "ITL"
    assert explained.cost_per_h == 3.0
    ways = {tuple(a.replicas): a for a in explained.alternatives}
    assert ways["dear",].cost_per_h >= 5.0
    assert ways["dear",].why_not
    assert all(math.isfinite(a.cost_per_h) for a in explained.alternatives)


def test_priority_decides_who_gets_scarce_cards() -> None:
    """Where cards are short the first class is served and the other gets what is left, and is told so."""
    spec = fleet_spec({"chat": 1, "batch": 9}, capacity={"H100": 4})
    fleet = ToyFleet(spec=spec, rates={"chat": lambda _: 14.0, "batch": lambda _: 14.0})
    fleet.put("chat", "H100", 1)
    fleet.put("batch", "H100", 1)
    told: list[Turn] = []
    run(fleet, FleetLoop(spec), 1800, None, told.append)
    assert (fleet.count("chat"), fleet.count("batch")) == (3, 1)
    assert fleet.most_cards["H100"] <= 4
    assert told[-1].decision is not None
    assert "capacity is short" in " ".join(told[-1].decision.reasons["batch"])


def test_a_move_to_another_accelerator_never_leaves_the_server_without_replicas() -> None:
    """When another accelerator becomes much cheaper, the old replicas go only once the new ones are asked for."""
    spec = fleet_spec(accelerators={"old": (5.0, 1.0), "new": (1.0, 1.0)})
    fleet = ToyFleet(spec=spec, rates={"chat": lambda _: 8.0})
    fleet.put("chat", "old", 2)
    loop = FleetLoop(spec)
    memory = loop.start()
    for _ in range(160):
        fleet.advance(loop.period_s)
        _, memory = turn(fleet, loop, fleet, memory)
        assert sum(fleet.phase(r) == "ready" for r in fleet.replicas["chat"]) >= 2
    assert {r.accelerator for r in fleet.replicas["chat"]} == {"new"}


def test_replicas_that_never_come_up_are_not_waited_for() -> None:
    """Where replicas of one kind stay starting, another kind is asked for."""
    spec = fleet_spec(accelerators={"broken": (1.0, 1.0), "sound": (2.0, 1.0)})
    fleet = ToyFleet(spec=spec, rates={"chat": lambda _: 4.0}, never_ready={"broken"})
    fleet.put("chat", "sound", 1)
    fleet.wanted["chat"], fleet.replicas["chat"] = {}, []
    run(fleet, FleetLoop(spec, LoopSettings(start_up_s=60)), 1200)
    assert any(r.accelerator == "sound" for r in fleet.replicas["chat"])


def test_settings_that_cannot_be_are_refused() -> None:
    """Impossible settings are named with their value and the fix."""
    with pytest.raises(InvalidInput, match="period_s is 0"):
        LoopSettings(period_s=0)
    with pytest.raises(InvalidInput, match="unknown analyzer 'nobody'"):
        controller("nobody", fleet_spec())
    with pytest.raises(InvalidInput, match="unknown forecast"):
        FleetLoop(fleet_spec(), LoopSettings(forecast="crystal"))


def test_a_profile_that_says_nothing_is_not_used() -> None:
    """A server whose model has no known profile is held with the reason."""
    spec = replace(
        fleet_spec(), profiles=(LatencyProfile(model="m", accelerator="H100", alpha_s=0, beta_s=0, gamma_s=0),)
    )
    fleet = ToyFleet(spec=spec, rates={"chat": lambda _: 4.0})
    fleet.put("chat", "H100", 2)
    told: list[Turn] = []
    run(fleet, FleetLoop(spec), 60, None, told.append)
    assert told[-1].decision is not None
    assert "no latency profile" in told[-1].decision.reasons["chat"][0]
    assert fleet.count("chat") == 2
