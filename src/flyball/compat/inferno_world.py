"""The collector's and the actuator's routes: what runs and what is asked of it, in llm-inferno's bodies.

Without a source of metrics the world is the fleet that was set: what was applied runs, under the load that was stated.
With one, replicas are what it reports. Two answers differ from theirs. Demand is what arrives, never throughput alone,
so a server whose arrivals cannot be told yet is left out. And a server that has no allocation keeps its replicas, where
theirs go to zero.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from threading import Lock
from typing import Any, Protocol

from flyball.adapters.fields import Fields
from flyball.adapters.fleet_files import system_server
from flyball.compat.inferno_state import FleetState, NotFound
from flyball.core.errors import InvalidInput
from flyball.core.fleet import FleetSpec, ServerSpec
from flyball.core.observation import ReplicaView, ServerView
from flyball.core.ports import MetricsSource
from flyball.planner.demand import arrivals, inside

_MS = 1e-3
_PER_MINUTE = 1 / 60
_SEPARATOR = "/"  # between a server's name and its replica's
_REMEMBERED = 48  # replica windows of a server, for /sweep
_MOST_REPLICAS = 10_000  # of one server that was set, told one by one

Spec = dict[str, Any]


class Scaler(Protocol):
    """Sets the replicas of an object that runs one server; raises ActuationFailed when refused."""

    def __call__(self, *, space: str, name: str, server: str, accelerator: str, replicas: int) -> None:
        """Scale the object `name` of the namespace `space`."""
        ...


class World:
    """What the collector reads and the actuator changes."""

    def __init__(
        self,
        fleet: FleetState,
        *,
        spec: FleetSpec | None = None,
        source: MetricsSource | None = None,
        scale: Scaler | None = None,
        space: str = "",
        window_s: float = 60.0,
    ) -> None:
        self._fleet, self._spec, self._source, self._scale = fleet, spec, source, scale
        self._space, self._window_s, self._lock = space, window_s, Lock()
        self._inside: dict[str, float] = {}
        self._seen: dict[str, deque[Spec]] = {}

    def collect(self) -> Spec:
        """Servers with their loads, one entry for each replica that runs, and where they live."""
        with self._lock:
            if self._source is None or self._spec is None:
                servers = self._fleet.call(lambda: list(self._fleet.servers.values()))
                replicas = [one for server in servers for one in _split(server)]
            else:
                servers, replicas = self._observe(self._spec, self._source)
            for one in replicas:
                name = str(one["name"]).rpartition(_SEPARATOR)[0]
                self._seen.setdefault(name, deque(maxlen=_REMEMBERED)).append(one)
            where = {s["name"]: {"uid": "", "name": s["name"], "space": self._space} for s in servers}
            return {"servers": servers, "replicas": replicas, "kube-resources": where}

    def sweep(self, server: str) -> list[Spec]:
        """A server's replicas at every load collected lately, as /calibrate takes them; its load is left alone."""
        with self._lock:
            if server not in self._seen:
                known = ", ".join(sorted(self._seen)) or "none"
                raise NotFound(f"nothing was collected of server {server!r} yet; collected were {known}")
            return list(self._seen[server])

    def update(self, body: Spec) -> str:
        """Bring servers to their allocations; those that are not named keep what they have."""
        f = Fields(body, "body")
        wanted = {name: (_count(one), one.text("accelerator")) for name, one in f.inside("allocations").entries()}
        where = {name: (r.text("name"), r.text("space")) for name, r in f.inside("kube-resources").entries()}
        missing = [name for name in wanted if name not in where]
        if missing:
            raise InvalidInput(
                f"server {missing[0]!r} has an allocation but no entry in kube-resources; add where it is"
            )
        with self._lock:
            if self._scale is None:
                self._fleet.call(lambda: self._take(body.get("allocations") or {}))
                return "Done"
            for name, (replicas, accelerator) in wanted.items():
                self._scale(
                    space=where[name][1], name=where[name][0], server=name, accelerator=accelerator, replicas=replicas
                )
            return "Done"

    def _take(self, allocations: Mapping[str, Spec]) -> None:
        """What was allocated runs, under the load as it is."""
        unknown = [name for name in allocations if name not in self._fleet.servers]
        if unknown:
            raise NotFound(f"server {unknown[0]!r} is not known; set it, or start with --kubernetes to scale objects")
        changed = {}
        for name, allocation in allocations.items():
            load = (self._fleet.servers[name].get("currentAlloc") or {}).get("load")
            current = allocation | ({"load": load} if load else {})
            changed[name] = self._fleet.servers[name] | {"currentAlloc": current}
            system_server(Fields(changed[name], name))  # complains where anything is wrong
        self._fleet.servers.update(changed)

    def _observe(self, spec: FleetSpec, source: MetricsSource) -> tuple[list[Spec], list[Spec]]:
        state = source.observe(self._window_s)
        servers, replicas = [], []
        for server in spec.servers:
            view = state.servers.get(server.name)
            came = view and arrivals(view, window_s=state.window_s, inside_before=self._inside.get(server.name))
            if view is None:
                continue
            self._inside[server.name] = inside(view)
            replicas += [_replica(server, view, r, state.window_s) for r in view.ready if r.reported]
            if came:
                servers.append(_server(server, view, came.rate_rps, state.window_s))
        return servers, replicas


def _count(f: Fields) -> int:
    f.inside("load")  # complains unless it is one
    return f.whole("numReplicas")


def _split(server: Spec) -> list[Spec]:
    """A server that was set as its replicas, each with an equal part of its load."""
    f = Fields(server, "server").inside("currentAlloc")
    count, load = min(f.whole("numReplicas"), _MOST_REPLICAS), f.inside("load")
    shared = {name: load.number(name) / count for name in ("arrivalRate", "throughput") if count}
    lengths = {name: load.whole(name) for name in ("avgInTokens", "avgOutTokens")}
    current = (server.get("currentAlloc") or {}) | {"numReplicas": 1, "load": shared | lengths}
    kept = {key: value for key, value in server.items() if key != "desiredAlloc"}
    return [kept | {"name": f"{server['name']}{_SEPARATOR}{k}", "currentAlloc": current} for k in range(count)]


def _spec(server: ServerSpec, name: str, allocation: Spec) -> Spec:
    return {
        "name": name,
        "class": server.service_class,
        "model": server.model,
        "keepAccelerator": server.keep_accelerator,
        "minNumReplicas": server.min_replicas,
        "maxBatchSize": server.max_batch,
        "maxQueueSize": server.max_queue,
        "currentAlloc": allocation,
    }


def _load(view: ServerView, arrival_rps: float, served_rps: float) -> Spec:
    return {
        "arrivalRate": arrival_rps / _PER_MINUTE,
        "throughput": served_rps / _PER_MINUTE,
        "avgInTokens": round(_told(view.input_tokens)),
        "avgOutTokens": round(_told(view.output_tokens)),
    }


def _server(server: ServerSpec, view: ServerView, rate_rps: float, window_s: float) -> Spec:
    running = [r for r in view.replicas if r.phase != "draining"]
    counts = {name: sum(r.accelerator == name for r in running) for name in sorted({r.accelerator for r in running})}
    home = max(counts, key=lambda name: counts[name], default=server.current.accelerator)
    told = [r for r in view.ready if r.reported]
    allocation = {
        "accelerator": home,
        "numReplicas": len(running),
        "maxBatch": server.max_batch,
        "itlAverage": _mean(told, "itl_s") / _MS,
        "ttftAverage": _mean(told, "ttft_s") / _MS,
        "load": _load(view, rate_rps, view.completed / window_s),
    }
    return _spec(server, server.name, allocation)


def _replica(server: ServerSpec, view: ServerView, r: ReplicaView, window_s: float) -> Spec:
    served_rps = r.completed / window_s
    allocation = {
        "accelerator": r.accelerator,
        "numReplicas": 1,
        "maxBatch": server.max_batch,
        "itlAverage": _told(r.itl_s) / _MS,
        "ttftAverage": _told(r.ttft_s) / _MS,
        "load": _load(view, r.arrivals / window_s or served_rps, served_rps),
    }
    return _spec(server, f"{server.name}{_SEPARATOR}{r.name.replace(_SEPARATOR, '-')}", allocation)


def _told(value: float) -> float:
    """0 stands for what was not measured, as in their bodies."""
    return value if math.isfinite(value) else 0.0


def _mean(replicas: list[ReplicaView], name: str) -> float:
    """Over the requests that ended."""
    told = [(getattr(r, name), r.completed) for r in replicas if math.isfinite(getattr(r, name)) and r.completed]
    total = sum(n for _, n in told)
    return math.fsum(value * n for value, n in told) / total if total else 0.0
