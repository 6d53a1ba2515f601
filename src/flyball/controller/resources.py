"""Our custom resources (deploy/crds): from what people write to the planner's words.

An API server checks types and ranges by the resources' schemas. What no schema can say, such as a server whose class
does not exist, raises InvalidInput, and its sentence becomes the condition's message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flyball.adapters.fields import Fields
from flyball.adapters.fleet_files import DEFAULT_MAX_QUEUE
from flyball.adapters.kubernetes import ScaleTarget
from flyball.adapters.prometheus import ServerQuery, gateway_queries
from flyball.core.errors import InvalidInput
from flyball.core.fleet import (
    LOWEST_PRIORITY,
    Accelerator,
    Demand,
    FleetSpec,
    LatencyProfile,
    ServerSpec,
    ServiceClass,
    Targets,
)
from flyball.planner.loop import LoopSettings

GROUP, VERSION = "flyball.dev", "v1alpha1"
_MS = 1e-3

Resource = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """A fleet resource with all that it refers to."""

    spec: FleetSpec
    settings: LoopSettings
    targets: Mapping[str, Sequence[ScaleTarget]]
    queries: Mapping[str, ServerQuery]
    prometheus_url: str
    dry_run: bool
    scales: bool  # False: only metrics are published, for an HPA or KEDA to act on
    calibrate: bool  # whether what replicas show corrects the profiles


def fleet(
    resource: Resource, classes: Sequence[Resource], accelerators: Sequence[Resource], profiles: Sequence[Resource]
) -> Fleet:
    """The fleet that a resource describes; raises InvalidInput where its parts do not fit together."""
    f = Fields(resource.get("spec", {}), f"fleet {_name(resource)}")
    servers = tuple(f.each("servers"))
    if not servers:
        raise InvalidInput(f"{f.path} has no servers; list them, or set adopt and label the Deployments to be adopted")
    spec = FleetSpec(
        accelerators=_accelerators(accelerators, servers),
        profiles=tuple(_profile(r) for r in profiles),
        service_classes=tuple(_class(r) for r in classes),
        servers=tuple(_server(s) for s in servers),
        capacity=dict(f.inside("capacity").numbers()),
        unlimited="capacity" not in f,
    )
    _fits(spec, servers)
    return Fleet(
        spec=spec,
        settings=LoopSettings(
            analyzers=tuple(str(a) for a in f.items("analyzers")) or ("slo",),
            period_s=f.number("periodSeconds", 15.0, low=1.0),
            start_up_s=f.number("startUpSeconds", 120.0, low=1.0),
            retention_s=f.number("retentionSeconds", 600.0, low=1.0),
            forecast=f.text("forecast", "portfolio"),
            budget_per_h=f.number("budgetPerHour") if "budgetPerHour" in f else None,
        ),
        targets={s.text("name"): tuple(_target(t) for t in s.each("scaleTargets")) for s in servers},
        queries={s.text("name"): _query(s) for s in servers},
        prometheus_url=f.inside("prometheus").text("url", None),
        dry_run=f.flag("dryRun"),
        scales=f.text("actuation", "direct") == "direct",
        calibrate=f.flag("calibrate", True),
    )


def _name(resource: Resource) -> str:
    return str(resource["metadata"]["name"])


def _accelerators(resources: Sequence[Resource], servers: Sequence[Fields]) -> tuple[Accelerator, ...]:
    """Those with a resource, and those that adopted targets run on, at the cost that their labels say."""
    known = {one.name: one for one in map(_accelerator, resources)}
    stated: dict[str, float] = {}
    for target in (t for s in servers for t in s.each("scaleTargets") if "cost" in t):
        name, cost = target.text("accelerator", None), target.number("cost")
        if name not in known and stated.setdefault(name, cost) != cost:
            raise InvalidInput(
                f"variants on {name!r} are said to cost {stated[name]:g} and {cost:g}; create the Accelerator {name!r}"
            )
    priced = (Accelerator(name=name, type=name, cost_per_h=c) for name, c in stated.items() if name not in known)
    return (*known.values(), *priced)


def _accelerator(r: Resource) -> Accelerator:
    f = Fields(r.get("spec", {}), f"accelerator {_name(r)}")
    return Accelerator(
        name=_name(r), type=f.text("type") or _name(r), units=f.whole("units", 1, low=1),
        cost_per_h=f.number("costPerHour", None),
    )  # fmt: skip


def _profile(r: Resource) -> LatencyProfile:
    f = Fields(r.get("spec", {}), f"model profile {_name(r)}")
    return LatencyProfile(
        model=f.text("model", None),
        accelerator=f.text("accelerator", None),
        alpha_s=f.number("alphaMs", None) * _MS,
        beta_s=f.number("betaMs", None) * _MS,
        gamma_s=f.number("gammaMs", None) * _MS,
        max_batch=f.whole("maxBatch"),
        accelerators=f.whole("accelerators", 1, low=1),
        queue_model=f.text("queueModel", "v3"),
    )


def _class(r: Resource) -> ServiceClass:
    f = Fields(r.get("spec", {}), f"service class {_name(r)}")
    return ServiceClass(
        name=_name(r),
        priority=f.whole("priority", LOWEST_PRIORITY, low=1),
        targets={
            t.text("model", None): Targets(
                ttft_s=t.number("ttftMs") * _MS or None,
                itl_s=t.number("itlMs") * _MS or None,
                output_tps=t.number("tokensPerSecond") or None,
            )
            for t in f.each("targets")
        },
    )


def _server(f: Fields) -> ServerSpec:
    return ServerSpec(
        name=f.text("name", None),
        service_class=f.text("serviceClass", None),
        model=f.text("model", None),
        demand=Demand(input_tokens=f.number("inputTokens"), output_tokens=f.number("outputTokens")),
        min_replicas=f.whole("minReplicas"),
        max_batch=f.whole("maxBatch"),
        max_queue=f.whole("maxQueue", DEFAULT_MAX_QUEUE),
    )


def _target(f: Fields) -> ScaleTarget:
    kind = f.choice("kind", ("Deployment", "LeaderWorkerSet"))
    return ScaleTarget(
        accelerator=f.text("accelerator", None),
        name=f.text("name", None),
        kind="LeaderWorkerSet" if kind == "LeaderWorkerSet" else "Deployment",
    )


def _query(f: Fields) -> ServerQuery:
    name, metrics = f.text("name"), f.inside("metrics")
    usual = gateway_queries(name)
    matchers = metrics.inside("matchLabels")
    return ServerQuery(
        engine=metrics.text("engine", "flyball"),
        matchers={label: matchers.text(label) for label in matchers.names()} or {"server": name},
        arrivals=metrics.text("arrivals") or usual["arrivals"],
        queued=metrics.text("queued") or usual["queued"],
    )


def _fits(spec: FleetSpec, servers: Sequence[Fields]) -> None:
    """What no schema can say."""
    classes, known = {c.name: c for c in spec.service_classes}, {a.name for a in spec.accelerators}
    for server, f in zip(spec.servers, servers, strict=True):
        if server.service_class not in classes:
            raise InvalidInput(
                f"server {server.name!r} is of class {server.service_class!r}, which does not exist; create it"
            )
        if server.model not in classes[server.service_class].targets:
            raise InvalidInput(
                f"class {server.service_class!r} promises nothing for model {server.model!r}; add targets for it"
            )
        for target in f.each("scaleTargets"):
            if target.text("accelerator") not in known:
                raise InvalidInput(
                    f"server {server.name!r} has a target on {target.text('accelerator')!r}, which is no accelerator "
                    "of this namespace; create it"
                )
