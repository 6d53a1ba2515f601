"""What happened in the last minutes, in bounded memory: counts and latency quantiles of 1 and 5 minutes.

Time is cut into slices of five seconds, each with its counts and a sketch of each latency. A sketch counts values in
bins whose bounds grow by a constant factor (DDSketch; Masson, Rim and Lee 2019), so a quantile is off by at most 1 %.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field

from flyball.core.clock import Clock

SLICE_S = 5.0
LONGEST_S = 300.0

_GROWTH = 1.02  # of the bins' bounds; twice the relative error
_PER_E_FOLD = 1 / math.log(_GROWTH)
_LEAST = 1e-6  # seconds; anything faster counts as this


class Sketch:
    """The distribution of positive values.

    >>> sketch = Sketch()
    >>> for value in range(1, 1001):
    ...     sketch.add(value)
    >>> abs(sketch.quantile(0.95) / 950 - 1) < 0.01
    True
    """

    __slots__ = ("bins", "count", "total")

    def __init__(self) -> None:
        self.bins: dict[int, int] = {}
        self.count = 0
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        place = math.ceil(math.log(max(value, _LEAST)) * _PER_E_FOLD)
        self.bins[place] = self.bins.get(place, 0) + 1
        self.count += 1
        self.total += value

    def merge(self, other: Sketch) -> None:
        """Count all that another one has counted."""
        for place, count in other.bins.items():
            self.bins[place] = self.bins.get(place, 0) + count
        self.count += other.count
        self.total += other.total

    @property
    def mean(self) -> float | None:
        """Exact; None of nothing."""
        return self.total / self.count if self.count else None

    def quantile(self, share: float) -> float | None:
        """The value below which this share lies; None of nothing."""
        wanted = share * self.count
        for place, count in sorted(self.bins.items()):
            wanted -= count
            if wanted <= 0:
                return 2 * _GROWTH**place / (_GROWTH + 1)  # the bin's middle, in relative error
        return None


@dataclass(slots=True)
class Tally:
    """What happened in some span of time."""

    start_s: float = 0.0
    prompt_tokens: int = 0  # computed and cached
    cached_tokens: int = 0
    generated_tokens: int = 0
    ended: Counter[str] = field(default_factory=Counter)  # answers, by how they ended
    queue: Sketch = field(default_factory=Sketch)
    ttft: Sketch = field(default_factory=Sketch)
    itl: Sketch = field(default_factory=Sketch)
    e2e: Sketch = field(default_factory=Sketch)

    def merge(self, other: Tally) -> None:
        """Add what another span saw."""
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.generated_tokens += other.generated_tokens
        self.ended.update(other.ended)
        for mine, its in (
            (self.queue, other.queue),
            (self.ttft, other.ttft),
            (self.itl, other.itl),
            (self.e2e, other.e2e),
        ):
            mine.merge(its)


class Recent:
    """The last five minutes."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._started_s = clock.now_s()
        self._slices: deque[Tally] = deque([Tally(self._started_s)])

    def at(self, now_s: float) -> Tally:
        """The slice to count in."""
        last = self._slices[-1]
        if now_s - last.start_s >= SLICE_S:
            last = Tally(self._slice_start(now_s))
            self._slices.append(last)
            while self._slices[0].start_s < self._slice_start(now_s - LONGEST_S):
                self._slices.popleft()
        return last

    def window(self, length_s: float) -> tuple[Tally, float]:
        """What was seen in the last `length_s` seconds, up to a slice more, and how many seconds that were."""
        now_s = self._clock.now_s()
        since_s = max(self._started_s, self._slice_start(now_s - length_s))
        total = Tally(since_s)
        for one in self._slices:
            if one.start_s >= since_s:
                total.merge(one)
        return total, now_s - since_s

    def _slice_start(self, at_s: float) -> float:
        return self._started_s + math.floor((at_s - self._started_s) / SLICE_S) * SLICE_S
