"""An audit decided again: the same inputs through a new guard must lead to the same outcomes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from flyball.core.errors import EngineFailed, InvalidInput
from flyball.core.knobs import Configuration, Knob, Space
from flyball.tuner.audit import INPUTS, Event, MemoryAudit
from flyball.tuner.guard import Guard
from flyball.tuner.guard_baseline import Judgement
from flyball.tuner.guard_limits import from_config


class _RecordedClock:
    """Shows the time at which each recorded input came."""

    def __init__(self) -> None:
        self.event: Event | None = None

    def now_s(self) -> float:
        return self.event.at_s if self.event else 0.0

    def wall_s(self) -> float:
        return self.event.wall_s if self.event else 0.0


class _Foreign:
    """Something that was proposed and is no value; only its text was kept."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def replay(recorded: Sequence[Event]) -> list[Event]:
    """All events of one run, decided again from its inputs.

    Where the recorded engine did not take a change, the replayed one does not either. Raises InvalidInput for a record
    that does not open with the start of a run.
    """
    if not recorded or recorded[0].kind != "start":
        raise InvalidInput("the audit does not open with the start of a run; give it whole, one run at a time")
    clock, audit = _RecordedClock(), MemoryAudit()
    clock.event = recorded[0]
    data = recorded[0].data
    space = Space(tuple(Knob(**{**k, "choices": tuple(k["choices"])}) for k in data["knobs"]))
    failing: list[str] = []

    def apply(_: Configuration) -> None:
        if failing:
            raise EngineFailed(failing.pop(0))

    guard = Guard(
        space, data["values"], apply=apply, limits=from_config(data["limits"], space), audit=audit, clock=clock,
        run=recorded[0].run,
    )  # fmt: skip
    for index, event in enumerate(recorded[1:], start=1):
        clock.event = event
        if event.kind == "decision":
            guard.note(event.data)
        elif event.kind in INPUTS:
            failing[:] = _failures(recorded, index)
            _feed(guard, event)
    return audit.events


def first_difference(recorded: Sequence[Event], replayed: Sequence[Event]) -> str | None:
    """Where two records of one run part, in words; None if they are the same."""
    for a, b in zip(recorded, replayed, strict=False):
        if _written(a) != _written(b):
            return f"event {a.seq}: recorded {a.record()}, replayed {b.record()}"
    if len(recorded) != len(replayed):
        return f"{len(recorded)} events were recorded, {len(replayed)} replayed"
    return None


def _written(event: Event) -> str:
    """As in a file, where a tuple is a list; the order of knobs says nothing."""
    return json.dumps(event.record(), sort_keys=True)


def _failures(recorded: Sequence[Event], index: int) -> list[str]:
    """What the engine said when it did not take a change, until the next input."""
    said = []
    for event in recorded[index + 1 :]:
        if event.kind in INPUTS:
            break
        if event.kind == "apply_failed":
            said.append(str(event.data["error"]))
    return said


def _feed(guard: Guard, event: Event) -> None:
    data = event.data
    if event.kind == "proposal":
        guard.propose(_restored(data["values"]), why=data["why"], if_generation=data["if_generation"])
    elif event.kind == "window":
        gain, violation = float(_restored(data["gain"])), float(_restored(data["violation"]))
        guard.observe(Judgement(gain=gain, violation=violation), generation=data["of"])
    else:
        guard.command(data)


def _restored(plain: Any) -> Any:  # noqa: ANN401  # what was proposed can be anything
    if isinstance(plain, Mapping):
        if set(plain) == {"not_finite"}:
            return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[plain["not_finite"]]
        if set(plain) == {"foreign"}:
            return _Foreign(plain["foreign"])
        return {name: _restored(value) for name, value in plain.items()}
    if isinstance(plain, list):
        return [_restored(value) for value in plain]
    return plain
