"""The record of every decision on a live engine: an event for each input and each outcome, enough to decide it again.

An event is written before what it tells of happens, so that a crash leaves a line too many and never a change without
a line. Inputs are `start`, `proposal`, `window` and `command`; all others are outcomes, and `guard_replay.replay` gets
the same outcomes again from the inputs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, get_args

from flyball.core.errors import FlyballError, InvalidInput

Kind = Literal[
    "start", "proposal", "window", "command",  # what came in
    "apply", "apply_failed", "refusal", "rollback", "promote", "safe_enter", "safe_exit", "ignored", "decision",
]  # fmt: skip
INPUTS: tuple[Kind, ...] = ("start", "proposal", "window", "command")


class AuditUnwritable(FlyballError):
    """An event could not be made durable; nothing may change until one can."""


class Event(NamedTuple):
    """One line of the audit."""

    kind: Kind
    run: str  # one run of the holder, from its start to its end
    seq: int  # 1, 2, 3, ... within the run, without gaps
    at_s: float  # the monotonic clock that decided
    wall_s: float  # seconds since 1970, for people
    generation: int  # in force when the event was written
    data: Mapping[str, Any] = MappingProxyType({})

    def record(self) -> dict[str, Any]:
        """As plain data, the event's own fields first."""
        return {
            "kind": self.kind, "run": self.run, "seq": self.seq, "at_s": self.at_s, "wall_s": self.wall_s,
            "generation": self.generation, "data": dict(self.data),
        }  # fmt: skip

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Event:
        """From plain data; raises InvalidInput for what is no event."""
        try:
            event = cls(**record)
        except TypeError as error:
            raise InvalidInput(
                f"an audit line is no event ({error}); give an audit that `flyball hold` wrote"
            ) from None
        if event.kind not in get_args(Kind):
            raise InvalidInput(f"an audit line has the unknown kind {event.kind!r}; give an audit of this version")
        return event


class Audit(Protocol):
    """Where events go."""

    def append(self, events: Sequence[Event]) -> None:
        """Keep all of them or none; raises AuditUnwritable when they cannot be kept."""
        ...

    def healthy(self) -> bool:
        """Whether an event could be kept now."""
        ...


class MemoryAudit:
    """Keeps the latest events in memory: for simulations, tests and replays."""

    def __init__(self, keep: int | None = None) -> None:
        self._events: deque[Event] = deque(maxlen=keep)

    @property
    def events(self) -> list[Event]:
        """What is remembered, in order."""
        return list(self._events)

    def append(self, events: Sequence[Event]) -> None:
        """Keep them; the oldest are forgotten beyond the limit."""
        self._events.extend(events)

    def healthy(self) -> bool:
        """Memory always takes one more."""
        return True
