"""Ask and tell for a live service: any order, late, failed or twice; bounded in memory, and reproducible.

Inside, cost is minimised; `direction` says which way the user's number goes. Constraints are margins of their own
(above 0: broken), so that a trial which breaks one is never the best, whatever its number. Equal seeds and equal tells
give equal proposals, in any process.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np

from flyball.core.errors import InvalidInput
from flyball.core.knobs import Configuration, Knob, Space, Value
from flyball.core.metrics import MetricsWindow
from flyball.tuner.objective import MARGIN_CAP, Score
from flyball.tuner.online import state
from flyball.tuner.online.bayes import Bayes
from flyball.tuner.online.choice import Choice, Proposer, choose, make
from flyball.tuner.online.cube import Cube, Matrix, Vector
from flyball.tuner.online.memory import SAME, Context, ContextMemory, distance
from flyball.tuner.online.points import Seen

Direction = Literal["minimize", "maximize"]
Told = Literal["used", "duplicate", "late"]

_PENDING = 1024  # trials that may be open at once; the oldest beyond are given up
_LEGAL_TRIES = 64


@dataclass(frozen=True, slots=True)
class Failure:
    """A trial that measured nothing."""

    why: str


Result = float | Score | MetricsWindow | Failure


@dataclass(frozen=True, slots=True)
class Trial:
    """A configuration to be measured, and why it was chosen."""

    id: int
    values: Configuration
    why: str


@dataclass(frozen=True, slots=True)
class Finished:
    """A trial with what it was worth, in the user's own direction."""

    id: int  # 0: told without having been asked for
    values: Configuration
    why: str
    score: Score


class OnlineTuner:
    """Proposes configurations for a live service and learns from what they did.

    >>> space = Space((Knob(name="x", kind="float", default=0.0, low=-5.0, high=5.0),))
    >>> tuner = OnlineTuner(space, direction="minimize", seed=1)
    >>> for _ in range(30):
    ...     trial = tuner.ask()
    ...     _ = tuner.tell(trial.id, (trial.values["x"] - 2) ** 2)
    >>> round(tuner.best().values["x"], 3)
    2.0
    """

    def __init__(
        self,
        space: Space,
        *,
        direction: Direction = "minimize",
        seed: int = 0,
        proposer: str = "auto",
        constraints: Sequence[str] = (),
        relations: Sequence[Callable[[Configuration], bool]] = (),
        start: Configuration | None = None,
        catalogue: Sequence[Configuration] = (),
        context: int = 0,
        periodic: Sequence[str] = (),
        judge: Callable[[MetricsWindow], Score] | None = None,
        keep: int = 1000,
    ) -> None:
        if direction not in ("minimize", "maximize"):
            raise InvalidInput(f"unknown direction {direction!r}; use minimize or maximize")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise InvalidInput(f"the seed is {seed!r}; give a whole number of at least 0")
        self.space = space
        self.direction: Direction = direction
        self.constraints = tuple(constraints)
        self._sign = 1.0 if direction == "minimize" else -1.0
        self._seed, self._start, self._catalogue = seed, start, tuple(catalogue)
        self._relations, self._judge = tuple(relations), judge
        self._cube = Cube(space, periodic)
        self._rng = np.random.default_rng([seed, 1])
        self.choice: Choice = choose(proposer, self._cube, variants=len(self._catalogue), context=context)
        self._regime = 0
        self._proposer = self._new(start)
        self._memory: ContextMemory[Proposer] = ContextMemory()
        self.context: Context = ()
        self._asked = 0
        self.told = 0
        self._pending: dict[int, tuple[Trial, Vector, int]] = {}
        self._late: deque[int] = deque(maxlen=_PENDING)
        self._history: deque[Finished] = deque(maxlen=keep)

    @classmethod
    def from_config(cls, config: str | Mapping[str, Any], **options: Any) -> OnlineTuner:  # noqa: ANN401  # as __init__
        """A tuner from JSON or a mapping: `knobs` {name: {kind, low, high, log, choices, default}} and any option.

        Raises InvalidInput for an unknown key.
        """
        try:
            given = dict(json.loads(config) if isinstance(config, str) else config)
            knobs = dict(given.pop("knobs"))
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidInput(f"cannot read the tuner's settings ({error!r}); give a JSON object with knobs") from None
        known = ("direction", "seed", "proposer", "constraints", "start", "catalogue", "context", "periodic", "keep")
        if unknown := [key for key in given if key not in known]:
            raise InvalidInput(f"unknown key {', '.join(map(repr, unknown))}; known: knobs, {', '.join(known)}")
        return cls(Space(tuple(_knob(name, k) for name, k in knobs.items())), **(given | options))

    # -- ask ----------------------------------------------------------------------------------------------------------

    @overload
    def ask(self, n: None = None) -> Trial: ...
    @overload
    def ask(self, n: int) -> list[Trial]: ...
    def ask(self, n: int | None = None) -> Trial | list[Trial]:
        """The next trial, or the next n; concurrent ones all differ, as far as the space has so many points."""
        if n is None:
            return self._ask()
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InvalidInput(f"{n!r} trials were asked for; ask for 1 or more")
        return [self._ask() for _ in range(n)]

    def _ask(self) -> Trial:
        pending = self._open()
        u, why = self._proposer.ask(pending)
        values = self._cube.values(u)
        if self._relations and not self._legal(values):
            u, why = self._nearest_legal(u, pending), f"{why}; the nearest that keeps every relation"
            values = self._cube.values(u)
        self._asked += 1
        trial = Trial(self._asked, values, why)
        self._pending[trial.id] = (trial, u, self._regime)
        if len(self._pending) > _PENDING:
            oldest = next(iter(self._pending))
            del self._pending[oldest]
            self._late.append(oldest)
        return trial

    def _open(self) -> Matrix:
        if not self._pending:
            return np.empty((0, self._cube.size))
        return np.array([u for _, u, _ in self._pending.values()])

    def _legal(self, values: Configuration) -> bool:
        return all(holds(values) for holds in self._relations)

    def _nearest_legal(self, u: Vector, pending: Matrix) -> Vector:
        reach = np.repeat([0.05, 0.2, 0.5, 1.0], _LEGAL_TRIES // 4)[:, None]
        around = self._cube.snap(u + reach * self._rng.standard_normal((_LEGAL_TRIES, self._cube.size)))
        for candidate in around:
            taken = len(pending) and bool((pending == candidate).all(axis=1).any())
            if not taken and self._legal(self._cube.values(candidate)):
                return np.asarray(candidate)
        for candidate in self._proposer.points.u[: self._proposer.points.n]:
            if self._legal(self._cube.values(candidate[: self._cube.size])):
                return np.array(candidate[: self._cube.size])
        raise InvalidInput("no configuration that keeps every relation was found; widen the knobs or relax a relation")

    # -- tell ---------------------------------------------------------------------------------------------------------

    def tell(self, trial_id: int, result: Result) -> Told:
        """What a trial was worth: its number, a judged score, a window (with `judge`), or that it failed.

        "duplicate": it was told before; "late": it was given up meanwhile, or asked for before the world changed. Both
        change nothing. Raises InvalidInput for a trial that was never asked for.
        """
        found = self._pending.pop(trial_id, None)
        if found is None:
            if not 1 <= trial_id <= self._asked:
                raise InvalidInput(f"there is no trial {trial_id}; {self._asked} were asked for, from 1 on")
            return "late" if trial_id in self._late else "duplicate"
        trial, u, regime = found
        score = self._score(result)
        self._history.append(Finished(trial.id, trial.values, trial.why, score))
        self.told += 1
        if regime != self._regime:
            return "late"
        self._proposer.tell(self._seen(u, score))
        return "used"

    def add(self, values: Configuration, result: Result, why: str = "told unasked") -> None:
        """A measurement that nobody asked for; if a pending trial has these values, it is told."""
        u = self._cube.point(values)
        for trial, at, _ in self._pending.values():
            if trial.values == values or (at == u).all():
                self.tell(trial.id, result)
                return
        score = self._score(result)
        self._history.append(Finished(0, dict(values), why, score))
        self.told += 1
        self._proposer.tell(self._seen(u, score))

    def give_up(self, trial_id: int) -> None:
        """A trial will not be measured; told nevertheless, it is late."""
        if self._pending.pop(trial_id, None) is not None:
            self._late.append(trial_id)

    def _score(self, result: Result) -> Score:
        if isinstance(result, MetricsWindow):
            if self._judge is None:
                raise InvalidInput("a window was told to a tuner that has no judge; give judge=, or tell a Score")
            result = self._judge(result)
        if isinstance(result, Failure):
            return Score(value=math.nan, margins=dict.fromkeys(self.constraints, MARGIN_CAP), failure=result.why)
        if isinstance(result, Score):
            if missing := [name for name in self.constraints if name not in result.margins]:
                raise InvalidInput(f"the result lacks the margin of {', '.join(missing)}; give one for each constraint")
            if result.failure is None and not all(map(math.isfinite, (result.value, *result.margins.values()))):
                return Score(value=math.nan, margins=result.margins, failure=f"a number of {result} is not finite")
            return result
        if isinstance(result, bool) or not isinstance(result, int | float):
            raise InvalidInput(f"a trial was told {result!r}; tell a number, a Score, a window or a Failure")
        if not math.isfinite(result):
            return self._score(Failure(f"its number is {result}"))
        if self.constraints:
            raise InvalidInput(f"the constraints {', '.join(self.constraints)} need margins; tell a Score")
        return Score(value=float(result), margins={})

    def _seen(self, u: Vector, score: Score) -> Seen:
        margins = tuple(min(float(score.margins.get(n, 0.0)), MARGIN_CAP) for n in self.constraints)
        if score.failure is not None:
            return Seen(u, 0.0, tuple(MARGIN_CAP for _ in self.constraints), failed=True)
        return Seen(u, self._sign * score.value, margins)

    # -- the world ----------------------------------------------------------------------------------------------------

    def enter(self, context: Sequence[float]) -> bool:
        """The traffic is now like this; True if what was learnt under the same before is in use again."""
        new = tuple(float(x) for x in context)
        if not all(math.isfinite(x) and x >= 0 for x in new):
            raise InvalidInput(f"the context {new} has an entry that is no positive number; give rates and lengths")
        if isinstance(self._proposer, Bayes):
            self._proposer.enter([math.log(max(x, 1e-3)) for x in new])
            self.context = new
            return False
        old, self.context = self.context, new
        if not old or distance(old, new) <= SAME:
            return False
        self._memory.keep(old, self._proposer)
        self._regime += 1
        known = self._memory.recall(new)
        if known is not None and known is not self._proposer:
            self._proposer = known
            known.recheck()
            return True
        best = self.best()
        self._proposer = self._new(best.values if best is not None else self._start)
        return False

    def changed(self) -> None:
        """The world has changed under the same traffic: the incumbent is measured anew, all else forgotten."""
        self._proposer.forget()
        self._regime += 1

    def _new(self, start: Configuration | None) -> Proposer:
        at = None if start is None else self._cube.point(start)
        return make(
            self.choice, self._cube, seed=self._seed + self._regime, constraints=len(self.constraints), start=at,
            catalogue=self._catalogue,
        )  # fmt: skip

    # -- what is known ------------------------------------------------------------------------------------------------

    def best(self) -> Finished | None:
        """The incumbent with its mean over repeats; None while nothing kept every promise."""
        row, points = self._proposer.incumbent, self._proposer.points
        if row is None or points.failed[row] or (points.y[row, 1:] > 0).any():
            return None
        margins = {name: float(m) for name, m in zip(self.constraints, points.y[row, 1:], strict=True)}
        score = Score(value=self._sign * float(points.y[row, 0]), margins=margins)
        return Finished(0, self._cube.values(points.u[row, : self._cube.size]), "the incumbent", score)

    @property
    def deviation(self) -> float:
        """Standard deviation of one measurement, as far as repeats have shown it."""
        return math.sqrt(self._proposer.points.noise)

    def history(self) -> list[Finished]:
        """The latest finished trials, oldest first."""
        return list(self._history)

    @property
    def pending(self) -> list[Trial]:
        """Trials that are being measured."""
        return [trial for trial, _, _ in self._pending.values()]

    # -- saving -------------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """All that is needed to go on exactly so: plain data. Relations and judge are code, and given again."""
        return {
            "format": "flyball.online/1",
            "options": {
                "direction": self.direction, "seed": self._seed, "proposer": self.choice.asked_for,
                "constraints": list(self.constraints), "start": dict(self._start) if self._start else None,
                "catalogue": [dict(v) for v in self._catalogue], "context": self.choice.context,
                "periodic": [k.name for k, p in zip(self._cube.knobs, self._cube.periodic, strict=True) if p],
                "keep": self._history.maxlen,
            },
            "knobs": {k.name: {"kind": k.kind, "low": k.low, "high": k.high, "log": k.log, "choices": list(k.choices),
                               "default": k.default} for k in self.space},
            "proposer": state.attributes(self._proposer),
            "memory": [[list(c), state.attributes(p)] for c, p in self._memory.entries],
            "rest": state.save({
                "asked": self._asked, "told": self.told, "regime": self._regime, "context": self.context,
                "random": self._rng, "late": list(self._late),
                "pending": [(t.id, u, regime, t.why) for t, u, regime in self._pending.values()],
                "history": [(f.id, dict(f.values), f.why, f.score.value, dict(f.score.margins), f.score.failure)
                            for f in self._history],
            }),
        }  # fmt: skip

    @classmethod
    def load(
        cls,
        saved: Mapping[str, Any],
        *,
        relations: Sequence[Callable[[Configuration], bool]] = (),
        judge: Callable[[MetricsWindow], Score] | None = None,
    ) -> OnlineTuner:
        """A tuner that goes on from what was saved."""
        if saved.get("format") != "flyball.online/1":
            raise InvalidInput(f"the saved tuner has the format {saved.get('format')!r}; give what `save` wrote")
        tuner = cls.from_config({"knobs": saved["knobs"], **saved["options"]}, relations=relations, judge=judge)
        state.put_back(tuner._proposer, saved["proposer"])
        for context, attributes in saved["memory"]:
            other = tuner._new(None)
            state.put_back(other, attributes)
            tuner._memory.entries.append((tuple(context), other))
        rest = state.load(saved["rest"])
        tuner._asked, tuner.told, tuner._regime = rest["asked"], rest["told"], rest["regime"]
        tuner.context, tuner._rng = rest["context"], rest["random"]
        tuner._late.extend(rest["late"])
        for number, u, regime, why in rest["pending"]:
            tuner._pending[number] = (Trial(number, tuner._cube.values(u), why), u, regime)
        for number, values, why, value, margins, failure in rest["history"]:
            score = Score(value=value, margins=margins, failure=failure)
            tuner._history.append(Finished(number, values, why, score))
        return tuner


def _knob(name: str, given: object) -> Knob:
    if isinstance(given, Knob):
        return given
    if not isinstance(given, Mapping):
        raise InvalidInput(f'the knob {name} is {given!r}; give an object such as {{"low": 1, "high": 64}}')
    known = ("kind", "low", "high", "log", "choices", "default", "doc")
    if unknown := [key for key in given if key not in known]:
        raise InvalidInput(f"the knob {name} has the unknown key {unknown[0]!r}; known: {', '.join(known)}")
    fields = dict(given) | {"choices": tuple(given.get("choices", ()))}
    fields.setdefault("kind", "choice" if fields["choices"] else "float")
    if fields.get("default") is None:
        fields["default"] = _default(fields)
    return Knob(name=name, **fields)


def _default(fields: Mapping[str, Any]) -> Value:
    kind = fields["kind"]
    if kind == "bool":
        return False
    if kind == "choice":
        return str(fields["choices"][0]) if fields["choices"] else ""
    low = fields.get("low") or 0
    return int(low) if kind == "int" else float(low)
