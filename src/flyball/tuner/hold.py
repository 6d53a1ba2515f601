"""Holding a live service in tune: observe, judge, propose, guard, apply, settle, measure; one step a window.

`Holder.step` takes one reading and returns what was decided, with its reason. Whatever it wants passes the guard; a
wish that is farther than the guard allows is approached in steps, each measured. Windows that straddle a change, were
measured under another generation or fall into the settle time are ignored.

It explores while a promise is in danger or broken. Otherwise it rests, and a trial is one small step at a stated rate,
taken back unless it is clearly better (`enough.Enough`). Traffic that has changed is answered with what was best under
it before; where nothing is known, a small trial falls due.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from flyball.core.clock import Clock
from flyball.core.errors import FlyballError, InvalidInput
from flyball.core.knobs import Configuration, Value
from flyball.tuner.drift import Shift
from flyball.tuner.drift import observe as observe_load
from flyball.tuner.enough import Enough, Lately, LeftAlone
from flyball.tuner.guard import Guard
from flyball.tuner.guard_baseline import Judgement
from flyball.tuner.hold_reading import Reading
from flyball.tuner.objective import Score
from flyball.tuner.online.tuner import OnlineTuner, Trial

Mode = Literal["shadow", "canary", "full"]
Run = Literal["running", "paused", "stopped", "killed"]
Action = Literal["apply", "wait", "ignore", "refuse", "rollback", "shadow", "ask", "hold", "rest"]
MODES: tuple[Mode, ...] = get_args(Mode)

_TRIES = 4  # asks for a trial that is not in force already
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
        enough: Enough = Enough(),  # noqa: B008  # frozen
    ) -> None:
        if mode not in MODES:
            raise InvalidInput(f"unknown mode {mode!r}; use {', '.join(MODES)}")
        if not (settle_s >= 0 and windows >= 1):
            raise InvalidInput(f"settle_s={settle_s}, windows={windows}: give at least 0 seconds and 1 window")
        self.tuner, self.guard, self.mode, self.settle_s = tuner, guard, mode, settle_s
        self._judge, self._generation, self._clock = judge, generation, clock
        self._windows, self._approve, self.enough = windows, approve, enough
        self._lately = Lately(enough)
        self._left = LeftAlone(enough.leave)
        self._recall: Configuration | None = None  # was best under this traffic before, and is on its way
        self._rested = 0  # windows since the last trial
        self._small: dict[str, Value] | None = None  # in force before the small trial that is being measured
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
            before = self.guard.values
            action = self.guard.observe(Judgement(gain=gain, violation=violation))
            if score.violation > 0:
                self.counts["violations"] += 1
            self._learn(score)
            self._lately.see(score)
            if action == "rollback":
                self._left.leave(self.guard.values, before, self.counts["windows"])
                self._over()
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
            self._lately.clear()
            self._left.clear()
            known = self.tuner.enter(reading.context)
            self.recalled += known
            best = self.tuner.best() if known else None
            self._recall = None if best is None else best.values
            self._rested = self.enough.explore_every
            self.guard.rebase("the traffic has changed" + (", to a pattern that is known" if known else ""))
        return shifted

    def _learn(self, score: Score) -> None:
        """Tell the tuner what the values in force are worth, once enough windows have been seen."""
        self._scores.append(score)
        if len(self._scores) < self._windows:
            return
        mean, self._scores = self._with_room(_mean(self._scores)), []
        if self._trial is not None and _same(self.guard.values, self._trial.values):
            self.tuner.tell(self._trial.id, mean)
            self._trial = None
        else:
            self.tuner.add({n: self.guard.values[n] for n in (k.name for k in self.tuner.space)}, mean, "on the way")

    def _with_room(self, score: Score) -> Score:
        """Promises as the tuner is to keep them: with room, unless we never rest."""
        if self.enough.explore_every == 1:
            return score
        return replace(score, margins={n: m + self.enough.room for n, m in score.margins.items()})

    def _propose(self, score: Score, prefix: str) -> Decision:
        if self._scores:
            return self._decided("wait", f"{len(self._scores)} of {self._windows} windows seen", score=score)
        if self._small is not None:
            return self._weigh(self._small, score)
        danger, always = self._lately.danger(), self.enough.explore_every == 1
        small = danger is None and not always
        if self._recall is not None and (danger or self.enough.explore_every):
            return self._answer(self._recall, prefix, score)
        if small and (why := self._resting()):
            self._drop_trial()
            if self._lately.full and self.decisions[-1].action != "rest":
                self.guard.note({"rest": why})
            return self._decided("rest" if self._lately.full else "wait", why, score=score)
        trial = self._trial = self._trial or self._ask(always=always)
        cause = "" if always else f"{danger}: " if danger else "a small trial at rest: "
        why = f"{prefix}{cause}{trial.why}"
        if self.mode == "shadow":
            return self._shadow(trial, why, score)
        now = self.guard.values
        step = self.guard.reachable(trial.values, self.enough.step if small else math.inf)
        step = self._left.without(now, step, self.counts["windows"])
        if _same(now, step):
            if _same(now, trial.values):
                self._rested = 0
                return self._decided("hold", why, wish=trial.values, score=score)
            self._over()
            return self._decided("wait", "the guard allows no move now, or it did no good lately", wish=trial.values,
                                 score=score)  # fmt: skip
        if waits := self._waits_for_approval(step, trial, why, score):
            return waits
        return self._apply(step, trial, why, score, small=small)

    def _ask(self, *, always: bool) -> Trial:
        """The next trial; what is in force is measured anyway, so another is asked for, unless it stays at that."""
        trial = self.tuner.ask()
        for _ in range(0 if always else _TRIES):
            if not _same(self.guard.values, trial.values):
                break
            self.tuner.give_up(trial.id)
            trial = self.tuner.ask()
        return trial

    def _shadow(self, trial: Trial, why: str, score: Score) -> Decision:
        """What would be tried, and is not."""
        self._over()
        self.guard.note({"shadow": dict(trial.values), "why": why})
        return self._decided("shadow", why, wish=trial.values, score=score)

    def _answer(self, known: Configuration, prefix: str, score: Score) -> Decision:
        """Traffic that is known: what was best under it, in steps."""
        self._drop_trial()
        trial = Trial(0, known, f"{prefix}what was best under this traffic before")
        step = self.guard.reachable(known)
        if self.mode == "shadow":
            return self._shadow(trial, trial.why, score)
        if _same(self.guard.values, step):
            self._recall = None
            return self._decided("hold", trial.why, wish=known, score=score)
        if waits := self._waits_for_approval(step, trial, trial.why, score):
            return waits
        return self._apply(step, trial, trial.why, score, small=False)

    def _resting(self) -> str | None:
        """Why nothing is tried now, though it could be; None if a small trial is due."""
        self._rested += 1
        due = self.enough.explore_every and self._rested >= self.enough.explore_every
        if due and self._lately.full and not self.guard.trying:
            return None
        return f"{self._lately}" + ("" if self._lately.full else f" of {self.enough.windows}")

    def _weigh(self, before: dict[str, Value], score: Score) -> Decision:
        """A small trial is in force: stay with what is clearly better, else go back; room is not given for it."""
        baseline = self.guard.baseline
        danger = self._lately.danger()
        if danger is None and not self._lately.full:
            return self._decided("wait", f"a small trial is measured: {self._lately} of {self.enough.windows}",
                                 score=score)  # fmt: skip
        better = baseline.good.mean + 2.0 * baseline.good.deviation / math.sqrt(self.enough.windows)
        if danger is None and baseline.trial.mean > better:
            self._small = None
            return self._decided("rest", "the small trial did better, and stays", score=score)
        why = f"back from a small trial: {danger or 'it did no better'}"
        tried, back = self.guard.values, self.guard.reachable(before)
        verdict = self.guard.propose(back, why=why)
        if verdict.refusal is not None:
            return self._decided("refuse", f"{verdict.refusal.rule}: {verdict.refusal.reason}", wish=before,
                                 proposal=verdict.proposal, score=score)  # fmt: skip
        self._left.leave(back, tried, self.counts["windows"] + 2 * self.enough.explore_every)
        self._small = None if _same(back, before) else before
        self._changed()
        return self._decided("apply", why, proposal=verdict.proposal, score=score)

    def _waits_for_approval(self, step: Configuration, trial: Trial, why: str, score: Score) -> Decision | None:
        """What a person has not approved yet, or not at all; None if the step may be made."""
        answer = True if self._approve is None else self._approve(step, why)
        self.waiting_for = step if answer is None else None
        if answer is None:
            return self._decided("ask", f"waits for approval: {why}", wish=trial.values, score=score)
        if answer:
            return None
        self.counts["not_approved"] += 1
        self._over()
        return self._decided("ask", f"not approved: {why}", wish=trial.values, score=score)

    def _apply(self, step: Configuration, trial: Trial, why: str, score: Score, *, small: bool) -> Decision:
        part = "" if _same(step, trial.values) else "; a step toward it, as far as the guard allows at once"
        before = self.guard.values
        verdict = self.guard.propose(step, why=why + part)
        if verdict.refusal is not None:
            if verdict.refusal.knob is not None or verdict.refusal.rule == "engine":
                self._left.leave(before, step, self.counts["windows"])
            self._over()
            return self._decided("refuse", f"{verdict.refusal.rule}: {verdict.refusal.reason}", wish=trial.values,
                                 proposal=verdict.proposal, score=score)  # fmt: skip
        if small:  # a single step, whatever the wish
            self._drop_trial()
            self._small = before
        self._rested = 0
        self._changed()
        return self._decided("apply", why + part, wish=trial.values, proposal=verdict.proposal, score=score)

    def _changed(self) -> None:
        self._in_force = self._generation()
        self._settled_s = self._clock.now_s() + self.settle_s
        self._scores = []
        self._lately.clear()

    def _over(self) -> None:
        """Nothing more is tried toward this wish."""
        self._drop_trial()
        self._recall, self._rested = None, 0

    def _drop_trial(self) -> None:
        self._small = None
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
