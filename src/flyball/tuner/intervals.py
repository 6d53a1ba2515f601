"""A mean of few values and the interval that holds the true one (Student's t)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean and the interval that holds the true one with the stated confidence."""

    mean: float
    low: float
    high: float

    def scaled(self, factor: float) -> Interval:
        """In another unit."""
        return Interval(mean=self.mean * factor, low=self.low * factor, high=self.high * factor)


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Student's t interval of a mean; without limits for one value, or where one is infinite.

    >>> t_interval([1.0, 2.0, 3.0])
    Interval(mean=2.0, low=-0.484..., high=4.484...)
    """
    count = len(values)
    mean = sum(values) / count
    if count < 2 or not math.isfinite(mean):
        return Interval(mean=mean, low=-math.inf, high=math.inf)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1))
    half = float(stdtrit(count - 1, (1 + confidence) / 2)) * deviation / math.sqrt(count)
    return Interval(mean=mean, low=mean - half, high=mean + half)
