"""A small honest fleet in virtual time: arrivals come, replicas start, serve as a fluid, drain; both ports of a loop.

No request is drawn: work flows. What it keeps exactly is what the tests ask of it: how many replicas run, start and
drain at every instant, and what that costs. The simulator proper is `flyball.performance.simulator`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flyball.core.errors import ActuationFailed, ObservationFailed
from flyball.core.fleet import Accelerator, FleetSpec, LatencyProfile, ServerSpec, ServiceClass, Targets
from flyball.core.observation import Counts, FleetState, ReplicaView, ServerView

LAW: dict[str, Any] = {"alpha_s": 0.009, "beta_s": 3e-5, "gamma_s": 6e-8, "max_batch": 256, "queue_model": "v3-engine"}


def fleet_spec(
    servers: Mapping[str, int] | None = None,
    accelerators: Mapping[str, tuple[float, float]] | None = None,
    **settings: Any,
) -> FleetSpec:
    """Servers (name -> priority of a class of its own) of one model; accelerators (name -> cost per hour, slowness)."""
    servers = servers or {"chat": 1}
    accelerators = accelerators or {"H100": (1.0, 1.0)}
    settings.setdefault("unlimited", "capacity" not in settings)
    return FleetSpec(
        accelerators=tuple(Accelerator(name=n, type=n, cost_per_h=c) for n, (c, _) in accelerators.items()),
        profiles=tuple(
            LatencyProfile(model="m", accelerator=n, **{**LAW, "alpha_s": LAW["alpha_s"] * slow})
            for n, (_, slow) in accelerators.items()
        ),
        service_classes=tuple(
            ServiceClass(name=f"{n}-class", priority=p, targets={"m": Targets(ttft_s=0.2, itl_s=0.015)})
            for n, p in servers.items()
        ),
        servers=tuple(ServerSpec(name=n, service_class=f"{n}-class", model="m") for n in servers),
        **settings,
    )


@dataclass
class Replica:
    """One replica: when it was asked for, and since when it drains."""

    name: str
    accelerator: str
    asked_s: float
    draining_s: float | None = None


@dataclass
class ToyFleet:
    """Both ports. `rates` says what arrives; faults are switches."""

    spec: FleetSpec
    rates: Mapping[str, Callable[[float], float]]
    start_up_s: float = 60.0
    drain_s: float = 30.0
    serves_rps: float = 8.0  # one replica at most
    now_s: float = 0.0
    blind: bool = False
    refusing: bool = False
    silent: float = 0.0  # share of replicas that report nothing
    counted: bool = True  # whether a gateway counts arrivals
    never_ready: set[str] = field(default_factory=set)  # accelerators whose replicas do not come up
    replicas: dict[str, list[Replica]] = field(default_factory=dict)
    wanted: dict[str, dict[str, int]] = field(default_factory=dict)
    backlog: dict[str, float] = field(default_factory=dict)
    arrived: dict[str, float] = field(default_factory=dict)
    served: dict[str, float] = field(default_factory=dict)
    most_cost_per_h: float = 0.0
    most_cards: dict[str, int] = field(default_factory=dict)
    gpu_h: float = 0.0
    made: int = 0

    def put(self, server: str, accelerator: str, count: int) -> None:
        """Replicas that have run for long."""
        self.wanted[server] = {accelerator: count}
        self.replicas[server] = [self._new(accelerator, -1e6) for _ in range(count)]

    def _new(self, accelerator: str, asked_s: float) -> Replica:
        self.made += 1
        return Replica(f"r{self.made}", accelerator, asked_s)

    def phase(self, r: Replica) -> str:
        """As its view says."""
        if r.draining_s is not None:
            return "draining"
        up = self.now_s - r.asked_s >= self.start_up_s and r.accelerator not in self.never_ready
        return "ready" if up else "starting"

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now_s += seconds
        for server, rate in self.rates.items():
            came = rate(self.now_s) * seconds
            room = self.serves_rps * seconds * sum(self.phase(r) == "ready" for r in self.replicas.get(server, []))
            have = self.backlog.get(server, 0.0) + came
            done = min(have, room)
            self.backlog[server] = have - done
            self.arrived[server], self.served[server] = came, done
        for server, own in self.replicas.items():
            self.replicas[server] = [r for r in own if r.draining_s is None or self.now_s - r.draining_s < self.drain_s]
        self._watch()
        self.gpu_h += sum(len(own) for own in self.replicas.values()) * seconds / 3600.0

    def _watch(self) -> None:
        price = {a.name: a.cost_per_h for a in self.spec.accelerators}
        every = [r.accelerator for own in self.replicas.values() for r in own]
        self.most_cost_per_h = max(self.most_cost_per_h, sum(price[name] for name in every))
        for name in every:
            self.most_cards[name] = max(self.most_cards.get(name, 0), every.count(name))

    def observe(self, window_s: float) -> FleetState:
        """The fleet now."""
        if self.blind:
            raise ObservationFailed("the metrics server does not answer; the last plan stands")
        views = {s.name: self._view(s.name) for s in self.spec.servers}
        return FleetState(now_s=self.now_s, window_s=window_s, servers=views)

    def _view(self, server: str) -> ServerView:
        own = self.replicas.get(server, [])
        ready = sum(self.phase(r) == "ready" for r in own)
        backlog, done = self.backlog.get(server, 0.0), self.served.get(server, 0.0)
        running = done * 0.2 / ready if ready else 0.0
        views = tuple(
            ReplicaView(
                name=r.name, accelerator=r.accelerator, phase=self.phase(r), age_s=self.now_s - r.asked_s,  # type: ignore[arg-type]
                reported=i >= self.silent * len(own),
                running=running if self.phase(r) == "ready" else 0.0,
                waiting=backlog / ready if ready and self.phase(r) == "ready" else 0.0,
                kv_used=min(running * 1400 / 524_288, 1.0), kv_capacity_tokens=524_288, itl_s=0.012,
            )
            for i, r in enumerate(own)
        )  # fmt: skip
        return ServerView(
            name=server,
            arrivals=round(self.arrived.get(server, 0.0)) if self.counted else None,
            queued=0 if ready else round(backlog),
            input_tokens=1180.0,
            output_tokens=215.0,
            completed=round(done),
            wanted=dict(self.wanted.get(server, {})),
            replicas=views,
        )

    def scale(self, wanted: Counts) -> None:
        """Start and drain."""
        if self.refusing:
            raise ActuationFailed("the cluster refuses: quota exceeded")
        for server, counts in wanted.items():
            self.wanted[server] = dict(counts)
            own = self.replicas.setdefault(server, [])
            for name in {*counts, *(r.accelerator for r in own)}:
                active = [r for r in own if r.accelerator == name and r.draining_s is None]
                for r in active[counts.get(name, 0) :]:
                    r.draining_s = self.now_s
                own += [self._new(name, self.now_s) for _ in range(counts.get(name, 0) - len(active))]
        self._watch()

    def count(self, server: str) -> int:
        """Replicas that start or are ready."""
        return sum(r.draining_s is None for r in self.replicas.get(server, []))


def with_server(spec: FleetSpec, **changes: Any) -> FleetSpec:
    """The spec, every server changed."""
    return replace(spec, servers=tuple(replace(s, **changes) for s in spec.servers))
