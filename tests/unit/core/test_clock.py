"""Clocks: virtual time moves when told, real time never goes back."""

from __future__ import annotations

import pytest

from flyball.core.clock import Clock, SystemClock, VirtualClock


def test_virtual_time_moves_only_when_told(clock: VirtualClock) -> None:
    """Nothing but `advance` moves it, and both of its readings agree."""
    assert clock.now_s() == clock.now_s() == 0
    clock.advance(2.5)
    clock.advance(0)
    assert clock.now_s() == clock.wall_s() == 2.5


def test_time_does_not_go_back(clock: VirtualClock) -> None:
    """A negative step is refused, not-a-number included."""
    for seconds in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="time only goes forward"):
            clock.advance(seconds)
    assert clock.now_s() == 0


def test_the_system_clock_is_monotonic() -> None:
    """Readings never fall; the wall clock counts from 1970."""
    clock: Clock = SystemClock()
    seen = [clock.now_s() for _ in range(1000)]
    assert seen == sorted(seen)
    assert clock.wall_s() > 1.7e9
