"""Stability control: from the replicas wanted now to the replicas to ask for, so that noise moves nothing.

Each rule answers with the count it allows and why; the rules of Kubernetes' HorizontalPodAutoscaler are among them
(stabilisation window, step limits), with a cooldown and a least time between opposite moves beside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from flyball.core.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Damping:
    """How slowly counts may follow; the defaults are for replicas that take a minute or more to start."""

    up_window_s: float = 0.0  # go up to the least wanted within this time
    down_window_s: float = 300.0  # go down to the most wanted within this time (HPA's default)
    up_cooldown_s: float = 0.0  # between two moves up
    down_cooldown_s: float = 60.0  # between two moves down
    min_stable_s: float = 180.0  # between a move up and the next one down: a start is not thrown away
    max_up: int = 0  # replicas added at once; 0: no limit
    max_down: int = 1  # replicas taken away at once; 0: no limit

    def __post_init__(self) -> None:
        for name in Damping.__slots__:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InvalidInput(f"damping {name} is {value}; give a finite number of at least 0")

    @classmethod
    def following(cls, start_up_s: float) -> Damping:
        """Rules that fit how long a replica takes to start: for a third of that, what is there is kept.

        To keep a replica for longer costs more than to start another if it is needed again; the third was the cheapest
        of those tried on the loads of benchmarks/fleet_control.py.
        """
        keep_s = min(max(start_up_s / 3, 30.0), 300.0)
        return cls(down_window_s=keep_s, down_cooldown_s=15.0, min_stable_s=keep_s)


NO_DAMPING = Damping(down_window_s=0.0, down_cooldown_s=0.0, min_stable_s=0.0, max_down=0)


class _Wish(NamedTuple):
    at_s: float
    replicas: int


@dataclass(frozen=True, slots=True)
class Damped:
    """What was wanted lately, oldest first, and when counts last moved."""

    wishes: tuple[_Wish, ...] = ()
    up_at_s: float = -math.inf
    down_at_s: float = -math.inf


def damp(wanted: int, current: int, now_s: float, memory: Damped, rules: Damping) -> tuple[int, Damped, str]:
    """The count to ask for, and why it is not the one wanted ("" where it is).

    >>> damp(1, 3, 100.0, Damped(wishes=(_Wish(50.0, 3),)), Damping())[::2]
    (3, '3 were wanted within the last 300 s')
    """
    keep_s = max(rules.up_window_s, rules.down_window_s)
    wishes = (*(w for w in memory.wishes if w.at_s > now_s - keep_s), _Wish(now_s, wanted))
    if wanted > current:
        count, why = _up(wanted, current, now_s, memory, wishes, rules)
    elif wanted < current:
        count, why = _down(wanted, current, now_s, memory, wishes, rules)
    else:
        count, why = wanted, ""
    return (
        count,
        Damped(
            wishes,
            now_s if count > current else memory.up_at_s,
            now_s if count < current else memory.down_at_s,
        ),
        why,
    )


def _up(
    wanted: int, current: int, now_s: float, memory: Damped, wishes: tuple[_Wish, ...], rules: Damping
) -> tuple[int, str]:
    if current and now_s - memory.up_at_s < rules.up_cooldown_s:
        return current, f"the last move up was {now_s - memory.up_at_s:.0f} s ago, less than {rules.up_cooldown_s:g} s"
    stable = max(min(w.replicas for w in wishes if w.at_s >= now_s - rules.up_window_s), current)
    count = min(stable, current + rules.max_up) if rules.max_up else stable
    if stable < wanted:
        return count, f"only {stable} were wanted throughout the last {rules.up_window_s:g} s"
    return count, f"at most {rules.max_up} are added at once" if count < wanted else ""


def _down(
    wanted: int, current: int, now_s: float, memory: Damped, wishes: tuple[_Wish, ...], rules: Damping
) -> tuple[int, str]:
    if now_s - memory.up_at_s < rules.min_stable_s:
        return current, f"the last move up was {now_s - memory.up_at_s:.0f} s ago, less than {rules.min_stable_s:g} s"
    if now_s - memory.down_at_s < rules.down_cooldown_s:
        ago_s = now_s - memory.down_at_s
        return current, f"the last move down was {ago_s:.0f} s ago, less than {rules.down_cooldown_s:g} s"
    stable = min(max(w.replicas for w in wishes if w.at_s >= now_s - rules.down_window_s), current)
    count = max(stable, current - rules.max_down) if rules.max_down else stable
    if stable > wanted:
        return count, f"{stable} were wanted within the last {rules.down_window_s:g} s"
    return count, f"at most {rules.max_down} are taken away at once" if count > wanted else ""
