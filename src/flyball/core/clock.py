"""The only source of time. Everything else is handed a clock, so that a test or a simulation owns its time."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds that never go back, and the wall time for records that people read."""

    def now_s(self) -> float:
        """Monotonic seconds from an arbitrary origin."""
        ...

    def wall_s(self) -> float:
        """Seconds since 1970, for records only; it can jump."""
        ...


class SystemClock:
    """The machine's own clock."""

    def now_s(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    def wall_s(self) -> float:
        """Seconds since 1970."""
        return time.time()


class VirtualClock:
    """A clock that moves only when told.

    >>> clock = VirtualClock()
    >>> clock.advance(1.5)
    >>> clock.now_s()
    1.5
    """

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now_s(self) -> float:
        """Virtual seconds."""
        return self._now_s

    def wall_s(self) -> float:
        """Virtual seconds as well: nothing here is real."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move forward; time never goes back."""
        if not seconds >= 0:  # so written, NaN fails too
            raise ValueError(f"cannot move a clock by {seconds} s; time only goes forward")
        self._now_s += seconds
