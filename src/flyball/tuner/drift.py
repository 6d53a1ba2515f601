"""Whether the traffic has changed: two-sided CUSUM (Page, 1954) on the logarithm of each of its features.

m_i, v_i    slow mean and variance of log feature i
z_i         (log x_i - m_i) / sqrt(v_i): how unusual the window is
S+, S-      max(0, S + z - SLACK) and max(0, S - z - SLACK), each term at most LIMIT: a shift once one exceeds THRESHOLD

Pure: the state in, the state and whether it shifted out. After a shift the slow mean starts anew at the window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

SLACK = 0.75
THRESHOLD = 4.0
LIMIT = 3.0  # one window alone is not enough
FLOOR = 0.12  # least standard deviation of a logarithm; of the mean of n requests, n^-1/2
_MEMORY = 12  # windows


class Feature(NamedTuple):
    """What is known of one feature."""

    mean: float
    var: float
    up: float = 0.0
    down: float = 0.0


class Shift(NamedTuple):
    """The detector's state."""

    windows: int = 0
    features: tuple[Feature, ...] = ()


def observe(state: Shift, values: Sequence[float], requests: float = math.inf) -> tuple[Shift, bool]:
    """One window's features (all at least 0), in the same order each time; means of so many requests vary by chance.

    >>> state = Shift()
    >>> for rate in (10.0, 11.0, 9.5, 10.4, 10.1):
    ...     state, shifted = observe(state, [rate])
    >>> observe(state, [10.5])[1], observe(observe(state, [25.0])[0], [24.0])[1]
    (False, True)
    """
    logs = [math.log(max(value, 1e-3)) for value in values]
    if state.windows == 0 or len(logs) != len(state.features):
        return Shift(1, tuple(Feature(x, 0.0) for x in logs)), False
    count = min(state.windows + 1, _MEMORY)
    features, shifted = [], False
    for feature, x in zip(state.features, logs, strict=True):
        deviation = max(math.sqrt(feature.var), FLOOR, 1.0 / math.sqrt(max(requests, 1.0)))
        z = max(-LIMIT - SLACK, min(LIMIT + SLACK, (x - feature.mean) / deviation))
        up, down = max(0.0, feature.up + z - SLACK), max(0.0, feature.down - z - SLACK)
        shifted |= max(up, down) > THRESHOLD
        quiet = max(up, down) < LIMIT
        step = (x - feature.mean) / count if quiet else 0.0
        spread = feature.var + ((x - feature.mean) ** 2 - feature.var) / count if quiet else feature.var
        features.append(Feature(feature.mean + step, spread, up, down))
    if shifted:
        return Shift(1, tuple(Feature(x, f.var) for x, f in zip(logs, features, strict=True))), True
    return Shift(count, tuple(features)), False
