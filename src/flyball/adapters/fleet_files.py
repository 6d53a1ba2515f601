"""Fleet specs on disk, and plans as others read them.

Three forms of a spec: llm-inferno's SystemData in one JSON file, a folder of their `*-data.json` files, and our own
YAML (docs/guide/plan.md). Theirs count in milliseconds and requests per minute, accept keys in any case, take a missing
value for zero and ignore what they do not know; ours is strict about names and states units in them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flyball.adapters.fields import Fields, read_fields
from flyball.core.errors import InvalidInput
from flyball.core.fleet import (
    LOWEST_PRIORITY,
    SATURATION_POLICIES,
    Accelerator,
    Allocation,
    Demand,
    FleetPlan,
    FleetSpec,
    LatencyProfile,
    Placement,
    PowerCurve,
    ServerSpec,
    ServiceClass,
    Targets,
)
from flyball.core.slo import SloBound
from flyball.planner.stages import split_stages

_MS = 1e-3
_PER_MINUTE = 1 / 60
_FILES = {  # of a folder: section of SystemData -> file
    "acceleratorData": "accelerator-data.json",
    "modelData": "model-data.json",
    "serviceClassData": "serviceclass-data.json",
    "serverData": "server-data.json",
    "optimizerData": "optimizer-data.json",
    "capacityData": "capacity-data.json",
}
_HARDWARE = ("memory_gb", "memory_gb_s", "compute_tflops")
_OPTIONAL = {"optimizerData", "capacityData"}
DEFAULT_MAX_QUEUE = 128  # of our YAML: an engine queues what it cannot serve at once


def read_fleet(path: Path) -> FleetSpec:
    """The spec in a SystemData file, in a folder of `*-data.json` files, or in our YAML."""
    if path.is_dir():
        return _system(_folder(path))
    fields = read_fields(path)
    if "system" in fields:
        return _system(fields.inside("system").inside)
    if "servers" in fields:
        return _ours(fields)
    raise InvalidInput(
        f"{path} has neither 'system' (llm-inferno's SystemData) nor 'servers' (our YAML); give a fleet spec"
    )


def fleet_from_body(body: Fields) -> FleetSpec:
    """The spec in a SystemData body."""
    if "system" not in body:
        raise InvalidInput(f"{body.path} has no 'system'; give llm-inferno's SystemData")
    return _system(body.inside("system").inside)


def _folder(path: Path) -> Callable[[str], Fields]:
    def section(name: str) -> Fields:
        file = path / _FILES[name]
        if not file.is_file() and name in _OPTIONAL:
            return Fields({}, str(file))
        if not file.is_file():
            raise InvalidInput(f"the folder {path} has no {_FILES[name]}; add it, or give one SystemData file")
        return read_fields(file)

    return section


def _system(section: Callable[[str], Fields]) -> FleetSpec:
    """SystemData, from a function that gives its sections."""
    servers = tuple(system_server(f) for f in section("serverData").each("servers"))
    if not servers:
        raise InvalidInput(f"{section('serverData').path} lists no servers; add at least one to plan for")
    return FleetSpec(
        accelerators=tuple(system_accelerator(f) for f in section("acceleratorData").each("accelerators")),
        profiles=tuple(system_profile(f) for f in section("modelData").each("models")),
        service_classes=tuple(system_class(f) for f in section("serviceClassData").each("serviceClasses")),
        servers=servers,
        capacity={f.text("type", None): f.whole("count") for f in section("capacityData").each("count")},
        **_system_settings(section("optimizerData").inside("optimizer")),
    )


def system_accelerator(f: Fields) -> Accelerator:
    """One of SystemData's accelerators; a power curve without a middle point is straight."""
    power = f.inside("power")
    middle = power.number("midUtil")
    bent = 0 < middle < 1
    curve = PowerCurve(
        idle_w=power.number("idle"),
        full_w=power.number("full"),
        middle_w=power.number("midPower") if bent else None,
        middle_at=middle if bent else 0.5,
    )
    return Accelerator(
        name=f.text("name", None),
        type=f.text("type") or f.text("name"),
        units=f.whole("multiplicity") or 1,
        cost_per_h=f.number("cost"),
        memory_gb=f.number("memSize"),
        memory_gb_s=f.number("memBW"),
        power=curve if "power" in f else None,
    )


def system_class(f: Fields) -> ServiceClass:
    """One of SystemData's service classes; a priority out of range is the lowest."""
    priority = f.whole("priority", low=-1 << 31)
    return ServiceClass(
        name=f.text("name", None),
        priority=priority if 1 <= priority <= LOWEST_PRIORITY else LOWEST_PRIORITY,
        targets={t.text("model", None): system_targets(t) for t in f.each("modelTargets")},
    )


def _system_settings(f: Fields) -> dict[str, Any]:
    return {
        "unlimited": f.flag("unlimited"),
        "heterogeneous": f.flag("heterogeneous"),
        "delayed_best_effort": f.flag("delayedBestEffort"),
        "saturation_policy": f.choice("saturationPolicy", SATURATION_POLICIES),
    }


def system_profile(f: Fields) -> LatencyProfile:
    """One of SystemData's models on one accelerator."""
    parameters = f.inside("perfParms")
    return LatencyProfile(
        model=f.text("name", None),
        accelerator=f.text("acc", None),
        alpha_s=parameters.number("alpha") * _MS,
        beta_s=parameters.number("beta") * _MS,
        gamma_s=parameters.number("gamma") * _MS,
        max_batch=f.whole("maxBatchSize"),
        at_tokens=f.whole("atTokens"),
        accelerators=f.whole("accCount") or 1,
    )


def system_targets(f: Fields) -> Targets:
    """Targets of a class for one model, as SystemData has them."""
    return Targets(
        ttft_s=f.number("slo-ttft") * _MS or None,
        itl_s=f.number("slo-itl") * _MS or None,
        output_tps=f.number("slo-tps") or None,
    )


def system_server(f: Fields) -> ServerSpec:
    """One of SystemData's servers."""
    current = f.inside("currentAlloc")
    load = current.inside("load")
    return ServerSpec(
        name=f.text("name", None),
        service_class=f.text("class"),
        model=f.text("model"),
        demand=Demand(
            arrival_rps=load.number("arrivalRate") * _PER_MINUTE,
            input_tokens=load.number("avgInTokens"),
            output_tokens=load.number("avgOutTokens"),
        ),
        min_replicas=f.whole("minNumReplicas"),
        max_batch=f.whole("maxBatchSize"),
        max_queue=f.whole("maxQueueSize"),
        keep_accelerator=f.flag("keepAccelerator"),
        current=Placement(
            accelerator=current.text("accelerator"),
            replicas=current.whole("numReplicas"),
            cost_per_h=current.number("cost"),
        ),
    )


def _ours(fields: Fields) -> FleetSpec:
    """Our own YAML."""
    fields.only(
        "accelerators", "capacity", "profiles", "service_classes", "servers", "unlimited", "heterogeneous", "quotas",
        "budget_per_h", "power_limit_w", "energy_price_per_kwh", "horizon_h", "saturation_policy",
        "delayed_best_effort",
    )  # fmt: skip
    apart = frozenset(f.text("name") for f in fields.each("servers") if f.flag("disaggregated"))
    spec = FleetSpec(
        accelerators=tuple(
            Accelerator(
                name=f.only("name", "type", "units", "cost_per_h", "startup_cost", "power", *_HARDWARE).text(
                    "name", None
                ),
                type=f.text("type") or f.text("name"),
                units=f.whole("units", 1, low=1),
                cost_per_h=f.number("cost_per_h", None),
                startup_cost=f.number("startup_cost"),
                power=_our_power(f.inside("power")) if "power" in f else None,
                **{name: f.number(name) for name in _HARDWARE},
            )
            for f in fields.each("accelerators")
        ),
        profiles=tuple(_our_profile(f) for f in fields.each("profiles")),
        service_classes=tuple(
            ServiceClass(
                name=f.only("name", "priority", "targets").text("name", None),
                priority=f.whole("priority", LOWEST_PRIORITY, low=1),
                targets={model: _our_targets(t) for model, t in f.inside("targets").entries()},
            )
            for f in fields.each("service_classes")
        ),
        servers=tuple(_our_server(f) for f in fields.each("servers")),
        capacity=dict(fields.inside("capacity").numbers()),
        unlimited=fields.flag("unlimited"),
        heterogeneous=fields.flag("heterogeneous"),
        quotas={name: dict(cards.numbers()) for name, cards in fields.inside("quotas").entries()},
        budget_per_h=fields.number("budget_per_h", None) if "budget_per_h" in fields else None,
        power_limit_w=fields.number("power_limit_w", None) if "power_limit_w" in fields else None,
        energy_price_per_kwh=fields.number("energy_price_per_kwh"),
        horizon_h=fields.number("horizon_h", 1.0),
        saturation_policy=fields.choice("saturation_policy", SATURATION_POLICIES),
        delayed_best_effort=fields.flag("delayed_best_effort"),
    )
    return split_stages(spec, apart)


def _our_power(f: Fields) -> PowerCurve:
    f.only("idle_w", "full_w", "middle_w", "middle_at")
    return PowerCurve(
        idle_w=f.number("idle_w", None),
        full_w=f.number("full_w", None),
        middle_w=f.number("middle_w", None) if "middle_w" in f else None,
        middle_at=f.number("middle_at", 0.5),
    )


def _our_profile(f: Fields) -> LatencyProfile:
    f.only(
        "model", "accelerator", "alpha_ms", "beta_ms", "gamma_ms", "max_batch", "at_tokens", "max_step_tokens",
        "accelerators", "queue_model", "delta_ms", "kv_tokens",
    )  # fmt: skip
    return LatencyProfile(
        model=f.text("model", None),
        accelerator=f.text("accelerator", None),
        alpha_s=f.number("alpha_ms", None) * _MS,
        beta_s=f.number("beta_ms", None) * _MS,
        gamma_s=f.number("gamma_ms", None) * _MS,
        delta_s=f.number("delta_ms") * _MS,
        max_batch=f.whole("max_batch"),
        at_tokens=f.whole("at_tokens"),
        max_step_tokens=f.whole("max_step_tokens"),
        accelerators=f.whole("accelerators", 1, low=1),
        queue_model=f.text("queue_model", "v3"),
        kv_tokens=f.whole("kv_tokens"),
    )


def _our_targets(f: Fields) -> Targets:
    limits: dict[str, float] = {}
    bounds: list[SloBound] = []
    for text in f.only("slo", "output_tps", "max_loss").items("slo"):
        bound = SloBound.parse(str(text))
        if bound.metric == "tpot" and bound.percentile is not None:
            raise InvalidInput(f"{f.path}.slo has {text!r}; a plan holds percentiles of ttft, itl and e2e, use p99_itl")
        if bound.percentile is None and bound.metric != "e2e":
            limits[f"{bound.metric.replace('tpot', 'itl')}_s"] = bound.limit_s
        else:
            bounds.append(bound)
    return Targets(
        output_tps=f.number("output_tps") or None,
        bounds=tuple(bounds),
        max_loss=f.number("max_loss") or None,
        **limits,
    )


def _our_server(f: Fields) -> ServerSpec:
    f.only(
        "name", "class", "model", "arrival_rps", "input_tokens", "output_tokens", "min_replicas", "max_batch",
        "max_queue", "keep_accelerator", "current", "max_replicas", "quota", "input_cv", "output_cv", "prefix_hit",
        "disaggregated",
    )  # fmt: skip
    current = f.inside("current").only("accelerator", "replicas", "cost_per_h")
    return ServerSpec(
        name=f.text("name", None),
        service_class=f.text("class", None),
        model=f.text("model", None),
        demand=Demand(
            arrival_rps=f.number("arrival_rps", None),
            input_tokens=f.number("input_tokens", None),
            output_tokens=f.number("output_tokens", None),
            input_cv=f.number("input_cv", None) if "input_cv" in f else None,
            output_cv=f.number("output_cv", None) if "output_cv" in f else None,
            prefix_hit=f.number("prefix_hit"),
        ),
        min_replicas=f.whole("min_replicas"),
        max_replicas=f.whole("max_replicas", low=1) if "max_replicas" in f else None,
        quota=f.text("quota"),
        max_batch=f.whole("max_batch"),
        max_queue=f.whole("max_queue", DEFAULT_MAX_QUEUE),
        keep_accelerator=f.flag("keep_accelerator"),
        current=Placement(
            accelerator=current.text("accelerator"),
            replicas=current.whole("replicas"),
            cost_per_h=current.number("cost_per_h"),
        ),
    )


def _part(a: Allocation) -> dict[str, Any]:
    return {
        "accelerator": a.accelerator,
        "numReplicas": a.replicas,
        "maxBatch": a.max_batch,
        "cost": a.cost_per_h,
        "itlAverage": a.itl_s / _MS,
        "ttftAverage": a.ttft_s / _MS,
        **({"powerW": a.power_w} if a.power_w else {}),
    }


def allocation_solution(spec: FleetSpec, plan: FleetPlan) -> dict[str, Any]:
    """A plan as llm-inferno's AllocationSolution, with `totalCost`, and `unserved` with reasons where there are any.

    A load's `throughput` is what the queue model expects to be served: less than the arrivals where a queue overflows.
    """
    servers = {s.name: s for s in spec.servers}
    allocations = {}
    for name, a in plan.allocations.items():
        demand = servers[name].demand
        allocations[name] = {
            **_part(a),
            **({} if a.slo_met else {"sloMet": False}),
            **({"also": [_part(part) for part in a.also]} if a.also else {}),
            "load": {
                "arrivalRate": demand.arrival_rps / _PER_MINUTE,
                "throughput": demand.arrival_rps * (1 - a.loss) / _PER_MINUTE,
                "avgInTokens": round(demand.input_tokens),
                "avgOutTokens": round(demand.output_tokens),
            },
        }
    unserved = {"unserved": dict(plan.unserved)} if plan.unserved else {}
    return {"allocations": allocations, "totalCost": plan.cost_per_h, **unserved}
