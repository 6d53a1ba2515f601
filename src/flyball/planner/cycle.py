"""One turn of the loop against the world: observe, decide, act; whatever fails is held, said and tried again.

Servers are acted on one by one, those that shrink first, so that what one cluster call refuses stops no other server.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from flyball.core.errors import ActuationFailed, ObservationFailed
from flyball.core.observation import FleetState
from flyball.core.ports import Cluster, MetricsSource
from flyball.planner.loop import FleetDecision, FleetLoop, LoopMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one turn saw, decided and did."""

    state: FleetState | None = None  # None: nothing could be read
    decision: FleetDecision | None = None
    blind: str = ""  # why nothing could be read; the last plan stands
    refused: dict[str, str] = field(default_factory=dict)  # server -> why the cluster did not do it
    acted: bool = False  # False in a dry run


def turn(
    source: MetricsSource,
    loop: FleetLoop,
    cluster: Cluster | None,
    memory: LoopMemory,
    *,
    window_s: float | None = None,
) -> tuple[Turn, LoopMemory]:
    """Run one turn; without a cluster it is a dry run. Metrics are read over the loop's period, or `window_s`."""
    try:
        state = source.observe(window_s or loop.period_s)
    except ObservationFailed as error:
        return Turn(blind=f"held: {error}"), memory
    decision, after = loop.decide(state, memory)
    if cluster is None:
        return Turn(state=state, decision=decision), after
    refused: dict[str, str] = {}
    for name in sorted(decision.replicas, key=lambda n: (_growth(state, decision, n), n)):
        try:
            cluster.scale({name: decision.replicas[name]})
        except ActuationFailed as error:
            refused[name] = str(error)
    if refused:
        after = loop.refused(memory, after, refused)
    return Turn(state=state, decision=decision, refused=refused, acted=True), after


def _growth(state: FleetState, decision: FleetDecision, server: str) -> int:
    view = state.servers.get(server)
    have = 0 if view is None else view.count("starting", "ready")
    return sum(decision.replicas[server].values()) - have
