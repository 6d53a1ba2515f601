"""Decisions as metrics, under llm-d's `wva_*` names and our own, so that HPA and KEDA objects written for it work.

An HPA takes `wva_desired_replicas{variant_name, exported_namespace}` with a target of 1 a replica: the label
`namespace` exported here is what Prometheus renames to `exported_namespace` when the scraped target has one of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Metric, generate_latest
from prometheus_client.registry import Collector

from flyball.core.observation import ServerView
from flyball.planner.cycle import Turn

_LABELS = ("variant_name", "namespace", "accelerator_type")


class FleetMetrics:
    """A registry that tells the last turn; `record` after each.

    A variant is a server, or where `variants` names them by server and accelerator, the object that is scaled: what an
    HPA written for llm-d asks for.
    """

    def __init__(
        self,
        namespaces: Mapping[str, str] | None = None,
        *,
        namespace: str = "",
        variants: Mapping[tuple[str, str], str] | None = None,
    ) -> None:
        self.registry = CollectorRegistry()
        self._namespaces = namespaces or {}  # by server
        self._namespace = namespace  # of all others
        self._variants = variants or {}
        self._before: dict[tuple[str, str], int] = {}

        def gauge(name: str, doc: str, labels: tuple[str, ...] = _LABELS) -> Gauge:
            return Gauge(name, doc, labels, registry=self.registry)

        def counter(name: str, doc: str, labels: tuple[str, ...]) -> Counter:
            return Counter(name, doc, labels, registry=self.registry)

        self._desired = gauge("wva_desired_replicas", "Replicas wanted.")
        self._current = gauge("wva_current_replicas", "Replicas that start or are ready.")
        self._ratio = gauge("wva_desired_ratio", "Replicas wanted over replicas there; the wanted ones where none are.")
        server = ("variant_name", "namespace")
        self._scaling = counter(
            "wva_replica_scaling",
            "Changes of the wanted replicas.",
            ("variant_name", "namespace", "direction", "reason"),
        )
        self._kv_used = gauge("wva_kv_cache_tokens_used", "KV tokens in use.", server)
        self._kv_capacity = gauge("wva_kv_cache_tokens_capacity", "KV tokens that ready replicas hold.", server)
        self._utilization = gauge("wva_saturation_utilization", "Demand over what ready replicas take.", server)
        self._required = gauge("wva_required_capacity", "Requests/s that replicas are lacking for.", server)
        self._spare = gauge("wva_spare_capacity", "Requests/s that could come yet.", server)
        self._limited = counter("wva_decisions_limited", "Decisions that a cap held back.", server)
        self._models = Gauge("wva_models_processed", "Servers in the last decision.", registry=self.registry)
        self._active = Gauge("wva_optimizer_active", "Whether the last turn decided.", registry=self.registry)
        self._errors = counter("wva_errors", "Turns that failed.", ("kind",))
        self._up = Gauge("wva_saturation_metrics_up", "Whether metrics could be read.", registry=self.registry)
        self._held = gauge("flyball_server_held", "Whether the last plan is held for want of metrics.", server)
        self._cost = gauge("flyball_server_cost_per_hour", "Cost of the replicas wanted.", server)
        self._demand = gauge("flyball_server_demand_requests_per_second", "Demand that was sized for.", server)

    def record(self, told: Turn) -> None:
        """Tell one turn."""
        self._up.set(told.state is not None)
        self._active.set(told.decision is not None)
        if told.blind:
            self._errors.labels("observation").inc()
        for _ in told.refused:
            self._errors.labels("actuation").inc()
        if told.decision is None or told.state is None:
            return
        self._models.set(len(told.decision.explanations))
        for name, explained in told.decision.explanations.items():
            at = name, self._namespaces.get(name, self._namespace)
            self._held.labels(*at).set(explained.held)
            self._cost.labels(*at).set(explained.cost_per_h)
            if "held back" in " ".join(told.decision.reasons.get(name, ())):
                self._limited.labels(*at).inc()
            self._capacity(at, explained.figures, told.state.servers.get(name))
            for accelerator, count in told.decision.replicas.get(name, {}).items():
                self._count(name, accelerator, count, told.state.servers.get(name), explained.binding)

    def _count(self, name: str, accelerator: str, count: int, view: ServerView | None, why: str) -> None:
        variant = self._variants.get((name, accelerator), name)
        at = variant, self._namespaces.get(name, self._namespace), accelerator
        have = 0 if view is None else sum(
            r.accelerator == accelerator and r.phase != "draining" for r in view.replicas
        )  # fmt: skip
        self._desired.labels(*at).set(count)
        self._current.labels(*at).set(have)
        self._ratio.labels(*at).set(count / have if have else count)
        before = self._before.get((name, accelerator), have)
        if count != before:
            reason = "capped" if "in use" in why else "demand"
            self._scaling.labels(variant, at[1], "up" if count > before else "down", reason).inc()
        self._before[name, accelerator] = count

    def _capacity(self, at: tuple[str, str], figures: Mapping[str, float], view: ServerView | None) -> None:
        if view is None:
            return
        ready = [r for r in view.ready if r.reported]
        self._kv_used.labels(*at).set(sum(r.kv_used * r.kv_capacity_tokens for r in ready))
        self._kv_capacity.labels(*at).set(sum(r.kv_capacity_tokens for r in ready))
        if "demand_rps" in figures and "capacity_rps" in figures:
            demand, supply = figures["demand_rps"], figures["capacity_rps"] * len(ready)
            self._demand.labels(*at).set(demand)
            self._utilization.labels(*at).set(demand / supply if supply else 0.0)
            self._required.labels(*at).set(max(demand - supply, 0.0))
            self._spare.labels(*at).set(max(supply - demand, 0.0))

    def exposition(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class FleetsMetrics(Collector):
    """The metrics of several fleets in one registry, told apart by the label `fleet`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._fleets: dict[str, FleetMetrics] = {}

    def put(self, fleet: str, metrics: FleetMetrics) -> None:
        """Tell a fleet's metrics from now on, in place of those it had."""
        self._fleets[fleet] = metrics

    def forget(self, fleet: str) -> None:
        """A fleet is no longer governed: what was wanted of it last is no advice."""
        self._fleets.pop(fleet, None)

    def collect(self) -> Iterable[Metric]:
        """Every metric once, with the samples of all fleets."""
        found: dict[str, Metric] = {}
        for fleet, metrics in sorted(self._fleets.items()):
            for one in metrics.registry.collect():
                into = found.setdefault(one.name, Metric(one.name, one.documentation, one.type))
                into.samples += [s._replace(labels={**s.labels, "fleet": fleet}) for s in one.samples]
        return found.values()
