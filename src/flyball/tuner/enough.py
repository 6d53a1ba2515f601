"""When a service does well enough to be left alone, and which moves are left for a while after they did no good.

Exploring costs requests, so a holder rests while every promise is kept with room to spare. `Lately` judges that by the
mean margin of each promise over the last windows under what is in force: one noisy window alone ends no rest, a breach
of more than the room that the others had does at once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from flyball.core.errors import InvalidInput
from flyball.core.knobs import Configuration, Value
from flyball.tuner.objective import Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Enough:
    """See the module."""

    room: float = 0.10  # share of its limit that every promise must have to spare
    windows: int = 3  # over which that is judged
    explore_every: int = 25  # windows from one small trial to the next at rest; 0: none; 1: never rest
    step: float = 0.05  # of a knob's range: the largest move of a trial at rest
    leave: int = 10  # windows in which a knob is not moved on in a direction that was refused or did worse

    def __post_init__(self) -> None:
        if not (0 <= self.room < 1 and 0 < self.step <= 1):
            raise InvalidInput(f"room={self.room}, step={self.step}: give a room of 0 to below 1, a step up to 1")
        if not (self.windows >= 1 and self.explore_every >= 0 and self.leave >= 0):
            raise InvalidInput(
                f"windows={self.windows}, explore_every={self.explore_every}, leave={self.leave}: give at least 1 "
                "window, and no number below 0"
            )


class Lately:
    """The last windows under what is in force."""

    def __init__(self, enough: Enough) -> None:
        self._enough = enough
        self._seen: deque[Score] = deque(maxlen=enough.windows)

    def see(self, score: Score) -> None:
        """One more window."""
        self._seen.append(score)

    def clear(self) -> None:
        """Something else is in force, or the traffic has changed."""
        self._seen.clear()

    @property
    def full(self) -> bool:
        """Whether enough windows were seen to rest on."""
        return len(self._seen) == self._enough.windows

    def danger(self) -> str | None:
        """Which promise has too little room, in words; None while all have enough.

        >>> lately = Lately(Enough())
        >>> lately.see(Score(value=1.0, margins={"p95_ttft<1s": -0.04}))
        >>> lately.danger()
        'p95_ttft<1s has 4% to spare, less than 10%'
        """
        if failure := next((s.failure for s in self._seen if s.failure), None):
            return failure
        margins = {n: [s.margins.get(n, math.inf) for s in self._seen] for s in self._seen for n in s.margins}
        means = {name: sum(all_) / len(all_) for name, all_ in margins.items()}
        worst = max(means, key=lambda name: means[name], default=None)
        if worst is None or means[worst] <= -self._enough.room:
            return None
        if means[worst] > 0:
            return f"{worst} is broken by {means[worst]:.0%}"
        return f"{worst} has {-means[worst]:.0%} to spare, less than {self._enough.room:.0%}"

    def __str__(self) -> str:
        """What there is, in words."""
        seen = f"{len(self._seen)} window{'s' if len(self._seen) > 1 else ''}"
        kept = "every promise kept" if any(s.margins for s in self._seen) else "no promise was given"
        return f"{kept} with at least {self._enough.room:.0%} to spare over {seen}"


class LeftAlone:
    """Directions of knobs that are not moved on in for a while."""

    def __init__(self, windows: int) -> None:
        self._windows = windows
        self._until: dict[tuple[str, bool], int] = {}

    def leave(self, before: Configuration, after: Configuration, now: int) -> None:
        """A move was refused or did worse: do not repeat it for some windows from this one."""
        for name, value in after.items():
            if value != before[name]:
                self._until[name, _up(before[name], value)] = now + self._windows

    def without(self, current: Configuration, wish: Mapping[str, Value], now: int) -> dict[str, Value]:
        """The wish without the moves that are left."""
        return {
            name: value if value == current[name] or now >= self._until.get((name, _up(current[name], value)), 0)
            else current[name]
            for name, value in wish.items()
        }  # fmt: skip

    def clear(self) -> None:
        """The traffic has changed: what did worse may do better now."""
        self._until.clear()


def _up(before: Value, after: Value) -> bool:
    """Direction of a move; a switch or a choice has only one."""
    numbers = isinstance(before, int | float) and isinstance(after, int | float)
    return not numbers or float(after) > float(before)
