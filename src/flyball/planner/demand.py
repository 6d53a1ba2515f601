"""How many requests come, which is not how many are served: an overloaded server serves what it can, whatever comes.

Two ways, in order: what the gateway counted; or what ended plus by how much the number inside grew (what came either
left or is still there). Throughput alone is never taken for demand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flyball.core.observation import ServerView


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """Requests that came over a window, and how that is known."""

    rate_rps: float
    source: str  # "gateway" or "throughput and queue growth"


def inside(view: ServerView) -> float:
    """Requests that came and have not ended: at the gateway, in queues and in batches."""
    return view.queued + sum(r.running + r.waiting for r in view.replicas if r.reported)


def arrivals(view: ServerView, *, window_s: float, inside_before: float | None) -> Arrivals | None:
    """The arrival rate over a window, or None where what was reported cannot tell.

    `inside_before` is `inside` at the window's start; without it (at the first look) growth cannot be told.

    >>> from flyball.core.observation import ReplicaView
    >>> idle = ReplicaView(name="r", accelerator="A")
    >>> view = ServerView(name="s", arrivals=None, completed=30, queued=12, replicas=(idle,))
    >>> arrivals(view, window_s=10.0, inside_before=2.0).rate_rps  # 3 a second left, 1 a second stayed
    4.0
    """
    if not (window_s > 0 and math.isfinite(window_s)):
        return None
    if view.arrivals is not None:
        return Arrivals(rate_rps=view.arrivals / window_s, source="gateway")
    if inside_before is None or not view.replicas or not all(r.reported for r in view.replicas):
        return None
    came = max(view.completed + inside(view) - inside_before, 0.0)
    return Arrivals(rate_rps=came / window_s, source="throughput and queue growth")
