"""Others' labels and annotations, read as servers of a fleet; what they leave out or contradict is told."""

from __future__ import annotations

from typing import Any

import pytest

from flyball.controller.adoption import adopted
from flyball.controller.resources import Fleet, fleet
from flyball.core.errors import InvalidInput

CLASS = {"metadata": {"name": "gold"}, "spec": {"targets": [
    {"model": m, "ttftMs": 200, "itlMs": 15} for m in ("granite", "default/default")]}}  # fmt: skip
INFERNO = {
    "inferno.server.managed": "true", "inferno.server.name": "chat", "inferno.server.model": "granite",
    "inferno.server.class": "gold", "inferno.server.allocation.accelerator": "H100",
    "inferno.server.allocation.maxbatchsize": "64", "inferno.server.allocation.maxqueuesize": "10",
    "inferno.server.load.intokens": "1180", "inferno.server.load.nominal.outtokens": "215",
}  # fmt: skip
LLM_D = {"llm-d.ai/managed": "true", "llm-d.ai/model-id": "default/default", "llm-d.ai/variant-cost": "12.5"}


def deployment(name: str, labels: dict[str, str]) -> dict[str, Any]:
    """A workload."""
    return {"metadata": {"name": name, "labels": labels}, "spec": {"replicas": 1}}


def hpa(target: str, annotations: dict[str, str]) -> dict[str, Any]:
    """An autoscaler as llm-d's samples have it."""
    reference = {"apiVersion": "apps/v1", "kind": "Deployment", "name": target}
    return {
        "metadata": {"name": f"{target}-hpa", "annotations": annotations},
        "spec": {"scaleTargetRef": reference, "minReplicas": 1, "maxReplicas": 10},
    }


def resource(**spec: Any) -> dict[str, Any]:
    """A fleet that adopts."""
    return {"metadata": {"name": "f"}, "spec": {"prometheus": {"url": "http://p"}, "adopt": True, **spec}}


def read(one: dict[str, Any], deployments: list[dict[str, Any]], scalers: list[dict[str, Any]]) -> Fleet:
    """As the operator reads it, with a class and an accelerator of the namespace."""
    h100 = {"metadata": {"name": "H100"}, "spec": {"costPerHour": 4}}
    return fleet(adopted(one, deployments, scalers), [CLASS], [h100], [])


def test_llm_infernos_labels_make_a_server() -> None:
    """Name, model, class, accelerator, batch, queue and lengths are the labels'; its metrics are found by job."""
    found = read(resource(), [deployment("vllm-chat", INFERNO), deployment("other", {})], [])
    server = found.spec.servers[0]
    assert len(found.spec.servers) == 1
    assert (server.name, server.model, server.service_class) == ("chat", "granite", "gold")
    assert (server.max_batch, server.max_queue) == (64, 10)
    assert (server.demand.input_tokens, server.demand.output_tokens) == (1180, 215)
    assert [(t.name, t.accelerator) for t in found.targets["chat"]] == [("vllm-chat", "H100")]
    assert found.queries["chat"].engine == "vllm"
    assert found.queries["chat"].matchers == {"job": "vllm-chat"}


def test_llm_ds_annotations_make_variants_of_one_server() -> None:
    """Two Deployments of a model are one server on two accelerators; a cost stands in for a missing Accelerator."""
    deployments = [
        deployment("on-h100", {"inferno.server.allocation.accelerator": "H100"}),
        deployment("on-l40s", {"inference.optimization/acceleratorName": "L40S"}),
        deployment("unmanaged", {}),
    ]
    scaled = {"metadata": {"name": "so", "annotations": LLM_D}, "spec": {"scaleTargetRef": {"name": "on-l40s"}}}
    scalers = [hpa("on-h100", LLM_D), scaled, hpa("unmanaged", {"llm-d.ai/managed": "false"})]
    found = read(resource(actuation="metrics", serviceClass="gold"), deployments, scalers)
    server = found.spec.servers[0]
    assert (server.name, server.model, server.service_class) == ("default/default", "default/default", "gold")
    assert server.min_replicas == 1
    assert {t.accelerator: t.name for t in found.targets[server.name]} == {"H100": "on-h100", "L40S": "on-l40s"}
    assert {a.name: a.cost_per_h for a in found.spec.accelerators} == {"H100": 4.0, "L40S": 12.5}
    assert 'target_model_name="default/default"' in found.queries[server.name].arrivals
    assert not found.scales


def test_what_the_fleet_lists_itself_is_not_adopted() -> None:
    """A Deployment that is a scale target already is left as it is listed."""
    listed = {"name": "mine", "serviceClass": "gold", "model": "granite",
              "scaleTargets": [{"name": "vllm-chat", "accelerator": "H100"}]}  # fmt: skip
    found = read(resource(servers=[listed]), [deployment("vllm-chat", INFERNO)], [hpa("vllm-chat", LLM_D)])
    assert [s.name for s in found.spec.servers] == ["mine"]


def without(name: str) -> dict[str, str]:
    """The labels but one."""
    return {label: value for label, value in INFERNO.items() if label != name}


@pytest.mark.parametrize(
    ("spec", "deployments", "scalers", "said"),
    [
        ({}, [deployment("d", without("inferno.server.model"))], [], "add it"),
        ({}, [deployment("d", without("inferno.server.class"))], [], "nor the fleet a serviceClass"),
        ({}, [deployment("d", without("inferno.server.allocation.accelerator"))], [], "allocation.accelerator"),
        ({}, [deployment("d", {**INFERNO, "inferno.server.load.intokens": "many"})], [], "is 'many'; give a number"),
        ({}, [deployment("a", INFERNO), deployment("b", INFERNO)], [], "two Deployments on 'H100'"),
        ({}, [deployment("a", INFERNO), deployment("b", INFERNO | {"inferno.server.model": "x"})], [], "label it once"),
        ({}, [deployment("d", {})], [hpa("d", LLM_D)], "set the fleet's actuation to metrics"),
        ({"dryRun": True}, [deployment("d", {})], [hpa("d", {"llm-d.ai/managed": "true"})], "llm-d.ai/model-id"),
        ({}, [deployment("d", {})], [], "has no servers"),
    ],
)  # fmt: skip
def test_incomplete_and_contradicting_labels_are_told(
    spec: dict[str, Any], deployments: list[dict[str, Any]], scalers: list[dict[str, Any]], said: str
) -> None:
    """Each is refused with what is missing, and where."""
    with pytest.raises(InvalidInput, match=said):
        read(resource(**spec), deployments, scalers)
