"""The guard: each rule by name, whole changes or none, safe mode, and the way back."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from flyball.core.clock import SystemClock, VirtualClock
from flyball.core.errors import EngineFailed, InvalidInput, InvalidKnob
from flyball.core.knobs import Configuration, Knob, Space
from flyball.tuner.audit import AuditUnwritable, Event, MemoryAudit
from flyball.tuner.guard import Guard
from flyball.tuner.guard_baseline import Judgement
from flyball.tuner.guard_limits import PRESETS, Limits, Step, from_config, preset
from flyball.tuner.guard_replay import first_difference, replay

SPACE = Space((
    Knob(name="batch", kind="int", default=8, low=1, high=64, log=True),
    Knob(name="wait_ms", kind="float", default=100.0, low=0.0, high=500.0),
    Knob(name="caching", kind="bool", default=True),
))  # fmt: skip
SEED_FORM = '{"bounds": [[1,64],[10,500],[0,1]], "max_delta": [8,100,1], "max_updates_per_second": 1.0}'
FREE = Limits(max_step=1, min_interval_s=0, updates_per_second=1e9, cumulative=1e9, flips=10**9, rollbacks_per_hour=1e9)


class FullDisk(MemoryAudit):
    """An audit that can be told to fail."""

    full = False

    def append(self, events: Sequence[Event]) -> None:
        """Fail, or keep them."""
        if self.full:
            raise AuditUnwritable("no space left on device")
        super().append(events)

    def healthy(self) -> bool:
        """Whether there is room again."""
        return not self.full


class World:
    """A guard, its clock, its audit and the engine behind it."""

    def __init__(self, limits: Limits = PRESETS["balanced"], **values: Any) -> None:
        self.clock, self.audit = VirtualClock(), FullDisk()
        self.engine: dict[str, Any] = SPACE.defaults() | values
        self.fails = False
        self.guard = Guard(
            SPACE, dict(self.engine), apply=self.apply, limits=limits, audit=self.audit, clock=self.clock
        )

    def apply(self, values: Configuration) -> None:
        """The engine's side."""
        if self.fails:
            raise EngineFailed("gone")
        self.engine |= values

    def rule(self, values: Any, after_s: float = 1.0, **options: Any) -> str | None:
        """The rule that refuses a proposal, None if it passes; checks that a refusal changed nothing."""
        self.clock.advance(after_s)
        before = dict(self.engine), self.guard.values, self.guard.generation
        decision = self.guard.propose(values, **options)
        if decision.refusal is not None:
            assert (dict(self.engine), self.guard.values, self.guard.generation) == before
            assert decision.refusal.reason
        return decision.refusal.rule if decision.refusal else None

    def kinds(self) -> list[str]:
        """The kinds of all events, in order."""
        return [event.kind for event in self.audit.events]

    def replays(self) -> bool:
        """Whether the audit, decided again, is the same."""
        return first_difference(self.audit.events, replay(self.audit.events)) is None


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"wait_ms": 120.0}, None),
        ([8, 120.0, True], None),
        ([8, 120.0], "length"),
        ({"nothing": 1}, "unknown_knob"),
        ({"wait_ms": math.nan}, "non_finite"),
        ({"wait_ms": math.inf}, "non_finite"),
        ({"wait_ms": "fast"}, "type"),
        ({"wait_ms": None}, "type"),
        ({"batch": 8.5}, "type"),
        ({"caching": 1}, "type"),
        (17, "type"),
        ({"wait_ms": 501.0}, "bounds"),
        ({"wait_ms": -1.0}, "bounds"),
        ({"wait_ms": 300.0}, "max_step"),
        ({"batch": 16}, "max_step"),
        ({"wait_ms": 120.0, "batch": 60}, "max_step"),
    ],
)
def test_each_rule_refuses_by_name(values: Any, rule: str | None) -> None:
    """What breaks a rule is refused whole, with the rule's name; what breaks none is applied."""
    world = World()
    assert world.rule(values) == rule
    assert world.replays()


def test_rules_of_pace_count_time() -> None:
    """Interval, rate, cumulative change and thrash refuse what would each be fine alone."""
    world = World(Limits(updates_per_second=2, min_interval_s=0.1, cumulative=0.15, flips=2, cooldown_s=30))
    assert world.rule({"wait_ms": 110.0}) is None
    assert world.rule({"wait_ms": 120.0}, after_s=0.05) == "min_interval"
    assert world.rule({"wait_ms": 120.0}, after_s=0.1) is None
    assert world.rule({"wait_ms": 130.0}, after_s=0.2) == "updates_per_second"
    assert world.rule({"wait_ms": 160.0}) is None
    assert world.rule({"wait_ms": 180.0}) == "cumulative_change"
    world.clock.advance(61)
    for wait in (150.0, 160.0):
        assert world.rule({"wait_ms": wait}) is None
    assert world.rule({"wait_ms": 150.0}) == "thrash"
    assert world.guard.safe is not None
    assert world.guard.safe.reason == "thrashing"
    assert world.rule({"wait_ms": 165.0}) == "safe_mode"
    assert world.rule({"wait_ms": 165.0}, after_s=61) is None
    assert world.replays()


def test_cooldown_holds_when_safe_mode_is_left_by_hand() -> None:
    """Leaving safe mode by hand does not shorten the cooldown after thrashing."""
    world = World(Limits(flips=0, cooldown_s=30))
    assert world.rule({"wait_ms": 110.0}) is None
    assert world.rule({"wait_ms": 100.0}) == "thrash"
    world.guard.resume()
    assert world.rule({"wait_ms": 120.0}) == "cooldown"


def test_lists_and_bounds_narrow_what_may_be_set() -> None:
    """Only listed knobs and values pass, and the guard's own bounds hold within the engine's."""
    limits = Limits(knobs=("wait_ms", "caching"), allowed={"caching": (True,)}, bounds={"wait_ms": (50.0, 105.0)})
    world = World(limits)
    assert world.rule({"batch": 9}) == "allow_list"
    assert world.rule({"caching": False}) == "allow_list"
    assert world.rule({"wait_ms": 110.0}) == "bounds"
    assert world.rule({"wait_ms": 105.0}) is None


def test_a_value_outside_its_bounds_may_move_inward() -> None:
    """An engine found outside the bounds is led back in steps, and never farther out."""
    world = World(Limits(bounds={"wait_ms": (0.0, 50.0)}, steps={"wait_ms": Step("relative", 0.5)}, cumulative=10))
    assert world.rule({"wait_ms": 120.0}) == "bounds"
    assert world.rule({"wait_ms": 70.0}) is None
    assert world.rule({"wait_ms": 75.0}) == "bounds"
    assert world.rule({"wait_ms": 45.0}) is None


def test_the_short_form_is_taken_as_it_stands() -> None:
    """The form of other controllers bounds each knob in order; unknown keys are refused by name."""
    world = World(from_config(SEED_FORM, SPACE))
    assert world.rule({"batch": 17}) == "max_step"
    assert world.rule({"batch": 16, "wait_ms": 200.0}) is None
    assert world.rule({"batch": 17}, after_s=0.5) == "updates_per_second"
    assert world.rule({"wait_ms": 9.0}) == "bounds"
    with pytest.raises(InvalidInput, match="max_deltas"):
        from_config('{"max_deltas": [1, 2, 3]}', SPACE)
    with pytest.raises(InvalidInput, match="one entry for each knob"):
        from_config('{"max_delta": [1]}', SPACE)
    with pytest.raises(InvalidKnob, match="nothing"):
        from_config({"bounds": {"nothing": [0, 1]}}, SPACE)


def test_presets_are_those_documented() -> None:
    """Every figure of the three presets."""
    rows = {
        name: (p.max_step, p.updates_per_second, p.min_interval_s, p.flips, p.cooldown_s, p.cumulative, p.regressions,
               p.rollbacks_per_hour)
        for name, p in PRESETS.items()
    }  # fmt: skip
    assert rows == {
        "conservative": (0.05, 2, 0.5, 2, 60, 0.25, 3, 2),
        "balanced": (0.10, 10, 0.1, 3, 30, 0.5, 5, 4),
        "aggressive": (0.20, 20, 0.05, 5, 10, 1.0, 8, 10),
    }
    with pytest.raises(InvalidInput, match="reckless"):
        preset("reckless")
    limits = from_config({"preset": "aggressive", "steps": {"batch": {"kind": "relative", "size": 0.5}}}, SPACE)
    assert limits.steps == {"batch": Step("relative", 0.5)}
    assert from_config(json.dumps(limits.describe()), SPACE) == limits


def test_limits_refuse_nonsense() -> None:
    """A limit that could not guard is refused at birth."""
    for bad in ({"max_step": 0}, {"cooldown_s": math.nan}, {"max_step": "much"}, {"bounds": {"batch": [5, 1]}}):
        with pytest.raises(InvalidInput):
            from_config(bad, SPACE)


def test_a_broken_promise_restores_the_last_known_good_at_once() -> None:
    """One window over the SLO undoes the change under which it was measured."""
    world = World()
    world.guard.observe(Judgement(gain=10.0))
    assert world.rule({"wait_ms": 120.0}) is None
    assert world.guard.observe(Judgement(gain=12.0, violation=0.1)) == "rollback"
    assert world.engine == SPACE.defaults()
    assert world.guard.generation == 3
    assert world.replays()


def test_a_window_of_another_generation_is_ignored() -> None:
    """What was measured under the configuration before says nothing about the one in force."""
    world = World()
    assert world.rule({"wait_ms": 120.0}) is None
    assert world.guard.observe(Judgement(gain=math.nan), generation=1) == "ignored"
    assert world.rule({"wait_ms": 125.0}, if_generation=1) == "stale_generation"
    assert world.replays()


@pytest.mark.parametrize("gain", [9.0, math.nan])
def test_regressions_are_counted_before_the_rollback(gain: float) -> None:
    """So many clearly worse windows, or windows that measured nothing, undo a change; not one fewer."""
    world = World()
    for seen in (10.0, 10.1, 9.9, 10.0):
        world.guard.observe(Judgement(gain=seen))
    assert world.rule({"wait_ms": 120.0}) is None
    actions = [world.guard.observe(Judgement(gain=gain)) for _ in range(5)]
    assert actions == ["keep"] * 4 + ["rollback"]
    assert world.guard.safe is not None
    assert world.guard.safe.reason == "regression"
    assert world.replays()


def test_a_slow_decline_counts_and_noise_does_not() -> None:
    """Windows each within noise add up when they all lean one way, and cancel when they do not."""
    declining, noisy = World(), World()
    for world in (declining, noisy):
        for i in range(20):
            world.guard.observe(Judgement(gain=10.0 + (-1) ** i))
        assert world.rule({"wait_ms": 120.0}) is None
    assert "rollback" in [declining.guard.observe(Judgement(gain=9.0)) for _ in range(20)]
    assert "rollback" not in [noisy.guard.observe(Judgement(gain=10.0 + (-1) ** i)) for i in range(200)]


def test_a_configuration_is_promoted_only_after_a_stable_time() -> None:
    """The last known good moves when another has done as well for long enough, and rollbacks then lead there."""
    world = World()
    world.guard.observe(Judgement(gain=10.0))
    assert world.rule({"wait_ms": 120.0}) is None
    actions = []
    for _ in range(7):
        world.clock.advance(10)
        actions.append(world.guard.observe(Judgement(gain=10.5)))
    assert actions == ["keep"] * 5 + ["promote", "keep"]
    assert world.rule({"wait_ms": 140.0}) is None
    assert world.guard.rollback()
    assert world.engine["wait_ms"] == 120.0
    assert not world.guard.rollback()


def test_rollbacks_are_capped_by_safe_mode() -> None:
    """When the hour's rollbacks are used up, the last known good is in force and nothing passes."""
    world = World(Limits(rollbacks_per_hour=2, breaches=99))
    for _ in range(2):
        assert world.rule({"wait_ms": 120.0}, after_s=70) is None
        assert world.guard.observe(Judgement(gain=1.0, violation=1.0)) == "rollback"
    assert world.guard.safe is not None
    assert world.guard.safe.reason == "budget"
    assert world.engine == SPACE.defaults()
    assert world.rule({"wait_ms": 120.0}) == "safe_mode"
    assert world.replays()


def test_repeated_breaches_lead_to_safe_mode_and_good_windows_out_of_it() -> None:
    """Changes that break promises in a row stop adaptation; a row of good windows starts it again."""
    world = World(Limits(breaches=2, rollbacks_per_hour=99, recovery=3))
    for _ in range(2):
        assert world.rule({"wait_ms": 120.0}, after_s=70) is None
        world.guard.observe(Judgement(gain=1.0, violation=1.0))
    assert world.guard.safe is not None
    assert world.guard.safe.reason == "violations"
    for _ in range(3):
        assert world.rule({"wait_ms": 120.0}) == "safe_mode"
        world.guard.observe(Judgement(gain=1.0))
    assert world.guard.safe is None
    assert world.rule({"wait_ms": 120.0}, after_s=70) is None
    assert world.replays()


def test_a_worse_world_is_not_blamed_on_the_change() -> None:
    """Where the last known good breaks its promises too, a change that breaks them less is kept."""
    world = World()
    world.guard.observe(Judgement(gain=5.0, violation=0.8))
    assert world.rule({"wait_ms": 120.0}) is None
    assert world.guard.observe(Judgement(gain=4.0, violation=0.4)) == "keep"
    assert world.guard.observe(Judgement(gain=4.0, violation=0.9)) == "rollback"


def test_safe_mode_by_hand_ends_by_hand_only() -> None:
    """Neither time nor good windows end what a person began, and the kill switch restores the start."""
    world = World()
    assert world.rule({"wait_ms": 120.0}) is None
    world.guard.enter_safe_mode("maintenance")
    for _ in range(20):
        assert world.rule({"wait_ms": 121.0}, after_s=1e5) == "safe_mode"
        world.guard.observe(Judgement(gain=1.0))
    world.guard.resume()
    assert world.rule({"wait_ms": 121.0}) is None
    world.guard.stop("killed", restore=True)
    assert world.engine == SPACE.defaults()
    assert world.rule({"wait_ms": 121.0}) == "stopped"
    assert world.replays()


def test_a_full_disk_stops_changes_and_loses_no_event() -> None:
    """Nothing passes while the audit cannot be written; then all that happened is there, and it replays."""
    world = World(FREE)
    world.guard.observe(Judgement(gain=1.0))
    assert world.rule({"wait_ms": 120.0}) is None
    world.audit.full = True
    assert [world.rule({"wait_ms": 100.0 + i}) for i in range(50)] == ["audit"] * 50
    assert world.guard.safe is not None
    assert world.guard.safe.reason == "audit"
    assert world.guard.observe(Judgement(gain=1.0, violation=1.0)) == "rollback"  # safety does not wait for a disk
    assert world.engine == SPACE.defaults()
    world.audit.full = False
    assert world.rule({"wait_ms": 110.0}) is None
    assert world.kinds()[-8:] == [
        "command", "safe_enter", "window", "rollback", "command", "safe_exit", "proposal", "apply",
    ]  # fmt: skip
    assert [event.seq for event in world.audit.events] == list(range(1, len(world.audit.events) + 1))
    assert world.replays()


def test_an_engine_that_fails_leaves_everything_as_it_was() -> None:
    """A change that the engine did not take is no change: not in the values, not in the generation."""
    world = World()
    world.fails = True
    assert world.rule({"wait_ms": 120.0}) == "engine"
    world.fails = False
    assert world.rule({"wait_ms": 120.0}, after_s=1.0) is None
    assert world.kinds() == ["start", "proposal", "apply", "apply_failed", "refusal", "proposal", "apply"]
    assert world.replays()


def test_a_clock_that_jumps_frees_nothing() -> None:
    """Time that goes back, or is no number, passes no rule of pace."""
    world = World()
    assert world.rule({"wait_ms": 110.0}) is None
    for jump in (-1e6, math.nan, -math.inf):
        real, world.clock._now_s = world.clock._now_s, jump
        assert world.rule({"wait_ms": 112.0}, after_s=0.0) == "min_interval"
        world.clock._now_s = real
    assert world.rule({"wait_ms": 112.0}) is None


def test_what_is_reachable_passes() -> None:
    """The values that `reachable` gives are never refused for their size, and lead all the way in some steps."""
    world = World()
    for _ in range(60):
        world.clock.advance(61)
        decision = world.guard.propose(world.guard.reachable({"batch": 64, "wait_ms": 500.0}))
        assert decision.accepted
    assert world.guard.values == {"batch": 64, "wait_ms": 500.0, "caching": True}


def test_many_writers_pass_one_gate() -> None:
    """Eight threads at once: generations rise by one, each applied change is in the audit once, none is torn."""
    engine: list[tuple[int, float]] = []
    audit = MemoryAudit()

    def apply(values: Configuration) -> None:
        engine.append((int(values["batch"]), float(values["wait_ms"])))

    guard = Guard(SPACE, SPACE.defaults(), apply=apply, limits=FREE, audit=audit, clock=SystemClock())
    accepted: list[int] = []

    def write(writer: int) -> None:
        for i in range(100):
            number = writer * 100 + i
            decision = guard.propose({"batch": 1 + number % 60, "wait_ms": number / 2})
            if decision.accepted:
                accepted.append(decision.generation)

    threads = [threading.Thread(target=write, args=(w,)) for w in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    changed = [e for e in audit.events if e.kind == "apply" and e.data["new"]]
    assert [e.data["to"] for e in changed] == list(range(2, len(changed) + 2))
    assert guard.generation == len(changed) + 1
    assert first_difference(audit.events, replay(audit.events)) is None


def test_a_thousand_cycles_leave_exactly_their_events() -> None:
    """Each proposal leaves itself and one outcome, each window itself; the record decides the same again."""
    world = World(Limits(rollbacks_per_hour=10**6, breaches=10**6, cooldown_s=0, regressions=3))
    wanted = {"proposal": 0, "window": 0}
    for i in range(1000):
        world.clock.advance(0.07 + 0.5 * (i % 5))
        wanted["proposal"] += 1
        world.guard.propose({"wait_ms": 100.0 + (i * 37) % 90, "batch": 6 + i % 4})
        wanted["window"] += 1
        world.guard.observe(Judgement(gain=math.nan if i % 97 == 0 else i % 7, violation=0.2 if i % 31 == 0 else 0.0))
    kinds = world.kinds()
    assert {name: kinds.count(name) for name in wanted} == wanted
    assert kinds.count("apply") + kinds.count("refusal") == 1000
    assert kinds.count("apply") > 50
    assert kinds.count("rollback") > 5
    assert kinds.count("safe_enter") == kinds.count("safe_exit") + (world.guard.safe is not None)
    changes = [e for e in world.audit.events if e.kind in ("apply", "rollback") and e.data["new"]]
    assert [e.data["to"] for e in changes] == list(range(2, len(changes) + 2))
    assert world.replays()
