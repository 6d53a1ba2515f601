"""Holding a live service in tune: observe, judge, propose, guard, apply, settle, measure; one step a window.

`Holder.step` takes one reading and returns what was decided, with its reason. Whatever it wants passes the guard; a
wish that is farther than the guard allows is approached in steps, each measured. Windows that straddle a change, were
measured under another generation or fall into the settle time are ignored.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from flyball.core.clock import Clock
from flyball.core.errors import FlyballError, InvalidInput
from flyball.core.knobs import Configuration, Value
from flyball.tuner.drift import Shift
from flyball.tuner.drift import observe as observe_load
from flyball.tuner.guard import Guard
from flyball.tuner.guard_baseline import Judgement
from flyball.tuner.hold_reading import Reading
from flyball.tuner.objective import Score
from flyball.tuner.online.tuner import OnlineTuner, Trial

Mode = Literal["shadow", "canary", "full"]
Run = Literal["running", "paused", "stopped", "killed"]
Action = Literal["apply", "wait", "ignore", "refuse", "rollback", "shadow", "ask", "hold"]
MODES: tuple[Mode, ...] = get_args(Mode)

_KEPT = 256  # decisions that can be explained without the audit


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What one step decided, and why."""

    number: int
    at_s: float
    action: Action
    why: str
    values: Mapping[str, Value]  # in force afterwards
    wish: Mapping[str, Value] | None = None  # of the proposer
    proposal: int | None = None  # number in the audit
    score: Score | None = None

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        told = None
        if self.score is not None:
            value, margins = _finite(self.score.value), dict(self.score.margins)
            told = {"value": value, "margins": margins, "failure": self.score.failure}
        return {
            "number": self.number, "at_s": self.at_s, "action": self.action, "why": self.why,
            "values": dict(self.values), "wish": None if self.wish is None else dict(self.wish),
            "proposal": self.proposal, "score": told,
        }  # fmt: skip


class Holder:
    """The loop of one service; `step` is called once a window, all else from any thread.

    `generation` tells what the service says is in force, in the words of its readings.
    """

    def __init__(
        self,
        *,
        tuner: OnlineTuner,
        guard: Guard,
        judge: Callable[[Reading], Score],
        generation: Callable[[], str],
        clock: Clock,
        mode: Mode = "full",
        settle_s: float = 2.0,
        windows: int = 1,
        approve: Callable[[Configuration, str], bool | None] | None = None,
    ) -> None:
        if mode not in MODES:
            raise InvalidInput(f"unknown mode {mode!r}; use {', '.join(MODES)}")
        if not (settle_s >= 0 and windows >= 1):
            raise InvalidInput(f"settle_s={settle_s}, windows={windows}: give at least 0 seconds and 1 window")
        self.tuner, self.guard, self.mode, self.settle_s = tuner, guard, mode, settle_s
        self._judge, self._generation, self._clock = judge, generation, clock
        self._windows, self._approve = windows, approve
        self._lock = threading.RLock()
        self.run: Run = "running"
        self.decisions: deque[Decision] = deque(maxlen=_KEPT)
        self.counts: Counter[str] = Counter()
        self._number = 0
        self._trial: Trial | None = None
        self._scores: list[Score] = []
        self._shift = Shift()
        self._in_force = generation()
        self._settled_s = clock.now_s() + settle_s
        self.shifts = 0
        self.recalled = 0
        self.waiting_for: Configuration | None = None  # approval

    # -- the step -----------------------------------------------------------------------------------------------------

    def step(self, reading: Reading) -> Decision:
        """Decide on one window."""
        with self._lock:
            self.counts["windows"] += 1
            if why := self._ignored(reading):
                self.counts["ignored"] += 1
                return self._decided("ignore", why)
            score = self._judge(reading)
            gain = score.value * (1.0 if self.tuner.direction == "maximize" else -1.0)
            violation = math.nan if score.failure else score.violation
            shifted = self._watch_load(reading)
            action = self.guard.observe(Judgement(gain=gain, violation=violation))
            if score.violation > 0:
                self.counts["violations"] += 1
            self._learn(score)
            if action == "rollback":
                self._drop_trial()
                self._changed()
                return self._decided("rollback", "worse than the last known good, which is in force again", score=score)
            if self.run != "running":
                return self._decided("hold", f"{self.run}", score=score)
            return self._propose(score, "the traffic has changed: " if shifted else "")

    def _ignored(self, reading: Reading) -> str | None:
        if not reading.generation:
            return "the configuration changed within the window"
        if reading.generation != self._in_force:
            return f"measured under {reading.generation}, in force is {self._in_force}"
        if reading.start_s < self._settled_s:
            return f"within the settle time of {self.settle_s:g} s after a change"
        if not (reading.finished > 0 or reading.failed > 0):
            return "no request ended, which says nothing about the configuration"
        return None

    def _watch_load(self, reading: Reading) -> bool:
        self._shift, shifted = observe_load(self._shift, reading.context, reading.finished + reading.failed)
        if not self.tuner.context:
            self.tuner.enter(reading.context)
        if shifted:
            self.shifts += 1
            self._drop_trial()
            known = self.tuner.enter(reading.context)
            self.recalled += known
            self.guard.rebase("the traffic has changed" + (", to a pattern that is known" if known else ""))
        return shifted

    def _learn(self, score: Score) -> None:
        """Tell the tuner what the values in force are worth, once enough windows have been seen."""
        self._scores.append(score)
        if len(self._scores) < self._windows:
            return
        mean, self._scores = _mean(self._scores), []
        if self._trial is not None and _same(self.guard.values, self._trial.values):
            self.tuner.tell(self._trial.id, mean)
            self._trial = None
        else:
            self.tuner.add({n: self.guard.values[n] for n in (k.name for k in self.tuner.space)}, mean, "on the way")

    def _propose(self, score: Score, prefix: str) -> Decision:
        if self._scores:
            return self._decided("wait", f"{len(self._scores)} of {self._windows} windows seen", score=score)
        if self._trial is None:
            self._trial = self.tuner.ask()
        trial = self._trial
        why = prefix + trial.why
        if self.mode == "shadow":
            self._drop_trial()
            self.guard.note({"shadow": dict(trial.values), "why": why})
            return self._decided("shadow", why, wish=trial.values, score=score)
        step = self.guard.reachable(trial.values)
        if _same(self.guard.values, step):
            if not _same(step, trial.values):
                self._drop_trial()
                return self._decided("wait", "the guard allows no move now", wish=trial.values, score=score)
            return self._decided("hold", why, wish=trial.values, score=score)
        if self._approve is not None:
            answer = self._approve(step, why)
            if answer is not True:
                self.waiting_for = step if answer is None else None
                self.counts["not_approved"] += answer is False
                if answer is False:
                    self._drop_trial()
                return self._decided("ask", f"waits for approval: {why}" if answer is None else f"not approved: {why}",
                                     wish=trial.values, score=score)  # fmt: skip
        self.waiting_for = None
        return self._apply(step, trial, why, score)

    def _apply(self, step: Mapping[str, Value], trial: Trial, why: str, score: Score) -> Decision:
        part = "" if _same(step, trial.values) else "; a step toward it, as far as the guard allows at once"
        verdict = self.guard.propose(step, why=why + part)
        if verdict.refusal is not None:
            self._drop_trial()
            return self._decided("refuse", f"{verdict.refusal.rule}: {verdict.refusal.reason}", wish=trial.values,
                                 proposal=verdict.proposal, score=score)  # fmt: skip
        self._changed()
        return self._decided("apply", why + part, wish=trial.values, proposal=verdict.proposal, score=score)

    def _changed(self) -> None:
        self._in_force = self._generation()
        self._settled_s = self._clock.now_s() + self.settle_s
        self._scores = []

    def _drop_trial(self) -> None:
        if self._trial is not None:
            self.tuner.give_up(self._trial.id)
            self._trial = None

    def _decided(self, action: Action, why: str, **more: Any) -> Decision:  # noqa: ANN401  # Decision's own fields
        self._number += 1
        self.counts[action] += 1
        decision = Decision(
            number=self._number, at_s=self._clock.now_s(), action=action, why=why, values=self.guard.values, **more
        )
        self.decisions.append(decision)
        return decision

    # -- commands -----------------------------------------------------------------------------------------------------

    def command(self, name: str) -> str:
        """pause, resume, stop, rollback, kill or safe; returns what it did. Raises InvalidInput for another."""
        with self._lock:
            if name not in _COMMANDS:
                raise InvalidInput(f"unknown command {name!r}; use {', '.join(_COMMANDS)}")
            self.counts[f"command:{name}"] += 1
            if name == "pause":
                self.run = "paused"
            elif name == "resume":
                self.guard.resume("resumed by hand")
                self.run = "running"
            elif name == "safe":
                self.guard.enter_safe_mode("by hand")
            else:
                return self._restore(name)
            return _COMMANDS[name]

    def _restore(self, name: str) -> str:
        self._drop_trial()
        if name == "rollback":
            done = self.guard.rollback("by hand")
            self._changed()
            return _COMMANDS[name] if done else "the last known good is in force already"
        self.run = "killed" if name == "kill" else "stopped"
        self.guard.stop(f"{self.run} by hand", restore=name == "kill")
        self._changed()
        return _COMMANDS[name]

    def explain(self, number: int) -> dict[str, Any]:
        """A decision by its number; raises InvalidInput for one that is not remembered."""
        for decision in self.decisions:
            if decision.number == number:
                return decision.describe()
        first = self.decisions[0].number if self.decisions else 0
        raise InvalidInput(f"decision {number} is not remembered; there are {first} to {self._number}, and the audit")

    def status(self) -> dict[str, Any]:
        """Everything at a glance, as plain data."""
        with self._lock:
            best, safe = self.tuner.best(), self.guard.safe
            return {
                "run": self.run, "mode": self.mode, "values": self.guard.values, "last_known_good": self.guard.good,
                "generation": self.guard.generation, "in_force": self._in_force,
                "safe_mode": None if safe is None else {"reason": safe.reason, "detail": safe.detail},
                "choice": self.tuner.choice.describe(), "context": list(self.tuner.context),
                "best": None if best is None else {"values": dict(best.values), "value": best.score.value},
                "waiting_for": None if self.waiting_for is None else dict(self.waiting_for),
                "counts": dict(self.counts), "guard": dict(self.guard.counts), "shifts": self.shifts,
                "recalled": self.recalled, "last": self.decisions[-1].describe() if self.decisions else None,
            }  # fmt: skip


_COMMANDS = {
    "pause": "nothing is proposed until resume; windows are still judged",
    "resume": "proposals go on",
    "safe": "safe mode, until resume",
    "rollback": "the last known good is in force",
    "stop": "nothing changes any more; what is in force stays",
    "kill": "nothing changes any more; what was in force at the start is again",
}
COMMANDS = tuple(_COMMANDS)


class Replicas:
    """Several replicas as one target: changed one after the other, the canary first, never all at once.

    `apply` of each replica drains and restarts it where the engine cannot change live. If one does not take a change,
    those changed before it get their old values back.
    """

    def __init__(self, apply: Sequence[Callable[[Configuration], object]], in_force: Configuration) -> None:
        if not apply:
            raise InvalidInput("there is no replica to hold; give at least one")
        self._apply = list(apply)
        self.values: list[dict[str, Value]] = [dict(in_force) for _ in apply]

    def set(self, changes: Configuration, *, canary: bool = False) -> None:
        """Change the first replica only, or all of them in turn."""
        done: list[int] = []
        for i in range(1 if canary else len(self._apply)):
            wanted = {n: v for n, v in changes.items() if self.values[i].get(n) != v}
            if not wanted:
                continue
            try:
                self._apply[i](wanted)
            except FlyballError:
                for j in reversed(done):
                    self._apply[j]({n: self.values[j][n] for n in changes})
                raise
            done.append(i)
        for i in done:
            self.values[i] |= changes


def _same(a: Mapping[str, Value], b: Mapping[str, Value]) -> bool:
    return all(
        math.isclose(float(a[n]), float(v), rel_tol=1e-9, abs_tol=1e-12)
        if isinstance(v, float) and isinstance(a[n], int | float) else a[n] == v
        for n, v in b.items()
    )  # fmt: skip


def _mean(scores: Sequence[Score]) -> Score:
    """The mean of several windows; it failed if one of them did."""
    if len(scores) == 1:
        return scores[0]
    if failed := next((s for s in scores if s.failure is not None), None):
        return failed
    count = len(scores)
    return Score(
        value=sum(s.value for s in scores) / count,
        margins={n: sum(s.margins[n] for s in scores) / count for n in scores[0].margins},
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
