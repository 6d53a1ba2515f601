"""When requests arrive: processes by name, each with a mean rate R, made from a seed.

process              gaps between arrivals
poisson              exponential with mean 1/R: many independent users
constant             1/R, always
gamma:SHAPE          gamma with that shape and mean 1/R; shape 1 is Poisson, below 1 burstier (variation 1/sqrt(SHAPE))
burst:SIZE           SIZE requests at once; such groups arrive Poisson at R/SIZE
step:FACTOR:AT_S     Poisson at R, from AT_S seconds on at FACTOR·R
ramp:FACTOR:OVER_S   Poisson at a rate that grows evenly from R to FACTOR·R over OVER_S seconds, and stays there
diurnal:SHARE:PERIOD_S  Poisson at R·(1 + SHARE·sin(2πt/PERIOD_S))

Rates that change are drawn by thinning (Lewis and Shedler, 1979): candidates at the highest rate, each kept with
probability rate(t)/highest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile

import numpy as np

from flyball.core.errors import InvalidInput

FORMS = "poisson, constant, gamma:SHAPE, burst:SIZE, step:FACTOR:AT_S, ramp:FACTOR:OVER_S or diurnal:SHARE:PERIOD_S"
_NUMBERS = {"poisson": 0, "constant": 0, "gamma": 1, "burst": 1, "step": 2, "ramp": 2, "diurnal": 2}


@dataclass(frozen=True, slots=True)
class Arrivals:
    """An arrival process without its rate.

    >>> str(Arrivals.parse("gamma:0.5"))
    'gamma:0.5'
    """

    process: str
    numbers: tuple[float, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Arrivals:
        """Read a process as the module's table writes it."""
        name, *parts = text.strip().lower().split(":")
        try:
            numbers = tuple(float(part) for part in parts)
        except ValueError:
            numbers = (math.nan,)
        if len(numbers) != _NUMBERS.get(name) or not all(0 <= number < math.inf for number in numbers):
            raise InvalidInput(f"cannot read the arrivals {text!r}; write {FORMS}, with numbers of at least 0")
        if name in ("gamma", "ramp", "diurnal") and not numbers[-1] > 0:
            raise InvalidInput(f"the arrivals {text!r} need a last number above 0")
        if name == "burst" and not (numbers[0] >= 1 and numbers[0].is_integer()):
            raise InvalidInput(f"the arrivals {text!r} need a whole number of requests a burst, at least 1")
        if name == "diurnal" and numbers[0] > 1:
            raise InvalidInput(f"the arrivals {text!r} would need a negative rate at night; give a share of at most 1")
        return cls(name, numbers)

    def __str__(self) -> str:
        return ":".join([self.process, *(f"{number:g}" for number in self.numbers)])

    def times_s(
        self, rate_rps: float, rng: np.random.Generator, count: int | None, duration_s: float | None
    ) -> list[float]:
        """Arrival times in order, until `count` of them or `duration_s`, whichever comes first."""
        endless = self._endless(rate_rps, rng)
        timely = endless if duration_s is None else takewhile(lambda time_s: time_s <= duration_s, endless)
        return list(islice(timely, count))

    def _endless(self, rate_rps: float, rng: np.random.Generator) -> Iterator[float]:
        match self.process, self.numbers:
            case "constant", _:
                return _summed(lambda: 1 / rate_rps)
            case "gamma", (shape,):
                return _summed(lambda: rng.gamma(shape, 1 / (rate_rps * shape)))
            case "burst", (size,):
                groups = _summed(lambda: rng.exponential(size / rate_rps))
                return (time_s for time_s in groups for _ in range(int(size)))
            case "step", (factor, at_s):
                return _thinned(lambda t: rate_rps * (factor if t >= at_s else 1.0), rate_rps * max(factor, 1.0), rng)
            case "ramp", (factor, over_s):
                slope = (factor - 1) / over_s
                return _thinned(lambda t: rate_rps * (1 + slope * min(t, over_s)), rate_rps * max(factor, 1.0), rng)
            case "diurnal", (share, period_s):
                return _thinned(
                    lambda t: rate_rps * (1 + share * math.sin(2 * math.pi * t / period_s)), rate_rps * (1 + share), rng
                )
        return _summed(lambda: rng.exponential(1 / rate_rps))


def _summed(gap_s: Callable[[], float]) -> Iterator[float]:
    now_s = 0.0
    while True:
        now_s += gap_s()
        yield now_s


def _thinned(rate_rps: Callable[[float], float], highest_rps: float, rng: np.random.Generator) -> Iterator[float]:
    for time_s in _summed(lambda: rng.exponential(1 / highest_rps)):
        if rng.random() * highest_rps < rate_rps(time_s):
            yield time_s


POISSON = Arrivals("poisson")
