"""The operator as kopf runs it: one daemon a Fleet, which reconciles from the whole state, turn after turn.

Nothing is kept that a restart could lose: what was asked for last is read from the scale targets, and an unknown
history counts as a move just made, so nothing is taken away at once. Status is written by server-side apply; conditions
say whether the resource is valid, its data fresh, and the last plan carried out. An event tells each change.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import httpx2
import kopf
from lightkube import ApiError, Client
from lightkube.generic_resource import create_namespaced_resource
from lightkube.resources.apps_v1 import Deployment
from lightkube.resources.autoscaling_v1 import HorizontalPodAutoscaler
from lightkube.types import PatchType

from flyball.adapters.fleet_export import FleetMetrics, FleetsMetrics
from flyball.adapters.kubernetes import FIELD_MANAGER, KubernetesCluster
from flyball.adapters.prometheus import PrometheusClient, PrometheusSource
from flyball.controller.adoption import adopted
from flyball.controller.resources import GROUP, VERSION, Fleet, fleet
from flyball.core.clock import Clock, SystemClock
from flyball.core.errors import InvalidInput
from flyball.core.fleet import FleetSpec
from flyball.planner.calibrated_loop import CalibratedLoop
from flyball.planner.cycle import Turn, turn
from flyball.planner.loop import FleetLoop, LoopMemory, LoopSettings
from flyball.planner.rehearsal import RehearsedLoop

FleetResource = create_namespaced_resource(GROUP, VERSION, "Fleet", "fleets")
ServiceClassResource = create_namespaced_resource(GROUP, VERSION, "ServiceClass", "serviceclasses")
AcceleratorResource = create_namespaced_resource(GROUP, VERSION, "Accelerator", "accelerators")
ModelProfileResource = create_namespaced_resource(GROUP, VERSION, "ModelProfile", "modelprofiles")
ScaledObject = create_namespaced_resource("keda.sh", "v1alpha1", "ScaledObject", "scaledobjects")

Condition = dict[str, Any]
_RETRY_S = 5.0  # after a turn that could not begin


class Reconciler:
    """One fleet's turns; `client` speaks to the API server, `metrics` tells what was decided."""

    def __init__(
        self,
        client: Client,
        namespace: str,
        name: str,
        clock: Clock | None = None,
        metrics: FleetsMetrics | None = None,
    ) -> None:
        self._client = client
        self._namespace = namespace
        self._name = name
        self._clock = clock or SystemClock()
        self._known: Fleet | None = None
        self._loop: FleetLoop | None = None
        self._memory = LoopMemory()
        self._prometheus: PrometheusClient | None = None
        self._told = FleetMetrics()
        self._metrics = metrics or FleetsMetrics()

    def close(self) -> None:
        """Let connections go, and take back what was advised."""
        self._metrics.forget(f"{self._namespace}/{self._name}")
        self._disconnect()

    def _disconnect(self) -> None:
        if self._prometheus is not None:
            self._prometheus.close()

    def reconcile(self) -> tuple[float, list[tuple[str, str]]]:
        """One turn: seconds until the next, and events (reason, message) to tell."""
        found: Any = self._client.get(FleetResource, self._name, namespace=self._namespace)
        resource: dict[str, Any] = found.to_dict()
        try:
            wanted = self._read(resource)
        except InvalidInput as error:
            self._write(resource, [_condition("Valid", False, "Invalid", str(error))], None)
            return _RETRY_S, [("Invalid", str(error))] if not _said(resource, "Valid", str(error)) else []
        self._take(wanted)
        assert self._loop is not None
        assert self._prometheus is not None
        cluster = KubernetesCluster(self._client, self._namespace, wanted.targets, clock=self._clock)
        source = PrometheusSource(self._prometheus, wanted.queries, cluster)
        acts = wanted.scales and not wanted.dry_run
        told, self._memory = turn(source, self._loop, cluster if acts else None, self._memory)
        self._told.record(told)
        self._write(resource, _conditions(told, acts), told)
        return wanted.settings.period_s, _events(told)

    def _read(self, resource: Mapping[str, Any]) -> Fleet:
        def every(kind: Any) -> list[dict[str, Any]]:  # noqa: ANN401  # lightkube's generic resources have no type
            found = [one.to_dict() for one in self._client.list(kind, namespace=self._namespace)]
            return sorted(found, key=lambda one: str(one["metadata"]["name"]))

        def present(kind: Any) -> list[dict[str, Any]]:  # noqa: ANN401  # as above
            try:
                return every(kind)
            except ApiError as error:
                if error.status.code == httpx2.codes.NOT_FOUND:
                    return []  # the cluster knows no such kind
                raise

        if resource.get("spec", {}).get("adopt"):
            scalers = [*every(HorizontalPodAutoscaler), *present(ScaledObject)]
            resource = adopted(resource, every(Deployment), scalers)
        return fleet(resource, every(ServiceClassResource), every(AcceleratorResource), every(ModelProfileResource))

    def _take(self, wanted: Fleet) -> None:
        """A new loop where the fleet's description changed; what was learnt of the load is kept."""
        if self._known is None or _governed(wanted) != _governed(self._known):
            self._loop = _loop(wanted)
        if self._prometheus is None or self._prometheus.url != wanted.prometheus_url.rstrip("/"):
            self._disconnect()
            self._prometheus = PrometheusClient(wanted.prometheus_url)
        if self._known is None or wanted.targets != self._known.targets:
            variants = {(server, t.accelerator): t.name for server, own in wanted.targets.items() for t in own}
            self._told = FleetMetrics(namespace=self._namespace, variants=variants)
            self._metrics.put(f"{self._namespace}/{self._name}", self._told)
        self._known = wanted

    def _write(self, resource: Mapping[str, Any], conditions: Sequence[Condition], told: Turn | None) -> None:
        """The status, by server-side apply; a condition keeps its time while its status stays."""
        before = {c["type"]: c for c in resource.get("status", {}).get("conditions", ())}
        now = datetime.fromtimestamp(self._clock.wall_s(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        for condition in conditions:
            old = before.get(condition["type"], {})
            same = old.get("status") == condition["status"]
            condition["lastTransitionTime"] = old.get("lastTransitionTime", now) if same else now
        status = {
            "observedGeneration": resource["metadata"].get("generation", 0),
            "conditions": list(conditions),
            "servers": resource.get("status", {}).get("servers", []) if told is None else _servers(told, resource),
        }
        body = {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": "Fleet",
            "metadata": {"name": self._name, "namespace": self._namespace},
            "status": status,
        }
        self._client.patch(
            FleetResource.Status, self._name, body, namespace=self._namespace, patch_type=PatchType.APPLY,
            field_manager=FIELD_MANAGER, force=True,
        )  # fmt: skip


def _governed(wanted: Fleet) -> tuple[FleetSpec, LoopSettings, bool]:
    """What a loop is made for."""
    return wanted.spec, wanted.settings, wanted.calibrate


def _loop(wanted: Fleet) -> FleetLoop:
    def rehearsed(spec: FleetSpec) -> FleetLoop:
        return RehearsedLoop(spec, wanted.settings)

    return CalibratedLoop(rehearsed, wanted.spec) if wanted.calibrate else rehearsed(wanted.spec)


def _condition(kind: str, good: bool, reason: str, message: str) -> Condition:
    return {"type": kind, "status": str(good), "reason": reason, "message": message[:1024]}


def _said(resource: Mapping[str, Any], kind: str, message: str) -> bool:
    conditions = resource.get("status", {}).get("conditions", ())
    return any(c["type"] == kind and c.get("message") == message for c in conditions)


def _conditions(told: Turn, acts: bool) -> list[Condition]:
    valid = _condition("Valid", True, "Read", "the fleet and all that it refers to were read")
    if told.decision is None:
        return [valid, _condition("DataFresh", False, "NoMetrics", told.blind)]
    held = [n for n, e in told.decision.explanations.items() if e.held]
    why = "; ".join(f"{n}: {told.decision.explanations[n].binding}" for n in held)
    refused = "; ".join(f"{n}: {why}" for n, why in told.refused.items())
    carried = "every server has the replicas decided" if acts else "advice only: nothing is scaled"
    return [
        valid,
        _condition("DataFresh", not held, "Held" if held else "Fresh", why or "every server reports"),
        _condition("Actuated", not refused, "Refused" if refused else "Done", refused or carried),
    ]


def _servers(told: Turn, resource: Mapping[str, Any]) -> list[dict[str, Any]]:
    if told.decision is None or told.state is None:
        return list(resource.get("status", {}).get("servers", []))
    found = []
    for name, explained in told.decision.explanations.items():
        view = told.state.servers.get(name)
        found.append(
            {
                "name": name,
                "desired": dict(told.decision.replicas.get(name, {})),
                "ready": 0 if view is None else view.count("ready"),
                "binding": explained.binding[:512],
                "reasons": [reason[:512] for reason in told.decision.reasons.get(name, ())],
                "held": explained.held,
            }
        )
    return found


def _events(told: Turn) -> list[tuple[str, str]]:
    """What changed in this turn, and what was refused."""
    if told.decision is None or told.state is None:
        return []
    events = [("Refused", f"{name}: {why}") for name, why in told.refused.items()]
    for name, counts in told.decision.replicas.items():
        view = told.state.servers.get(name)
        before = dict(view.wanted) if view is not None else {}
        if any(before.get(a, 0) != n for a, n in counts.items()) and name not in told.refused:
            said = ", ".join(f"{a} {before.get(a, 0)} -> {n}" for a, n in counts.items() if before.get(a, 0) != n)
            events.append(("Scaled", f"{name}: {said}: {'; '.join(told.decision.reasons.get(name, ()))}"[:1024]))
    return events


def registry(client: Client, metrics: FleetsMetrics | None = None) -> kopf.OperatorRegistry:
    """The handlers; kopf finds its credentials where kubectl does, or as a pod's. `metrics` tells all fleets' turns."""
    handlers = kopf.OperatorRegistry()

    @kopf.on.login(registry=handlers)
    def login(**given: Any) -> kopf.ConnectionInfo | None:  # noqa: ANN401  # what kopf passes, it takes back
        return kopf.login_with_service_account(**given) or kopf.login_with_kubeconfig(**given)

    @kopf.daemon(GROUP, VERSION, "fleets", registry=handlers, cancellation_timeout=10.0)
    async def govern(
        namespace: str | None, name: str, body: kopf.Body, stopped: kopf.DaemonStopped, logger: kopf.Logger, **_: object
    ) -> None:
        reconciler = Reconciler(client, namespace or "default", name, metrics=metrics)
        try:
            while not stopped:
                wait_s = _RETRY_S
                try:
                    wait_s, events = await asyncio.to_thread(reconciler.reconcile)
                    for reason, message in events:
                        kopf.event(
                            body, type="Normal" if reason == "Scaled" else "Warning", reason=reason, message=message
                        )
                except (ApiError, httpx2.HTTPError) as error:  # tried again from the whole state
                    logger.warning("the API server refused a turn of %s: %s", name, error)
                await stopped.wait(wait_s)
        finally:
            reconciler.close()

    return handlers
