"""What was learnt under which traffic: a bounded memory by context, so that a pattern that comes back is known.

A context is a tuple of positive quantities (arrival rate, tokens in, tokens out). Two contexts are as far apart as the
largest |log(a_i / b_i)| of their entries: 0.26 is a difference of 30 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from flyball.core.errors import InvalidInput

Context = tuple[float, ...]
T = TypeVar("T")

SAME = math.log(1.3)  # contexts nearer than this are one
_LEAST = 1e-3  # what is below counts as this much: no traffic is not infinitely far from little


def distance(a: Context, b: Context) -> float:
    """How far apart two contexts are.

    >>> round(distance((2.0, 100.0), (4.0, 100.0)), 2)
    0.69
    """
    if len(a) != len(b):
        raise InvalidInput(f"a context of {len(b)} entries was given where {len(a)} are known; give the same ones")
    return max((abs(math.log(max(x, _LEAST) / max(y, _LEAST))) for x, y in zip(a, b, strict=True)), default=0.0)


@dataclass
class ContextMemory(Generic[T]):
    """The latest contexts with what belongs to each; the one not met for longest is forgotten first."""

    room: int = 16
    entries: list[tuple[Context, T]] = field(default_factory=list)  # the latest last

    def recall(self, context: Context) -> T | None:
        """What was learnt under this context or the nearest one, if it is the same."""
        near = min(self.entries, key=lambda entry: distance(entry[0], context), default=None)
        if near is None or distance(near[0], context) > SAME:
            return None
        self.entries.remove(near)
        self.entries.append(near)
        return near[1]

    def keep(self, context: Context, learnt: T) -> None:
        """Remember what was learnt under a context, in place of what was known under the same."""
        self.entries = [e for e in self.entries if distance(e[0], context) > SAME][-(self.room - 1) :]
        self.entries.append((context, learnt))
