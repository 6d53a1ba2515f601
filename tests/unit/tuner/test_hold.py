"""The holder: a live service kept in tune step by step, and every way in which it does nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from flyball.core.errors import EngineFailed, InvalidInput
from flyball.core.knobs import Configuration
from flyball.core.slo import SloBound
from flyball.tuner.audit import MemoryAudit
from flyball.tuner.enough import Enough, Lately, LeftAlone
from flyball.tuner.guard import Guard
from flyball.tuner.guard_limits import PRESETS
from flyball.tuner.guard_replay import first_difference, replay
from flyball.tuner.hold import Holder, Replicas
from flyball.tuner.hold_reading import Histogram, Reading, judge
from flyball.tuner.objective import Objective, Score
from flyball.tuner.online.tuner import OnlineTuner
from helpers.held_service import ROUTED, HeldService

RESTLESS = Enough(explore_every=1)


def held(
    service: HeldService, preset: str = "aggressive", enough: Enough = RESTLESS, **options: Any
) -> tuple[Holder, MemoryAudit]:
    """A holder of a service, and its audit; it never rests unless told."""
    audit = MemoryAudit()
    tuner = OnlineTuner(ROUTED, direction="minimize", constraints=("quality", "latency"), start=dict(service.values))
    guard = Guard(ROUTED, dict(service.values), apply=service.apply, limits=PRESETS[preset], audit=audit,  # type: ignore[index]
                  clock=service.clock)  # fmt: skip
    return Holder(tuner=tuner, guard=guard, judge=service.judge, generation=service.generation, clock=service.clock,
                  settle_s=0.0, enough=enough, **options), audit  # fmt: skip


def test_router_weights_and_draft_length_are_held() -> None:
    """Latency falls to a third, the quality floor holds in nearly all windows, and the audit decides the same again."""
    service = HeldService(noise=0.02)
    holder, audit = held(service)
    before = service.judge(service.read()).value
    broken = []
    for _ in range(250):
        broken.append(service.judge(Reading(start_s=0, end_s=1, generation="", finished=1, failed=0, output_tokens=1,
                                            input_tokens=1)).margins["quality"] > 0)  # fmt: skip
        holder.step(service.read())
    after = service.judge(service.read())
    assert after.value < before / 2.5
    assert after.margins["quality"] <= 0
    assert int(service.values["draft_tokens"]) >= 1
    assert float(service.values["small_share"]) > 0.4
    assert sum(broken[-100:]) <= 10
    assert first_difference(audit.events, replay(audit.events)) is None


def test_windows_that_belong_to_no_configuration_are_ignored() -> None:
    """Across a change, under another generation, within the settle time: nothing is learnt from them."""
    service = HeldService()
    holder, _ = held(service)
    holder.settle_s = 5.0
    reading = service.read()
    idle = replace(reading, finished=0.0)
    for unusable in (replace(reading, generation=""), replace(reading, generation="99"), idle):
        assert holder.step(unusable).action == "ignore"
    assert holder.tuner.told == 0
    first = [holder.step(service.read()) for _ in range(2)][-1]
    assert first.action == "apply"
    early = service.read(1.0)
    assert holder.step(early).action == "ignore"


def test_shadow_mode_changes_nothing() -> None:
    """It proposes, says what and why, and applies nothing."""
    service = HeldService()
    holder, audit = held(service, mode="shadow")
    decisions = [holder.step(service.read()) for _ in range(20)]
    assert service.version == 1
    assert any(d.action == "shadow" and d.wish for d in decisions)
    assert {e.kind for e in audit.events} == {"start", "window", "decision"}


def test_a_bad_move_is_undone_within_one_window() -> None:
    """A breach under a change puts the last known good back at once."""
    service = HeldService()
    holder, _ = held(service)
    while holder.step(service.read()).action != "apply":
        pass
    service.values |= {"small_share": 0.9}  # behind the guard's back: quality breaks
    assert holder.step(service.read()).action == "rollback"
    assert holder.guard.values == holder.guard.good


def test_traffic_that_returns_is_answered_with_what_was_best() -> None:
    """Back under the first traffic, the values found under it are in force again after a few windows."""
    service = HeldService(rate_rps=4.0)
    holder, _ = held(service)
    for rate, windows in ((4.0, 80), (11.0, 80), (4.0, 12)):
        service.rate_rps = rate
        for _ in range(windows):
            holder.step(service.read())
    assert holder.shifts >= 2
    assert holder.recalled >= 1


@pytest.mark.parametrize(("command", "run"), [("pause", "paused"), ("stop", "stopped"), ("kill", "killed")])
def test_commands_stop_changes(command: str, run: str) -> None:
    """After pause, stop and kill nothing changes; kill restores the start; resume goes on after a pause."""
    service = HeldService()
    start = dict(service.values)
    holder, _ = held(service)
    while service.values == start:
        holder.step(service.read())
    holder.command(command)
    assert holder.run == run
    assert (dict(service.values) == start) == (command == "kill")
    version = service.version
    assert {holder.step(service.read()).action for _ in range(10)} <= {"hold", "rollback", "ignore"}
    assert service.version <= version + 1
    holder.command("resume")
    assert holder.run == "running"
    with pytest.raises(InvalidInput, match="explode"):
        holder.command("explode")


def test_a_person_decides_where_approval_is_asked() -> None:
    """Unanswered, nothing changes; refused, another wish comes; approved, it is applied."""
    service = HeldService()
    answers: list[bool | None] = [None, None, False, True]
    asked: list[Configuration] = []

    def approve(values: Configuration, why: str) -> bool | None:
        assert why
        asked.append(values)
        return answers.pop(0) if answers else True

    holder, _ = held(service, approve=approve)
    actions = []
    while "apply" not in actions:
        actions.append(holder.step(service.read()).action)
    assert actions.count("ask") == 3
    assert service.version == 2


def test_every_decision_can_be_explained() -> None:
    """By its number: what was seen, wished and done, and why."""
    service = HeldService()
    holder, _ = held(service)
    for _ in range(10):
        holder.step(service.read())
    told = holder.explain(5)
    assert told["number"] == 5
    assert told["why"]
    assert told["score"]["margins"].keys() == {"quality", "latency"}
    assert holder.status()["choice"]["reason"]
    with pytest.raises(InvalidInput, match="decision 99"):
        holder.explain(99)


def test_a_service_that_fails_keeps_its_values() -> None:
    """A change that the service did not take is refused by name, and the loop goes on."""
    service = HeldService()
    holder, _ = held(service)
    service.fails = True
    decisions = [holder.step(service.read()) for _ in range(8)]
    assert any(d.action == "refuse" and d.why.startswith("engine") for d in decisions)
    assert holder.guard.values == ROUTED.defaults()


def test_replicas_change_one_after_the_other() -> None:
    """The canary alone, or all in turn; where one fails, those before it get their values back."""
    log: list[tuple[int, Configuration]] = []
    broken = -1

    def replica(i: int) -> Any:
        def apply(values: Configuration) -> None:
            if i == broken:
                raise EngineFailed("did not come back")
            log.append((i, dict(values)))

        return apply

    replicas = Replicas([replica(i) for i in range(3)], {"x": 1})
    replicas.set({"x": 2}, canary=True)
    replicas.set({"x": 2})
    assert log == [(0, {"x": 2}), (1, {"x": 2}), (2, {"x": 2})]
    broken = 2
    with pytest.raises(EngineFailed):
        replicas.set({"x": 3})
    assert log[3:] == [(0, {"x": 3}), (1, {"x": 3}), (1, {"x": 2}), (0, {"x": 2})]
    assert replicas.values == [{"x": 2}] * 3


def test_a_histogram_tells_percentiles_and_shares() -> None:
    """Interpolated within a bucket; nothing seen is not a number."""
    seen = Histogram((0.1, 0.2, math.inf), (50.0, 40.0, 10.0), 12.0)
    assert seen.percentile(50) == pytest.approx(0.1)
    assert seen.percentile(70) == pytest.approx(0.15)
    assert seen.percentile(95) == math.inf
    assert seen.share_within(0.15) == pytest.approx(0.7)
    assert seen.mean == pytest.approx(0.12)
    assert math.isnan(Histogram((0.1,), (0.0,), 0.0).percentile(50))


def test_a_reading_is_judged_by_its_promises() -> None:
    """Attainment and margins come from the histogram; a window without an answer has failed."""
    bound = SloBound.parse("p95_ttft<150ms")
    reading = Reading(start_s=0, end_s=10, generation="1", finished=100, failed=0, input_tokens=1, output_tokens=1,
                      latencies={"ttft": Histogram((0.1, 0.2), (90.0, 10.0), 9.0)})  # fmt: skip
    score = judge(reading, Objective.parse("goodput"), [bound])
    assert score.value == pytest.approx(10 * 0.95)
    assert score.margins[str(bound)] == pytest.approx(0.0)
    assert judge(replace(reading, finished=0), Objective.parse("goodput"), [bound]).failure


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("explore_every", "most"), [(0, 0), (25, 8)])
def test_a_service_that_keeps_its_promises_is_left_alone(seed: int, explore_every: int, most: int) -> None:
    """At constant load with room: nothing changes in 100 windows, or four small trials there and back."""
    service = HeldService(noise=0.03, seed=seed)
    holder, audit = held(service, "balanced", Enough(explore_every=explore_every))
    decisions = [holder.step(service.read()) for _ in range(100)]
    assert service.version - 1 <= most
    assert decisions[5].action == "rest"
    assert "every promise kept with at least 10% to spare over 3 windows" in decisions[5].why
    assert holder.counts["violations"] == 0
    assert first_difference(audit.events, replay(audit.events)) is None
    if explore_every:
        tried = [e.data for e in audit.events if e.kind == "apply"]
        assert tried
        assert all(abs(c["new"].get("small_share", 0) - c["old"].get("small_share", 0)) <= 0.05 + 1e-9 for c in tried)


def test_a_promise_in_danger_ends_the_rest() -> None:
    """More traffic takes the room away: it explores, says which promise, and rests again where there is room."""
    service = HeldService(rate_rps=3.0)
    holder, _ = held(service, "aggressive", Enough(explore_every=0))
    actions = [holder.step(service.read()).action for _ in range(10)]
    assert set(actions) <= {"wait", "rest"}
    service.rate_rps = 9.0
    decisions = [holder.step(service.read()) for _ in range(40)]
    assert any(d.action == "apply" and "latency" in d.why for d in decisions)
    assert decisions[-1].action == "rest"
    assert service.judge(service.read()).margins["latency"] < -0.1


def test_traffic_that_returns_moves_to_what_was_best_under_it() -> None:
    """The first decision under a known pattern is toward its best, and says so; nothing is explored on the way."""
    service = HeldService(rate_rps=4.0)
    holder, _ = held(service, enough=Enough(explore_every=5))
    for rate, windows in ((4.0, 80), (11.0, 80)):
        service.rate_rps = rate
        for _ in range(windows):
            holder.step(service.read())
    service.rate_rps = 4.0
    after = [holder.step(service.read()) for _ in range(8)]
    first = next(d for d in after if d.why.startswith("the traffic has changed"))
    assert "what was best under this traffic before" in first.why


def test_a_direction_that_did_worse_is_left_for_a_while() -> None:
    """The same knob is not moved on in it until the windows are over; the other way, and other knobs, are free."""
    left = LeftAlone(5)
    left.leave({"x": 2.0, "y": 1}, {"x": 3.0, "y": 1}, 10)
    assert left.without({"x": 2.0, "y": 1}, {"x": 2.5, "y": 2}, 14) == {"x": 2.0, "y": 2}
    assert left.without({"x": 2.0, "y": 1}, {"x": 1.5, "y": 2}, 14) == {"x": 1.5, "y": 2}
    assert left.without({"x": 2.0, "y": 1}, {"x": 2.5, "y": 2}, 15) == {"x": 2.5, "y": 2}
    left.leave({"x": 2.0}, {"x": 3.0}, 20)
    left.clear()
    assert left.without({"x": 2.0}, {"x": 3.0}, 20) == {"x": 3.0}


def test_one_noisy_window_ends_no_rest_and_a_breach_does() -> None:
    """The mean margin over the last windows decides; a window that failed is danger at once."""
    lately = Lately(Enough())
    for margin in (-0.4, -0.4, -0.05):
        lately.see(Score(value=1.0, margins={"p95_ttft<1s": margin}))
    assert lately.full
    assert lately.danger() is None
    lately.see(Score(value=1.0, margins={"p95_ttft<1s": 1.0}))
    assert lately.danger() == "p95_ttft<1s is broken by 18%"
    lately.see(Score(value=math.nan, margins={}, failure="no request was finished"))
    assert lately.danger() == "no request was finished"
    lately.clear()
    assert lately.danger() is None
    for wrong in ({"room": 1.0}, {"windows": 0}, {"step": 0.0}, {"leave": -1}):
        with pytest.raises(InvalidInput):
            Enough(**wrong)  # type: ignore[arg-type]
