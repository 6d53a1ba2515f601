"""Every error that Flyball raises on purpose.

FlyballError
├── InvalidInput              a value that cannot be used: a file, an option, a field (also a ValueError)
│   ├── InvalidKnob           a knob unknown, of the wrong type or out of its bounds
│   └── VersionConflict       the configuration changed since the caller read it
├── RequestRefused            the engine will not take this request
│   ├── ContextLengthExceeded it can never fit
│   └── QueueFull             not now: retry later
├── MissingExtra              a part is not installed; says which extra to install
├── EngineFailed              an engine did not start, died, or did not answer; `kind` says which
├── ObservationFailed         a fleet's metrics cannot be read now
├── ActuationFailed           a cluster refused what was asked of it
└── Infeasible                no answer meets what was asked

A message says what was given, what is needed and what to do.
"""

from typing import Literal

FailureKind = Literal["start", "out of memory", "crash", "timeout", "refused", "unreachable"]


class FlyballError(Exception):
    """Root of every error this package raises on purpose."""


class InvalidInput(FlyballError, ValueError):
    """A value from the user that cannot be used."""


class InvalidKnob(InvalidInput):
    """A knob that is unknown, of the wrong type, or out of its bounds."""


class VersionConflict(InvalidInput):
    """The configuration changed since the caller read it."""


class RequestRefused(FlyballError):
    """The engine will not take this request."""


class ContextLengthExceeded(RequestRefused):
    """A request that could never fit, however long it waited."""


class QueueFull(RequestRefused):
    """Too much is waiting already; the request may be sent again later."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s  # until there is likely to be room


class MissingExtra(FlyballError):
    """A part of Flyball that is not installed."""


class EngineFailed(FlyballError):
    """An engine did not start, died, or did not answer."""

    def __init__(self, message: str, *, kind: FailureKind | None = None, evidence: str = "") -> None:
        super().__init__(message)
        self.kind = kind  # start: ended before it was ready; timeout: never ready; None: nobody looked
        self.evidence = evidence  # the line of the engine's log that gave it away


class ObservationFailed(FlyballError):
    """A fleet's metrics cannot be read now; whoever decides keeps the last decision."""


class ActuationFailed(FlyballError):
    """A cluster refused what was asked of it."""


class Infeasible(FlyballError):
    """No answer meets what was asked."""
