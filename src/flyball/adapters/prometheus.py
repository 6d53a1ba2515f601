"""A fleet's state from a Prometheus server, over its HTTP API (a `core.ports.MetricsSource`).

Which replicas there are, and which of them start or drain, is the cluster's to say (`Inventory`); Prometheus says what
they do. A replica that Prometheus does not scrape, or not lately, is marked as not reporting: none of its numbers is
taken for a zero. Where no inventory is given, what Prometheus scrapes is taken for what there is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

import httpx

from flyball.adapters.fleet_metrics import IDENTITY, Dialect, dialect, queries, selector
from flyball.core.errors import InvalidInput, ObservationFailed
from flyball.core.observation import FleetState, Phase, ReplicaView, ServerView

Labels = Mapping[str, str]
STALE_S = 60.0  # since a replica was scraped last, beyond which it is not reporting


@dataclass(frozen=True, slots=True)
class Series:
    """One value of an instant query."""

    labels: Labels
    value: float
    at_s: float


class PrometheusClient:
    """Instant queries."""

    def __init__(self, url: str, *, token: str | None = None, timeout_s: float = 10.0, verify: bool = True) -> None:
        self.url = url.rstrip("/")
        self._client = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=timeout_s,
            trust_env=False,
            verify=verify,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let connections go."""
        self._client.close()

    def query(self, promql: str, at_s: float | None = None) -> list[Series]:
        """The series of an instant query, now or at a time; raises ObservationFailed when there is no answer."""
        data = {"query": promql} if at_s is None else {"query": promql, "time": f"{at_s:.3f}"}
        try:
            reply = self._client.post("/api/v1/query", data=data)
            body: Any = reply.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            why = str(error) or type(error).__name__
            raise ObservationFailed(f"Prometheus at {self.url} does not answer ({why}); the last plan stands") from None
        if not isinstance(body, dict) or body.get("status") != "success":
            told = body.get("error", reply.status_code) if isinstance(body, dict) else reply.status_code
            raise ObservationFailed(f"Prometheus at {self.url} refused the query {promql!r}: {told}")
        found = body.get("data", {})
        if found.get("resultType") == "scalar":
            return [_series({}, found["result"])]
        return [_series(one.get("metric", {}), one["value"]) for one in found.get("result", [])]


def _series(labels: Labels, value: Sequence[Any]) -> Series:
    return Series(labels, float(value[1]), float(value[0]))


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownReplica:
    """A replica as its cluster knows it."""

    name: str
    accelerator: str
    phase: Phase
    age_s: float
    instance: str  # the value of its `instance` or `pod` label


class Inventory(Protocol):
    """What a cluster knows of its replicas."""

    def replicas(self, server: str) -> Sequence[KnownReplica]:
        """All that start, run or drain; raises ObservationFailed when the cluster does not answer."""
        ...

    def wanted(self, server: str) -> Mapping[str, int]:
        """Replicas asked for last, by accelerator; empty where nothing was."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerQuery:
    """How one server is found in Prometheus."""

    engine: str = "flyball"  # whose names its metrics have
    matchers: Labels = field(default_factory=dict)  # labels of its replicas' series
    accelerator: str = ""  # of its replicas, where there is no inventory and no label `accelerator`
    arrivals: str = ""  # PromQL of requests that arrived, "{window}" standing for the range; "": nobody counts them
    queued: str = ""  # PromQL of requests that wait at the gateway
    good: str = ""  # PromQL of requests that saw what was promised


def gateway_queries(server: str) -> dict[str, str]:
    """Queries for what our own gateway counts of a server (`flyball.adapters.gateway`)."""
    named = {"server": server}
    return {
        "arrivals": f"sum(increase({selector('gateway_requests_total', named)}[{{window}}]))",
        "queued": f"sum({selector('gateway_requests_queued', named)})",
    }


def scheduler_queries(model: str) -> dict[str, str]:
    """Queries for what the Gateway API's endpoint picker counts of a model (llm-d)."""
    named = {"target_model_name": model}
    attempts = selector("inference_extension_scheduler_attempts_total", {**named, "status": "success"})
    return {
        "arrivals": f"sum(increase({attempts}[{{window}}]))",
        "queued": f"sum({selector('inference_extension_flow_control_queue_size', named)})",
    }


class PrometheusSource:
    """The fleet's state by one server's queries after the other."""

    def __init__(
        self,
        client: PrometheusClient,
        servers: Mapping[str, ServerQuery],
        inventory: Inventory | None = None,
        *,
        stale_s: float = STALE_S,
    ) -> None:
        if not servers:
            raise InvalidInput("no server to read metrics of; name at least one")
        self._client = client
        self._servers = servers
        self._inventory = inventory
        self._stale_s = stale_s
        self._dialects: dict[str, Dialect] = {name: dialect(one.engine) for name, one in servers.items()}

    def observe(self, window_s: float) -> FleetState:
        """The fleet at the Prometheus server's time."""
        clock = self._client.query("time()")
        if not clock:
            raise ObservationFailed(f"Prometheus at {self._client.url} tells no time; the last plan stands")
        now_s = clock[0].value
        views = {name: self._view(name, one, window_s, now_s) for name, one in self._servers.items()}
        return FleetState(now_s=now_s, window_s=window_s, servers=views)

    def _view(self, name: str, one: ServerQuery, window_s: float, now_s: float) -> ServerView:
        up = self._client.query(selector("up", one.matchers), now_s)
        scraped = {_identity(s.labels): s for s in up}
        asked = queries(self._dialects[name], one.matchers, window_s)
        numbers = {
            key: {_identity(s.labels): s for s in self._client.query(text, now_s)} for key, text in asked.items()
        }
        fresh = self._fresh(name, one, now_s)
        known = self._known(name, one, scraped)
        replicas = tuple(_replica(r, scraped, fresh, numbers) for r in known)
        reporting = [r for r in replicas if r.reported]
        completed = sum(r.completed for r in reporting)
        prompt, generated = (sum(getattr(r, f) for r in reporting) for f in ("prompt_tokens", "generated_tokens"))
        arrived = self._number(one.arrivals, window_s, now_s)
        queued = self._number(one.queued, window_s, now_s)
        good = self._number(one.good, window_s, now_s)
        return ServerView(
            name=name,
            arrivals=None if arrived is None else round(arrived),
            queued=round(queued or 0.0),
            input_tokens=prompt / completed if completed else math.nan,
            output_tokens=generated / completed if completed else math.nan,
            completed=completed,
            good=None if good is None else round(good),
            wanted={} if self._inventory is None else dict(self._inventory.wanted(name)),
            replicas=replicas,
        )

    def _fresh(self, name: str, one: ServerQuery, now_s: float) -> set[str]:
        """Replicas scraped lately: `timestamp` tells when, where the instant query may answer with what is old."""
        running = selector(self._dialects[name].running, one.matchers)
        stamps = self._client.query(f"timestamp({running})", now_s)
        return {_identity(s.labels) for s in stamps if now_s - s.value <= self._stale_s}

    def _known(self, name: str, one: ServerQuery, scraped: Mapping[str, Series]) -> Sequence[KnownReplica]:
        if self._inventory is not None:
            return self._inventory.replicas(name)
        return [
            KnownReplica(
                name=instance,
                accelerator=series.labels.get("accelerator", one.accelerator),
                phase="ready",
                age_s=0.0,
                instance=instance,
            )
            for instance, series in sorted(scraped.items())
        ]

    def _number(self, promql: str, window_s: float, now_s: float) -> float | None:
        """One number, or None where no query is given or nothing answers it."""
        if not promql:
            return None
        found = self._client.query(promql.replace("{window}", f"{max(round(window_s * 1000), 1)}ms"), now_s)
        values = [s.value for s in found if math.isfinite(s.value)]
        return sum(values) if values else None


def _identity(labels: Labels) -> str:
    """The label that tells replicas apart: the pod's where there is one."""
    return next((labels[label] for label in reversed(IDENTITY) if labels.get(label)), "")


def _replica(
    known: KnownReplica,
    scraped: Mapping[str, Series],
    fresh: set[str],
    numbers: Mapping[str, Mapping[str, Series]],
) -> ReplicaView:
    at = known.instance
    up = scraped.get(at)
    reported = up is not None and up.value == 1.0 and at in fresh
    if not reported:
        return ReplicaView(
            name=known.name, accelerator=known.accelerator, phase=known.phase, age_s=known.age_s,
            reported=known.phase == "starting",  # who starts has nothing to say yet
        )  # fmt: skip

    def number(key: str, default: float = 0.0) -> float:
        series = numbers.get(key, {}).get(at)
        return default if series is None or math.isnan(series.value) else series.value

    return ReplicaView(
        name=known.name,
        accelerator=known.accelerator,
        phase=known.phase,
        age_s=known.age_s,
        running=number("running"),
        waiting=number("waiting"),
        kv_used=number("kv_used"),
        kv_capacity_tokens=round(number("kv_tokens") or _blocks(numbers.get("kv_info", {}).get(at))),
        completed=round(number("completed")),
        generated_tokens=round(number("generated_tokens")),
        prompt_tokens=round(number("prompt_tokens")),
        ttft_s=number("ttft_s", math.nan),
        itl_s=number("itl_s", math.nan),
        ttft_p90_s=number("ttft_p90_s", math.nan),
        itl_p90_s=number("itl_p90_s", math.nan),
        prefix_hits=number("prefix_hits"),
    )


def _blocks(info: Series | None) -> float:
    try:
        return 0.0 if info is None else float(info.labels["num_gpu_blocks"]) * float(info.labels["block_size"])
    except (KeyError, ValueError):
        return 0.0
