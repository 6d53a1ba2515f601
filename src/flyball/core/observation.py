"""What a fleet's loop sees and wants: the state of every replica over the last window, and replica counts as decided.

A *state* is read from a `MetricsSource`, a *decision* is handed to a `Cluster` (`flyball.core.ports`). Both look alike
for a real fleet and a simulated one, so a controller cannot tell which one it runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

Phase = Literal["starting", "ready", "draining"]
Counts = Mapping[str, Mapping[str, int]]  # server -> accelerator -> replicas, the whole wanted state of those named


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaView:
    """One replica: gauges at the end of the window, sums and means over it; a mean of nothing is NaN."""

    name: str
    accelerator: str
    phase: Phase = "ready"
    age_s: float = 0.0  # since it was asked for
    reported: bool = True  # False: its metrics are missing or stale, and the numbers below say nothing
    running: float = 0.0  # requests in its batch
    waiting: float = 0.0  # requests in its own queue
    kv_used: float = 0.0  # share of its KV cache, 0 to 1
    kv_capacity_tokens: int = 0  # 0: not known
    arrivals: int = 0  # requests routed to it
    completed: int = 0  # requests it finished
    generated_tokens: int = 0
    prompt_tokens: int = 0  # of prompts whose prefill ended
    ttft_s: float = math.nan  # mean, of first tokens given
    itl_s: float = math.nan  # mean over all gaps
    ttft_p90_s: float = math.nan
    itl_p90_s: float = math.nan
    prefix_hits: float = 0.0  # share of prompt tokens found in its cache


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerView:
    """One model served for one class: what its gateway counted over the window, and its replicas."""

    name: str
    arrivals: int | None  # requests that reached the gateway; None: nobody counts them
    queued: int = 0  # requests that wait at the gateway for a replica that is ready
    input_tokens: float = math.nan  # means over the requests that arrived (or, if not counted, that ended)
    output_tokens: float = math.nan  # means over the requests that ended
    completed: int = 0
    good: int | None = None  # of those completed, how many saw what was promised; None: not measured
    wanted: Mapping[str, int] = field(default_factory=dict)  # replicas asked for last, by accelerator
    replicas: tuple[ReplicaView, ...] = ()  # all that cost money: starting, ready and draining

    def count(self, *phases: Phase) -> int:
        """Replicas in some phases.

        >>> ServerView(name="s", arrivals=0, replicas=(ReplicaView(name="r", accelerator="A"),)).count("ready")
        1
        """
        return sum(r.phase in phases for r in self.replicas)

    @property
    def ready(self) -> tuple[ReplicaView, ...]:
        """Replicas that take new requests."""
        return tuple(r for r in self.replicas if r.phase == "ready")


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetState:
    """Every server at one moment; the window is the time before it that sums and means are over."""

    now_s: float
    window_s: float
    servers: Mapping[str, ServerView]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Replicas wanted, and why; a server that is not named keeps what it has."""

    replicas: Counts
    reasons: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # server -> sentences


Memory = TypeVar("Memory")


class Controller(Protocol[Memory]):
    """Turns what is seen into what is wanted, purely: the same state and memory give the same decision."""

    @property
    def period_s(self) -> float:
        """Time between two decisions."""
        ...

    def start(self) -> Memory:
        """The memory before the first decision."""
        ...

    def decide(self, state: FleetState, memory: Memory) -> tuple[Decision, Memory]:
        """Decide from the whole state, never from what changed in it."""
        ...
