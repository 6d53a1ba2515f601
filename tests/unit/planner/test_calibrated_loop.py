"""The loop's calibrate step: what is learnt is used once it can be relied on, told, kept, and otherwise left alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flyball.adapters.calibration_files import read_calibrations, write_calibrations
from flyball.core.fleet import FleetSpec
from flyball.core.observation import FleetState, ReplicaView, ServerView
from flyball.performance.fit import OperatingPoint, predict
from flyball.performance.queueing import queue_model
from flyball.planner.calibrated_loop import CalibratedLoop, CalibratedMemory, calibrations
from flyball.planner.cycle import turn
from flyball.planner.loop import FleetDecision, FleetLoop, LoopMemory
from flyball.planner.rehearsal import RehearsedLoop
from helpers.toy_fleet import LAW, ToyFleet, fleet_spec

WINDOW_S = 60.0
VARIED = [(4.0, 1200.0, 200.0), (6.0, 900.0, 150.0), (5.0, 1600.0, 240.0), (8.0, 500.0, 120.0), (4.5, 700.0, 300.0)]
TRUTH = (LAW["alpha_s"], LAW["beta_s"], LAW["gamma_s"])


def stated(alpha_s: float) -> FleetSpec:
    """A fleet whose spec says another alpha than its replicas have."""
    spec = fleet_spec()
    return replace(spec, profiles=(replace(spec.profiles[0], alpha_s=alpha_s),))


def states(
    loads: Iterable[tuple[float, float, float]], truth: tuple[float, ...] = TRUTH, start: int = 1
) -> list[FleetState]:
    """Two replicas under loads (requests/s each, tokens in and out) as replicas of the true law show them."""
    found = []
    for k, (rps, n, m) in enumerate(loads, start):
        load = OperatingPoint(
            arrival_rps=rps, input_tokens=n, output_tokens=m, max_batch=256, max_queue=256, ttft_s=1.0, itl_s=1.0
        )
        seen = predict([load], queue_model("v3-engine"), np.array(truth))
        done = round(rps * WINDOW_S)
        replicas = tuple(
            ReplicaView(
                name=name, accelerator="H100", age_s=1e4, running=40.0, arrivals=done, completed=done,
                ttft_s=float(seen.ttft_s[0]), itl_s=float(seen.itl_s[0]),
            )
            for name in ("r0", "r1")
        )  # fmt: skip
        view = ServerView(
            name="chat", arrivals=2 * done, completed=2 * done, input_tokens=n, output_tokens=m, wanted={"H100": 2},
            replicas=replicas,
        )  # fmt: skip
        found.append(FleetState(now_s=WINDOW_S * k, window_s=WINDOW_S, servers={"chat": view}))
    return found


def decided(
    loop: FleetLoop, seen: Iterable[FleetState], memory: LoopMemory | None = None
) -> tuple[FleetDecision, LoopMemory]:
    """The last decision."""
    memory = memory or loop.start()
    for state in seen:
        decision, memory = loop.decide(state, memory)
    return decision, memory


def learning(spec: FleetSpec, file: Path | None = None) -> CalibratedLoop:
    """The plain loop with its calibrate step."""
    return CalibratedLoop(FleetLoop, spec, read_calibrations(file) if file else ())


def capacity_rps(decision: FleetDecision) -> float:
    """What a replica is thought to take."""
    return decision.explanations["chat"].figures["capacity_rps"]


@pytest.mark.parametrize("alpha_s", [0.005, 0.0125])
def test_a_wrong_profile_gives_way_to_what_replicas_show(alpha_s: float) -> None:
    """Stated too fast or too slow, a replica is sized within 3 % of the truth after a few windows, and it is said."""
    seen = states(itertools.islice(itertools.cycle(VARIED), 9))
    wrong, _ = decided(FleetLoop(stated(alpha_s)), seen)
    right, _ = decided(FleetLoop(fleet_spec()), seen)
    learnt, _ = decided(learning(stated(alpha_s)), seen)
    assert capacity_rps(wrong) != pytest.approx(capacity_rps(right), rel=0.1)
    assert capacity_rps(learnt) == pytest.approx(capacity_rps(right), rel=0.03)
    assert "sized with what was learnt of H100 from" in learnt.reasons["chat"][-1]


@pytest.mark.slow
def test_loads_that_do_not_determine_the_law_change_nothing() -> None:
    """One load over and over: the spec's profile stands, with the reason, and counts are those of the plain loop."""
    seen = states([VARIED[0]] * 8)
    plain, _ = decided(FleetLoop(stated(0.005)), seen)
    cautious, memory = decided(learning(stated(0.005)), seen)
    assert cautious.replicas == plain.replicas
    assert capacity_rps(cautious) == capacity_rps(plain)
    assert "sized with the spec's latency profile on H100: loads so far do not tell" in cautious.reasons["chat"][-1]
    assert not calibrations(memory)[0].identified


def test_without_latencies_it_is_the_loop_within() -> None:
    """Where no replica tells its TTFT, every decision equals the plain loop's, reasons included."""
    spec = fleet_spec()
    fleet = ToyFleet(spec=spec, rates={"chat": lambda t: 12.0 if t > 600 else 4.0})
    fleet.put("chat", "H100", 1)
    plain, other = FleetLoop(spec), learning(spec)
    memory, others = plain.start(), other.start()
    for _ in range(80):
        fleet.advance(15.0)
        told, others = turn(fleet, other, None, others)
        expected, memory = turn(fleet, plain, fleet, memory)
        assert told.decision == expected.decision


def test_what_was_learnt_survives_a_restart(tmp_path: Path) -> None:
    """Kept in a calibration file, it sizes the first decision of the next run; of another model nothing is taken."""
    seen = states(itertools.islice(itertools.cycle(VARIED), 9))
    _, memory = decided(learning(stated(0.005)), seen)
    write_calibrations(tmp_path / "c.json", calibrations(memory))
    after, _ = decided(learning(stated(0.005), tmp_path / "c.json"), seen[-1:])
    first, _ = decided(learning(stated(0.005)), seen[-1:])
    right, _ = decided(FleetLoop(fleet_spec()), seen[-1:])
    assert capacity_rps(after) == pytest.approx(capacity_rps(right), rel=0.03)
    assert capacity_rps(first) > 1.1 * capacity_rps(after)
    other = replace(stated(0.005).profiles[0], model="other")
    assert not learning(replace(stated(0.005), profiles=(other,)), tmp_path / "c.json").start().learnt


def test_what_was_learnt_follows_the_spec() -> None:
    """A loop for a changed spec goes on with the same memory: the law is kept, what the spec states anew is not."""
    seen = states(itertools.islice(itertools.cycle(VARIED), 9))
    _, memory = decided(learning(stated(0.005)), seen[:-1])
    halved = replace(stated(0.005), profiles=(replace(stated(0.005).profiles[0], accelerators=2),))
    decision, after = decided(learning(halved), seen[-1:], memory)
    assert isinstance(after, CalibratedMemory)
    used = after.learnt["m", "H100"].used
    assert used is not None
    assert (used.accelerators, used.alpha_s) == (2, pytest.approx(TRUTH[0], rel=0.05))
    assert decision.explanations["chat"].cost_per_h == 2 * sum(decision.replicas["chat"].values())
    other = replace(halved, profiles=(replace(halved.profiles[0], queue_model="v3"),))
    _, after = decided(learning(other), seen[-1:], memory)
    assert [(one.queue_model, one.cycle) for one in calibrations(after)] == [("v3", 1)]  # begun anew


@pytest.mark.slow
def test_a_replica_that_slows_down_is_noticed() -> None:
    """All three parameters grow by a third: within a few windows a replica is thought to take less, and it is said."""
    loop = learning(fleet_spec())
    before, memory = decided(loop, states(itertools.islice(itertools.cycle(VARIED), 9)))
    slower = tuple(4 / 3 * p for p in TRUTH)
    after, _ = decided(loop, states(VARIED, slower, start=10), memory)
    assert capacity_rps(after) < 0.85 * capacity_rps(before)
    assert "1 changes of it noticed" in after.reasons["chat"][-1]


@pytest.mark.slow
def test_a_decision_is_a_function_of_state_and_memory() -> None:
    """Another loop object with the same memory decides the same and learns the same; stale metrics teach nothing."""
    seen = states(itertools.islice(itertools.cycle(VARIED), 9))
    loop = CalibratedLoop(RehearsedLoop, stated(0.005))
    _, memory = decided(loop, seen[:-1])
    one, after = loop.decide(seen[-1], memory)
    two, again = CalibratedLoop(RehearsedLoop, stated(0.005)).decide(seen[-1], memory)
    assert one == two
    assert (calibrations(after)[0].belief.mean == calibrations(again)[0].belief.mean).all()
    _, stale = loop.decide(seen[-1], after)
    assert isinstance(after, CalibratedMemory)
    assert isinstance(stale, CalibratedMemory)
    assert stale.learnt == after.learnt


@pytest.mark.parametrize(
    "change",
    [{"reported": False}, {"phase": "starting"}, {"completed": 60}, {"ttft_s": float("nan")}, {"accelerator": "L4"}],
)
def test_windows_that_say_nothing_of_the_law_are_left_out(change: dict[str, object]) -> None:
    """Silent, starting, overloaded, unmeasured or unknown replicas teach nothing."""
    seen = [
        replace(
            state,
            servers={
                name: replace(view, replicas=tuple(replace(r, **change) for r in view.replicas))  # type: ignore[arg-type]
                for name, view in state.servers.items()
            },
        )
        for state in states(VARIED)
    ]
    _, memory = decided(learning(fleet_spec()), seen)
    assert not calibrations(memory)
