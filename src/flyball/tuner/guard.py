"""The gate between a proposal and a live engine: every rule has a name, and what passes is applied whole or not at all.

A proposal is checked against all rules in a fixed order; the first that it breaks refuses it, with the current value
and the limit. The event that tells of a change is durable before the change is made. In safe mode, and once stopped,
nothing passes. The last known good configuration is restored by `observe` when the engine does worse.

position    of a value: its share of the knob's range, on the knob's own scale (logarithmic where that is)
flip        a knob moves against the direction of its last move; a switch or a choice flips at each change
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Literal

from flyball.core.clock import Clock
from flyball.core.errors import EngineFailed, InvalidInput, InvalidKnob
from flyball.core.knobs import Configuration, Knob, Space, Value
from flyball.tuner.audit import Audit, AuditUnwritable, Event, Kind
from flyball.tuner.guard_baseline import Baseline, Judgement, observe
from flyball.tuner.guard_limits import Limits

Rule = Literal[
    "length", "unknown_knob", "type", "non_finite", "bounds", "allow_list", "max_step", "min_interval",
    "updates_per_second", "cumulative_change", "thrash", "cooldown", "safe_mode", "stopped", "stale_generation",
    "audit", "engine",
]  # fmt: skip
SafeReason = Literal["thrashing", "budget", "regression", "violations", "audit", "manual"]
Applier = Callable[[Configuration], object]

_TINY = 1e-9  # of a range: rounding is no change
_HOUR_S = 3600.0
_MOVES = 1024  # remembered of one knob
_BACKLOG = 1024  # events that wait for an audit that cannot be written; beyond, windows are not judged


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a proposal was not applied."""

    rule: Rule
    reason: str
    knob: str | None = None
    current: Value | None = None
    limit: float | str | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of a proposal."""

    proposal: int
    generation: int  # in force afterwards
    refusal: Refusal | None = None

    @property
    def accepted(self) -> bool:
        """Whether it is in force now."""
        return self.refusal is None


@dataclass(frozen=True, slots=True)
class SafeMode:
    """Why nothing may change, and until when."""

    reason: SafeReason
    detail: str
    since_s: float
    until_s: float  # infinite: only by hand, or by recovery


class _Gauge:
    """One knob with its limits, and its recent moves."""

    __slots__ = (
        "_asked",
        "_change",
        "allowed",
        "at",
        "current",
        "direction",
        "flips",
        "high",
        "knob",
        "low",
        "moved",
        "moves",
        "ordered",
        "span",
    )

    def __init__(self, knob: Knob, limits: Limits, current: Value) -> None:
        self.knob = knob
        self.ordered = knob.kind in ("int", "float")
        low, high = limits.bounds.get(knob.name, (knob.low, knob.high))
        self.low, self.high = (float(low), float(high)) if low is not None and high is not None else (0.0, 1.0)
        if self.ordered and knob.log and not self.low > 0:
            raise InvalidInput(f"guard bounds of {knob.name} start at {self.low}; its scale needs a bound above 0")
        ends = (math.log(self.low), math.log(self.high)) if knob.log else (self.low, self.high)
        self.span = max(ends[1] - ends[0], 1e-300)
        self.allowed = limits.allowed.get(knob.name)
        self.set(current)
        self.direction = 0
        self.flips: deque[float] = deque(maxlen=_MOVES)
        self.moves: deque[tuple[float, float]] = deque()
        self.moved = 0.0  # sum of the moves in the window

    def typed(self, value: object) -> Value | Refusal:
        """The value in the knob's own type, whatever its bounds."""
        knob = self.knob
        if not self.ordered:
            try:
                return knob.check(value)
            except InvalidKnob as error:
                return Refusal("type", str(error), knob.name, self.current, "the knob's own values")
        if isinstance(value, bool) or not isinstance(value, int | float):
            return Refusal("type", f"{knob.name}={value!r} is no number", knob.name, self.current, knob.kind)
        if not math.isfinite(value):
            return Refusal("non_finite", f"{knob.name}={value} is not finite", knob.name, self.current, "finite")
        if knob.kind == "int":
            if value != int(value):
                return Refusal("type", f"{knob.name}={value} is no whole number", knob.name, self.current, "int")
            return int(value)
        return float(value)

    def set(self, value: Value) -> None:
        """This is in force now."""
        self.current: Value = value
        self.at = self._position(value) if self.ordered else 0.0
        self._asked: Value | None = None
        self._change = 0.0

    def _position(self, value: Value) -> float:
        return math.log(max(float(value), 1e-300)) if self.knob.log else float(value)

    def change(self, value: Value) -> float:
        """Share of the range from the current value to another; a switch counts as a whole range."""
        if not self.ordered:
            return 0.0 if value == self.current else 1.0
        if value is not self._asked:  # a check and the move after it ask the same
            self._asked, self._change = value, (self._position(value) - self.at) / self.span
        return self._change

    def forget(self, before_s: float) -> None:
        """Drop moves and flips that are older."""
        moves = self.moves
        while moves and moves[0][0] <= before_s:
            self.moved -= moves.popleft()[1]
        if not moves:
            self.moved = 0.0
        while self.flips and self.flips[0] <= before_s:
            self.flips.popleft()

    def within(self, value: Value) -> Refusal | None:
        """The bounds and the allow-list; from outside the bounds a value may only come nearer."""
        if self.allowed is not None and value not in self.allowed:
            return Refusal("allow_list", f"{self.knob.name}={value} is not on the list", self.knob.name, self.current,
                           ", ".join(map(str, self.allowed)))  # fmt: skip
        if not self.ordered:
            return None
        seen, now = float(value), float(self.current)
        if self.low <= seen <= self.high or self.high < seen < now or now < seen < self.low:
            return None
        return Refusal("bounds", f"{self.knob.name}={value} is outside {self.low:g} to {self.high:g}", self.knob.name,
                       self.current, self.high if seen > self.high else self.low)  # fmt: skip


class _Input:
    """One input of a guard at a time: `with` gives its time. By hand, for `contextmanager` costs more than a rule."""

    __slots__ = ("_guard",)

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    def __enter__(self) -> float:
        self._guard._lock.acquire()
        try:
            return self._guard._begin()
        except BaseException:
            self._guard._lock.release()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._guard._end()
        finally:
            self._guard._lock.release()


class Guard:
    """The one gate of one engine; safe to call from several threads.

    `apply` sets some knobs, all or none, and raises when it cannot.
    """

    def __init__(
        self,
        space: Space,
        current: Configuration,
        *,
        apply: Applier,
        limits: Limits,
        audit: Audit,
        clock: Clock,
        run: str = "run",
    ) -> None:
        limits.check_names(space)
        self._gauges = {
            k.name: _Gauge(k, limits, current[k.name])
            for k in space
            if k.name in current and (limits.knobs is None or k.name in limits.knobs)
        }
        self._known = {k.name for k in space}
        self._apply, self._limits, self._audit, self._clock, self._run = apply, limits, audit, clock, run
        self._lock = threading.RLock()
        self._input = _Input(self)
        self._now_s, self._wall_s = clock.now_s(), clock.wall_s()
        self._seq = 0
        self._failure: str | None = None  # of the audit, during this input
        self._backlog: list[Event] = []  # what happened while the audit could not be written
        self._proposals = 0
        self.generation = 1
        self.good: dict[str, Value] = {name: gauge.current for name, gauge in self._gauges.items()}
        self._start = dict(self.good)
        self._baseline = Baseline()
        self._updates: deque[float] = deque(maxlen=1024)
        self._cooldown_s = -math.inf
        self._rollbacks: deque[float] = deque()
        self._breaches = 0
        self._recovering = 0
        self.safe: SafeMode | None = None
        self.stopped: str | None = None
        self.counts: dict[str, int] = {}
        self._append([self._event("start", self._now_s, {
            "knobs": [asdict(g.knob) for g in self._gauges.values()], "values": dict(self.good),
            "limits": limits.describe(),
        })])  # fmt: skip

    # -- what is known ------------------------------------------------------------------------------------------------

    @property
    def values(self) -> dict[str, Value]:
        """The guarded knobs in force."""
        return {name: gauge.current for name, gauge in self._gauges.items()}

    @property
    def limits(self) -> Limits:
        """What is allowed."""
        return self._limits

    @property
    def baseline(self) -> Baseline:
        """What the last known good does."""
        return self._baseline

    @property
    def trying(self) -> bool:
        """Whether something else than the last known good is in force."""
        return self.values != self.good

    def reachable(self, values: Mapping[str, Value], share: float = math.inf) -> dict[str, Value]:
        """The values nearest to a wish that the bounds, the steps and the cumulative change allow now.

        With a share, no knob moves more than that of its range (a whole number may by one).
        """
        with self._lock:
            now_s = self._time()
            return {name: self._nearest(self._gauges[name], v, now_s, share) for name, v in values.items()
                    if name in self._gauges}  # fmt: skip

    # -- inputs -------------------------------------------------------------------------------------------------------

    def propose(
        self, values: Mapping[str, object] | Sequence[object], *, why: str = "", if_generation: int | None = None
    ) -> Decision:
        """Apply a proposal, by name or as a list in the order of the knobs, or refuse it; never a part of it."""
        with self._input as now_s:
            if self._backlog:
                return self._unwritten()
            proposal = self._proposals + 1
            given = _plain(values)
            events = [self._event("proposal", now_s, {
                "proposal": proposal, "values": given, "why": why, "if_generation": if_generation,
            })]  # fmt: skip
            changes, refusal = self._check(values, now_s, if_generation)
            if refusal is None:
                after = self.generation + bool(changes)
                events.append(self._applied("apply", changes, now_s, proposal=proposal, why=why))
                if not self._written(events):
                    return self._unwritten()
                self._proposals, events = proposal, []
                refusal = self._set("apply", changes, now_s)
                if refusal is None:
                    return Decision(proposal, after)
            events += self._refusal(proposal, refusal, now_s)
            if not self._written(events):
                return self._unwritten()
            self._proposals = proposal
            if refusal.rule == "thrash":
                self._cooldown_s = now_s + self._limits.cooldown_s
                self._enter("thrashing", refusal.reason, now_s, self._limits.cooldown_s)
            return Decision(proposal, self.generation, refusal)

    def observe(self, seen: Judgement, *, generation: int | None = None) -> str:
        """Judge a window measured under a generation (default: the one in force): "keep", "promote", "rollback" or
        "ignored", if it belongs to another generation."""
        with self._input as now_s:
            if len(self._backlog) >= _BACKLOG:
                return "ignored"
            of = self.generation if generation is None else generation
            events = [self._event("window", now_s, {
                "of": of, "gain": _number(float(seen.gain)), "violation": _number(float(seen.violation)),
            })]  # fmt: skip
            if of != self.generation:
                self._keep([*events, self._event("ignored", now_s, {"of": of, "in_force": self.generation})])
                return "ignored"
            trying = self.trying
            self._baseline, action, why = observe(self._baseline, seen, now_s, self._limits, trying=trying)
            events += self._recover(seen, now_s)
            if action == "promote":
                self.good = self.values
                self._baseline = self._baseline.promoted()
                self._breaches = 0
                events.append(self._event("promote", now_s, {"values": dict(self.good), "why": why}))
            if action != "rollback":
                self._keep(events)
                return action
            broken = not seen.bad and seen.violation > 0
            self._breaches = self._breaches + 1 if broken else 0
            self._restore(self.good, now_s, events, why=why)
            if len(self._rollbacks) >= self._limits.rollbacks_per_hour:
                self._enter("budget", f"{len(self._rollbacks)} rollbacks within an hour", now_s)
            elif broken and self._breaches >= self._limits.breaches:
                self._enter("violations", f"{self._breaches} changes in a row broke a promise", now_s)
            elif not broken:
                self._enter("regression", why, now_s, self._limits.cooldown_s)
            return "rollback"

    def rebase(self, why: str) -> None:
        """The traffic has changed: what the last known good did before tells nothing any more."""
        self.command({"command": "rebase", "why": why})

    def rollback(self, why: str = "by hand") -> bool:
        """Restore the last known good; False if it is in force already, or could not be set."""
        return self.command({"command": "rollback", "why": why})

    def enter_safe_mode(self, why: str = "by hand", *, reason: SafeReason = "manual") -> None:
        """Let nothing pass until `resume`."""
        self.command({"command": "safe_mode", "why": why, "reason": reason})

    def resume(self, why: str = "by hand") -> None:
        """Leave safe mode, and be no longer stopped."""
        self.command({"command": "resume", "why": why})

    def stop(self, why: str = "stopped by hand", *, restore: bool = False) -> None:
        """Let nothing pass any more; with `restore`, what was in force at the start is put back first (the kill
        switch)."""
        self.command({"command": "stop", "why": why, "restore": restore})

    def command(self, data: Mapping[str, Any]) -> bool:
        """Do what a person, the loop or a recorded event commands; False if there was nothing to do."""
        with self._input as now_s:
            self._keep([self._event("command", now_s, dict(data))])
            why = str(data["why"])
            match data["command"]:
                case "rebase":
                    self._baseline = Baseline().changed(now_s)
                case "rollback":
                    return self.trying and self._restore(self.good, now_s, [], why=why) is None
                case "safe_mode":
                    self._enter(data["reason"], why, now_s)
                case "resume":
                    self.stopped = None
                    if self.safe is not None and self.safe.reason != "audit":
                        self._keep([self._leave(now_s, why)])
                case "stop":
                    self.stopped = why
                    if data["restore"] and self.values != self._start:
                        return self._restore(self._start, now_s, [], why=why) is None
                case "audit_failed":
                    self._enter_for_audit(why, now_s)
                case "audit_healed":
                    self._leave_for_audit(now_s)
                case unknown:
                    raise InvalidInput(f"unknown command {unknown!r}; the guard knows rebase, rollback, safe_mode, "
                                       "resume and stop")  # fmt: skip
            return True

    def note(self, data: Mapping[str, Any]) -> None:
        """Write what led to a decision into the audit."""
        with self._input as now_s:
            self._keep([self._event("decision", now_s, data)])

    def _begin(self) -> float:
        """An input's time, with what time has ended before it."""
        now_s, self._wall_s = self._time(), self._clock.wall_s()
        if self._backlog or self.safe is not None:
            self._expire(now_s)
        return now_s

    def _end(self) -> None:
        """After an input: what the audit could not take."""
        if self._failure is not None:
            why, self._failure = self._failure, None
            self._backlog.append(self._event("command", self._now_s, {"command": "audit_failed", "why": why}))
            self._enter_for_audit(why, self._now_s)

    # -- rules --------------------------------------------------------------------------------------------------------

    def _check(
        self, values: Mapping[str, object] | Sequence[object], now_s: float, if_generation: int | None
    ) -> tuple[dict[str, Value], Refusal | None]:
        if self.stopped is not None:
            return {}, Refusal("stopped", self.stopped)
        if self.safe is not None:
            return {}, Refusal("safe_mode", f"safe mode since {self.safe.since_s:.3f} s: {self.safe.detail}",
                               limit=self.safe.reason)  # fmt: skip
        if if_generation is not None and if_generation != self.generation:
            return {}, Refusal("stale_generation", f"made for {if_generation}, {self.generation} is in force",
                               current=self.generation, limit=if_generation)  # fmt: skip
        named = self._named(values)
        if isinstance(named, Refusal):
            return {}, named
        changes: dict[str, Value] = {}
        for name, value in named.items():
            gauge = self._gauges.get(name)
            if gauge is None:
                return {}, self._unknown(name)
            typed = gauge.typed(value)
            if isinstance(typed, Refusal):
                return {}, typed
            if refusal := gauge.within(typed):
                return {}, refusal
            if typed != gauge.current:
                changes[name] = typed
        if changes:
            refusal = self._too_fast(now_s) or self._too_far(changes, now_s)
            if refusal is not None:
                return {}, refusal
        return changes, None

    def _named(self, values: Mapping[str, object] | Sequence[object]) -> Mapping[str, object] | Refusal:
        if isinstance(values, dict | Mapping):
            return values
        if isinstance(values, str) or not isinstance(values, Sequence):
            return Refusal("type", f"{values!r} is no proposal", limit="values by name or in order")
        if len(values) != len(self._gauges):
            return Refusal("length", f"{len(values)} values for {len(self._gauges)} knobs", current=len(values),
                           limit=len(self._gauges))  # fmt: skip
        return dict(zip(self._gauges, values, strict=True))

    def _unknown(self, name: object) -> Refusal:
        if name in self._known:
            return Refusal("allow_list", f"{name} is not among the knobs that may be set", str(name),
                           limit=", ".join(self._gauges))  # fmt: skip
        return Refusal("unknown_knob", f"there is no knob {name!r}", str(name), limit=", ".join(self._gauges))

    def _too_fast(self, now_s: float) -> Refusal | None:
        limits = self._limits
        if now_s < self._cooldown_s:
            return Refusal("cooldown", f"after too many flips, for {self._cooldown_s - now_s:.3g} s more",
                           limit=limits.cooldown_s)  # fmt: skip
        updates = self._updates
        if updates and now_s - updates[-1] < limits.min_interval_s:
            return Refusal("min_interval", f"{now_s - updates[-1]:.3g} s since the last change",
                           current=now_s - updates[-1], limit=limits.min_interval_s)  # fmt: skip
        span_s = max(1.0, 1.0 / limits.updates_per_second)
        while updates and now_s - updates[0] >= span_s:
            updates.popleft()
        if len(updates) >= limits.updates_per_second * span_s:
            return Refusal("updates_per_second", f"{len(updates)} changes within {span_s:g} s", current=len(updates),
                           limit=limits.updates_per_second)  # fmt: skip
        return None

    def _too_far(self, changes: Mapping[str, Value], now_s: float) -> Refusal | None:
        limits = self._limits
        for name, value in changes.items():
            gauge = self._gauges[name]
            change = gauge.change(value)
            if gauge.ordered and (refusal := self._step(gauge, value, change)):
                return refusal
            gauge.forget(now_s - limits.window_s)
            size = abs(change) if gauge.ordered else 0.0
            if gauge.moved + size > limits.cumulative + _TINY and not self._unit_move(gauge, value):
                return Refusal("cumulative_change", f"{name} has moved {gauge.moved:.3g} of its range, and would move "
                               f"{size:.3g} more", name, gauge.current, limits.cumulative)  # fmt: skip
            if self._flips(gauge, change) and len(gauge.flips) >= limits.flips:
                return Refusal("thrash", f"{name} changed direction {len(gauge.flips)} times within {limits.window_s:g}"
                               " s", name, gauge.current, limits.flips)  # fmt: skip
        return None

    def _unit_move(self, gauge: _Gauge, value: Value) -> bool:
        """The least move of a whole number, the first in the window: a coarse knob could never move otherwise."""
        return gauge.knob.kind == "int" and abs(int(value) - int(gauge.current)) == 1 and gauge.moved == 0

    def _step(self, gauge: _Gauge, value: Value, change: float) -> Refusal | None:
        step = self._limits.steps.get(gauge.knob.name)
        difference = abs(float(value) - float(gauge.current))
        if gauge.knob.kind == "int" and difference <= 1:
            return None
        if step is None or step.kind == "fraction":
            limit, size = (self._limits.max_step if step is None else step.size), abs(change)
        elif step.kind == "absolute":
            limit, size = step.size, difference
        else:
            limit, size = step.size, difference / max(abs(float(gauge.current)), 1e-12)
        if size <= limit * (1 + _TINY) + _TINY * (step is None):
            return None
        return Refusal("max_step", f"{gauge.knob.name} would move {size:.4g} at once", gauge.knob.name, gauge.current,
                       limit)  # fmt: skip

    def _flips(self, gauge: _Gauge, change: float) -> bool:
        if not gauge.ordered:
            return gauge.direction != 0
        return change * gauge.direction < 0

    def _nearest(self, gauge: _Gauge, wish: Value, now_s: float, most: float) -> Value:
        typed = gauge.typed(wish)
        if isinstance(typed, Refusal) or not gauge.ordered:
            return gauge.current if isinstance(typed, Refusal) or gauge.within(typed) else typed
        gauge.forget(now_s - self._limits.window_s)
        now, aim = float(gauge.current), min(max(float(typed), gauge.low), gauge.high)
        step = self._limits.steps.get(gauge.knob.name)
        room = max(self._limits.cumulative - gauge.moved, 0.0)
        largest = self._limits.max_step if step is None else step.size if step.kind == "fraction" else math.inf
        share = min(room, most, largest)
        low, high = self._around(gauge, now, share)
        if step is not None and step.kind != "fraction":
            reach = step.size * (abs(now) if step.kind == "relative" else 1.0)
            low, high = max(low, now - reach), min(high, now + reach)
        value = min(max(aim, low), high)
        if gauge.knob.kind == "float":
            return value
        whole = math.floor(value) if value > now else math.ceil(value)
        if whole == now and aim != now and room > 0 and abs(aim - now) >= 1:
            whole = int(now) + (1 if aim > now else -1)
        return int(whole)

    @staticmethod
    def _around(gauge: _Gauge, now: float, share: float) -> tuple[float, float]:
        if share == math.inf:
            return -math.inf, math.inf
        if gauge.knob.log and now > 0:
            factor = math.exp(min(share * gauge.span, 700.0))
            return now / factor, now * factor
        return now - share * gauge.span, now + share * gauge.span

    # -- changes ------------------------------------------------------------------------------------------------------

    def _applied(self, kind: Kind, changes: Mapping[str, Value], now_s: float, **data: object) -> Event:
        old = {name: self._gauges[name].current for name in changes}
        return self._event(kind, now_s, {
            **data, "old": old, "new": dict(changes), "to": self.generation + bool(changes),
        })  # fmt: skip

    def _set(self, kind: Kind, changes: Mapping[str, Value], now_s: float) -> Refusal | None:
        """Apply what was written, then remember it; what fails changes nothing here."""
        if not changes:
            return None
        try:
            self._apply(dict(changes))
        except (InvalidKnob, EngineFailed) as error:
            self._keep([self._event("apply_failed", now_s, {"of": kind, "error": str(error)})])
            return Refusal("engine", f"the engine did not take it: {error}")
        self.generation += 1
        for name, value in changes.items():
            self._move(self._gauges[name], value, now_s, kind)
        self._updates.append(now_s)
        self._baseline = self._baseline.changed(now_s)
        return None

    def _move(self, gauge: _Gauge, value: Value, now_s: float, kind: Kind) -> None:
        change = gauge.change(value)
        if kind == "apply":
            if self._flips(gauge, change):
                gauge.flips.append(now_s)
            size = abs(change) if gauge.ordered else 0.0
            gauge.moves.append((now_s, size))
            gauge.moved += size
            if len(gauge.moves) > _MOVES:  # the two oldest as one, which is forgotten when the later of them would be
                first, second = gauge.moves.popleft(), gauge.moves.popleft()
                gauge.moves.appendleft((second[0], first[1] + second[1]))
        gauge.direction = (1 if change > 0 else -1) if gauge.ordered else 1
        gauge.set(value)

    def _restore(self, values: Mapping[str, Value], now_s: float, events: list[Event], *, why: str) -> Refusal | None:
        """Put a configuration back: past all rules of pace, for it is known to be good."""
        changes = {name: value for name, value in values.items() if self._gauges[name].current != value}
        self._keep([*events, self._applied("rollback", changes, now_s, why=why)])
        while self._rollbacks and now_s - self._rollbacks[0] >= _HOUR_S:
            self._rollbacks.popleft()
        refusal = self._set("rollback", changes, now_s)
        if refusal is None:
            self._rollbacks.append(now_s)
        return refusal

    def _refusal(self, proposal: int, refusal: Refusal, now_s: float) -> list[Event]:
        return [self._event("refusal", now_s, {
            "proposal": proposal, "rule": refusal.rule, "reason": refusal.reason, "knob": refusal.knob,
            "current": _number(refusal.current), "limit": refusal.limit,
        })]  # fmt: skip

    def _unwritten(self) -> Decision:
        self.counts["refusal:audit"] = self.counts.get("refusal:audit", 0) + 1
        detail = self.safe.detail if self.safe is not None else "events wait to be written"
        return Decision(
            0, self.generation, Refusal("audit", f"the audit cannot be written, so nothing may change: {detail}")
        )

    # -- safe mode ----------------------------------------------------------------------------------------------------

    def _enter(self, reason: SafeReason, detail: str, now_s: float, for_s: float | None = None) -> None:
        if self.safe is not None and self.safe.reason == "manual":
            return  # ends by hand only: nothing may shorten it
        until_s = (
            math.inf if reason in ("manual", "audit") else now_s + (self._limits.safe_s if for_s is None else for_s)
        )
        self.safe = SafeMode(reason, detail, now_s, until_s)
        self._recovering = 0
        self._keep([
            self._event("safe_enter", now_s, {"reason": reason, "detail": detail, "until_s": _number(until_s)})
        ])  # fmt: skip

    def _leave(self, now_s: float, why: str) -> Event:
        assert self.safe is not None
        left = self.safe
        self.safe = None
        self._breaches = 0
        return self._event("safe_exit", now_s, {"reason": left.reason, "why": why})

    def _expire(self, now_s: float) -> None:
        """End what time, or an audit that can be written again, has ended."""
        if self._backlog and self._audit.healthy():
            self._flush(now_s)
        if self.safe is not None and now_s >= self.safe.until_s:
            self._keep([self._leave(now_s, "its time is over")])

    def _recover(self, seen: Judgement, now_s: float) -> list[Event]:
        if self.safe is None or self.safe.reason in ("manual", "audit"):
            return []
        self._recovering = 0 if seen.bad or seen.violation > 0 else self._recovering + 1
        if self._recovering < self._limits.recovery:
            return []
        return [self._leave(now_s, f"{self._recovering} good windows in a row")]

    # -- audit --------------------------------------------------------------------------------------------------------

    def _time(self) -> float:
        """The clock, which may stand still for us but never goes back: a jump must not free what it forbids."""
        now_s = self._clock.now_s()
        self._now_s = max(self._now_s, now_s)  # in this order NaN changes nothing
        return self._now_s

    def _event(self, kind: Kind, now_s: float, data: Mapping[str, Any]) -> Event:
        self._seq += 1
        return Event(kind, self._run, self._seq, now_s, self._wall_s, self.generation, data)

    def _append(self, events: Sequence[Event]) -> None:
        self._audit.append(events)
        counts = self.counts
        for event in events:
            counts[event.kind] = counts.get(event.kind, 0) + 1
            if event.kind == "refusal":
                name = f"refusal:{event.data['rule']}"
                counts[name] = counts.get(name, 0) + 1

    def _written(self, events: Sequence[Event]) -> bool:
        """Write the events of a proposal; if that fails it was never made."""
        try:
            self._append(events)
        except AuditUnwritable as error:
            self._seq -= len(events)
            self._failure = str(error)
            return False
        return True

    def _keep(self, events: Sequence[Event]) -> None:
        """Write what has happened in any case; what cannot be written waits until it can be."""
        if self._backlog:
            self._backlog.extend(events)
            return
        try:
            self._append(events)
        except AuditUnwritable as error:
            self._backlog.extend(events)
            self._failure = str(error)

    def _enter_for_audit(self, why: str, now_s: float) -> None:
        if self.safe is None:  # another reason holds as long as it would without
            self._enter("audit", why, now_s)

    def _leave_for_audit(self, now_s: float) -> None:
        if self.safe is not None and self.safe.reason == "audit":
            self._keep([self._leave(now_s, "the audit can be written again")])

    def _flush(self, now_s: float) -> None:
        """Write what waits; then the audit has healed."""
        try:
            self._append(self._backlog)
        except AuditUnwritable:
            return
        self._backlog = []
        self._keep([self._event("command", now_s, {"command": "audit_healed", "why": "it can be written"})])
        self._leave_for_audit(now_s)


def _plain(values: object) -> Any:  # noqa: ANN401  # what JSON can hold
    if isinstance(values, dict | Mapping):  # dict first: the other is asked through an abstract class, which is slow
        return {str(name): value if type(value) is int else _number(value) for name, value in values.items()}
    if isinstance(values, Sequence) and not isinstance(values, str):
        return [_number(value) for value in values]
    return {"foreign": repr(values)}


def _number(value: object) -> Any:  # noqa: ANN401  # what JSON can hold
    """A value as JSON can hold it: numbers that are not finite by name, anything foreign by its text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else {"not_finite": str(value)}
    if value is None or isinstance(value, bool | int | str):
        return value
    return {"foreign": repr(value)}
