"""Ways to serve one server with replicas of several accelerators, listed: each covers its load and its fewest replicas.

A program that chooses one such mix for each server has a far better bound than one that counts replicas, since no part
of a replica is left in it. It pays where the lists are short: up to a few replicas of all accelerators but the slowest.
"""

from __future__ import annotations

import math

_ROUNDING = 1e-9  # relative, of a load


def mixes(rates: list[float], load: float, fewest: int, most: float, *, limit: int) -> list[tuple[int, ...]] | None:
    """Replicas of each accelerator, by their rates; None if there are more than `limit` ways.

    >>> mixes([4.0, 3.0], 7.0, 1, math.inf, limit=9)
    [(0, 3), (1, 1), (2, 0)]
    """
    order = sorted(range(len(rates)), key=lambda a: (-rates[a], a))
    found: list[tuple[int, ...]] = []

    def extend(at: int, left: float, counts: tuple[int, ...]) -> bool:
        missing = max(fewest - sum(counts), 0)
        need = max(math.ceil(left / rates[order[at]] - _ROUNDING * load), missing) if left > 0 else missing
        if at == len(order) - 1:
            found.append((*counts, need))
            return len(found) <= limit
        return all(extend(at + 1, left - k * rates[order[at]], (*counts, k)) for k in range(need + 1))

    if not extend(0, load, ()):
        return None
    back = [order.index(a) for a in range(len(rates))]
    return [tuple(counts[i] for i in back) for counts in found if sum(counts) <= most]
