"""How few accelerators serve a recorded trace within the targets, and how few any plan would need.

The trace is cut into windows; each has a rate and mean lengths of its own, and is sized like a server. A fixed fleet
must bear the worst window; one that follows the load perfectly rents in each window what that needs.

symbol   meaning
w, d_w   window, its requests/s
r_wa     requests/s that a replica on accelerator a takes within the targets, under the window's lengths
k_a      cards of a replica
fixed    k_a max_w ceil(d_w / r_wa)
follows  Σ_w ceil(d_w / r_wa) k_a * length of w
bound    max_w min_a k_a d_w / r_wa cards at once, and Σ_w min_a (k_a d_w / r_wa) * length of w card hours: parts of
         replicas, on the best accelerator in every window, so that no whole plan under this law needs less
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from flyball.core.errors import Infeasible, InvalidInput
from flyball.core.fleet import Demand, FleetSpec, ServerSpec
from flyball.core.workload import RequestSpec
from flyball.planner.problem import Candidate, Choice, build

_HOUR_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOption:
    """What one accelerator needs for the trace."""

    accelerator: str
    replicas: int  # of a fixed fleet
    cards: int
    cost_per_h: float
    mean_cards: float  # of one that follows the load
    card_hours: float
    cost: float  # over the trace, of one that follows the load
    replicas_by_window: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSizing:
    """Options, the fewest cards first, and what no plan can go below."""

    options: tuple[TraceOption, ...]
    unable: dict[str, str]  # accelerator -> reason
    bound_cards: float  # at the busiest window, parts of cards allowed
    bound_card_hours: float
    window_s: float
    rates_rps: tuple[float, ...]

    @property
    def least_cards(self) -> int:
        """Of any fixed fleet: the bound as whole cards."""
        return math.ceil(self.bound_cards - 1e-9)


def size_for_trace(
    spec: FleetSpec,
    server: ServerSpec,
    requests: Sequence[RequestSpec],
    *,
    window_s: float,
    queue_model: str | None = None,
) -> TraceSizing:
    """Size a server's replicas for every window of a trace, whatever cards there are."""
    windows = _windows(server, requests, window_s)
    free = replace(spec, servers=windows, unlimited=True, quotas={}, budget_per_h=None, power_limit_w=None)
    choices = build(free, queue_model).choices
    broken = next((c for c in choices if c.reason), None)
    if broken is not None:
        raise Infeasible(f"in the window at {broken.server.name} {broken.reason}")
    by_name = [{c.allocation.accelerator: c for c in choice.candidates} for choice in choices]
    names = sorted({name for candidates in by_name for name in candidates if name})
    loaded = [bool(w.demand.arrival_rps) for w in windows]
    options, unable = [], {}
    for name in names:
        lacking = next((i for i, c in enumerate(by_name) if loaded[i] and name not in c), None)
        if lacking is None:
            options.append(_option(name, [c.get(name) for c in by_name], window_s))
        else:
            unable[name] = f"does not keep the targets in the window at {windows[lacking].name}"
    parts = [_least_part(choice) for choice in choices]
    return TraceSizing(
        options=tuple(sorted(options, key=lambda o: (o.cards, o.cost_per_h, o.accelerator))),
        unable=unable,
        bound_cards=max(parts),
        bound_card_hours=math.fsum(parts) * window_s / _HOUR_S,
        window_s=window_s,
        rates_rps=tuple(w.demand.arrival_rps for w in windows),
    )


def _windows(server: ServerSpec, requests: Sequence[RequestSpec], window_s: float) -> tuple[ServerSpec, ...]:
    """The server under each window's load; windows are named by the second they begin at."""
    if not requests:
        raise InvalidInput("the trace has no requests; give one that has")
    if not window_s > 0:
        raise InvalidInput(f"a window of {window_s:g} s holds nothing; give more than 0 s")
    cells: list[list[RequestSpec]] = [[] for _ in range(int(max(r.arrival_s for r in requests) // window_s) + 1)]
    for r in requests:
        cells[int(r.arrival_s // window_s)].append(r)
    return tuple(
        replace(server, name=f"{i * window_s:g} s", demand=_demand(cell, window_s), max_replicas=None, quota="")
        for i, cell in enumerate(cells)
    )


def _demand(requests: Sequence[RequestSpec], window_s: float) -> Demand:
    if not requests:
        return Demand()
    return Demand(
        arrival_rps=len(requests) / window_s,
        input_tokens=sum(r.input_tokens for r in requests) / len(requests),
        output_tokens=sum(r.output_tokens for r in requests) / len(requests),
    )


def _option(name: str, candidates: Sequence[Candidate | None], window_s: float) -> TraceOption:
    running = [c for c in candidates if c is not None]
    peak = max(running, key=lambda c: c.cards)
    hours = window_s / _HOUR_S
    return TraceOption(
        accelerator=name,
        replicas=peak.allocation.replicas,
        cards=peak.cards,
        cost_per_h=peak.allocation.cost_per_h,
        mean_cards=sum(c.cards for c in running) / len(candidates),
        card_hours=sum(c.cards for c in running) * hours,
        cost=math.fsum(c.allocation.cost_per_h for c in running) * hours,
        replicas_by_window=tuple(c.allocation.replicas if c else 0 for c in candidates),
    )


def _least_part(choice: Choice) -> float:
    """Cards for a window's load if parts of replicas could be had."""
    load = choice.server.demand.arrival_rps
    return min((c.cards * load / c.allocation.capacity_rps for c in choice.candidates if c.cards), default=0.0)
