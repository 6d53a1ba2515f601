"""Workloads that others' labels describe, as servers of a fleet: llm-inferno's on Deployments, llm-d's on autoscalers.

llm-inferno (labels of a Deployment): `inferno.server.managed=true`, `.name`, `.model`, `.class`,
`.allocation.accelerator|maxbatchsize|maxqueuesize`, `.load.intokens|outtokens` (and `.load.nominal.*`).

llm-d (annotations of an HPA or a KEDA ScaledObject): `llm-d.ai/managed: "true"`, `llm-d.ai/model-id`,
`llm-d.ai/variant-cost`; the Deployment it targets is one variant of the model. All variants of a model are one server.
What a variant costs is the price of an accelerator that has no resource of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from flyball.adapters.prometheus import gateway_queries, scheduler_queries
from flyball.core.errors import InvalidInput

INFERNO, LLM_D = "inferno.server.", "llm-d.ai/"
_ACCELERATORS = (f"{INFERNO}allocation.accelerator", "inference.optimization/acceleratorName")
_COST = 10.0  # of a variant that says none: llm-d's default
_NUMBERS = {  # of ours, the labels that say it, the first one first
    "maxBatch": ("allocation.maxbatchsize",),
    "maxQueue": ("allocation.maxqueuesize",),
    "inputTokens": ("load.intokens", "load.nominal.intokens"),
    "outputTokens": ("load.outtokens", "load.nominal.outtokens"),
}

Resource = Mapping[str, Any]
Spec = dict[str, Any]


def adopted(fleet: Resource, deployments: Sequence[Resource], scalers: Sequence[Resource]) -> Spec:
    """The fleet resource with a server for every workload that is labelled, but for those it lists itself.

    `scalers` are HPAs and ScaledObjects. Raises InvalidInput where labels are incomplete or contradict each other.
    """
    spec = dict(fleet.get("spec", {}))
    listed = {t.get("name") for s in spec.get("servers", ()) for t in s.get("scaleTargets", ())}
    free = {_name(d): d for d in deployments if _name(d) not in listed}
    known = {s.get("name") for s in spec.get("servers", ())}
    servers: dict[str, Spec] = {}
    for deployment in free.values():
        if _labels(deployment).get(f"{INFERNO}managed") == "true":
            _merge(servers, _of_inferno(deployment, spec))
    for scaler in scalers:
        target = free.get(scaler.get("spec", {}).get("scaleTargetRef", {}).get("name", ""))
        if _annotations(scaler).get(f"{LLM_D}managed") == "true" and target is not None:
            if spec.get("actuation", "direct") == "direct" and not spec.get("dryRun"):
                raise InvalidInput(
                    f"{_name(target)!r} is scaled by {_name(scaler)!r}, which {LLM_D}managed leaves in charge; "
                    "set the fleet's actuation to metrics"
                )
            if _labels(target).get(f"{INFERNO}managed") != "true":
                _merge(servers, _of_llm_d(scaler, target, spec))
    twice = sorted(known & servers.keys())
    if twice:
        raise InvalidInput(
            f"server {twice[0]!r} is listed, and labels on another Deployment name it; rename one of them"
        )
    every = [*spec.get("servers", ()), *(servers[name] for name in sorted(servers))]
    return {**fleet, "spec": {**spec, "servers": every}}


def _of_inferno(deployment: Resource, fleet: Spec) -> Spec:
    labels = _labels(deployment)
    name = labels.get(f"{INFERNO}name") or _name(deployment)
    numbers = {ours: _first(deployment, [INFERNO + label for label in theirs]) for ours, theirs in _NUMBERS.items()}
    return {
        "name": name,
        "serviceClass": labels.get(f"{INFERNO}class") or _usual_class(deployment, fleet),
        "model": labels.get(f"{INFERNO}model") or _missing(deployment, f"the label {INFERNO}model"),
        "scaleTargets": [_target(deployment)],
        "metrics": {"engine": "vllm", "matchLabels": {"job": _name(deployment)}, **gateway_queries(name)},
        **{ours: int(value) for ours, value in numbers.items() if value is not None},
    }


def _of_llm_d(scaler: Resource, deployment: Resource, fleet: Spec) -> Spec:
    said = _annotations(scaler)
    model = said.get(f"{LLM_D}model-id") or _missing(scaler, f"the annotation {LLM_D}model-id")
    cost = _number(scaler, f"{LLM_D}variant-cost", said)
    least = scaler.get("spec", {}).get("minReplicas", scaler.get("spec", {}).get("minReplicaCount"))
    return {
        "name": model,
        "serviceClass": _labels(deployment).get(f"{INFERNO}class") or _usual_class(deployment, fleet),
        "model": model,
        "minReplicas": int(least or 0),
        "scaleTargets": [_target(deployment) | {"cost": _COST if cost is None else cost}],
        "metrics": {"engine": "vllm", "matchLabels": {"model_name": model}, **scheduler_queries(model)},
    }


def _target(deployment: Resource) -> Spec:
    labels = _labels(deployment)
    found = next((labels[label] for label in _ACCELERATORS if labels.get(label)), None)
    accelerator = found or _missing(deployment, f"the label {_ACCELERATORS[0]}")
    return {"kind": "Deployment", "name": _name(deployment), "accelerator": accelerator}


def _merge(servers: dict[str, Spec], one: Spec) -> None:
    """A further variant of a server that was found already."""
    before = servers.setdefault(one["name"], one)
    if before is one:
        return
    for key in ("model", "serviceClass"):
        if before[key] != one[key]:
            raise InvalidInput(f"server {one['name']!r} has {key} {before[key]!r} and {one[key]!r}; label it once")
    accelerator = one["scaleTargets"][0]["accelerator"]
    if accelerator in {t["accelerator"] for t in before["scaleTargets"]}:
        raise InvalidInput(f"server {one['name']!r} has two Deployments on {accelerator!r}; label only one of them")
    before["scaleTargets"] = [*before["scaleTargets"], *one["scaleTargets"]]
    before["minReplicas"] = max(before.get("minReplicas", 0), one.get("minReplicas", 0))


def _usual_class(deployment: Resource, fleet: Spec) -> str:
    usual = str(fleet.get("serviceClass", ""))
    return usual or _missing(deployment, f"the label {INFERNO}class, nor the fleet a serviceClass")


def _first(resource: Resource, names: Sequence[str]) -> float | None:
    labels = _labels(resource)
    return next((_number(resource, name, labels) for name in names if name in labels), None)


def _number(resource: Resource, name: str, said: Mapping[str, str]) -> float | None:
    if name not in said:
        return None
    try:
        value = float(said[name])
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise InvalidInput(f"{name} of {_name(resource)!r} is {said[name]!r}; give a number of at least 0")
    return value


def _missing(resource: Resource, what: str) -> NoReturn:
    raise InvalidInput(f"{_name(resource)!r} is to be adopted but has not {what}; add it")


def _name(resource: Resource) -> str:
    return str(resource["metadata"]["name"])


def _labels(resource: Resource) -> Mapping[str, str]:
    return resource["metadata"].get("labels") or {}


def _annotations(resource: Resource) -> Mapping[str, str]:
    return resource["metadata"].get("annotations") or {}
