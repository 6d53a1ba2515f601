"""Turns of the operator against an API server and a Prometheus that answer as real ones do, over their HTTP APIs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs

import httpx2
import pytest
from lightkube import Client, SingleConfig
from lightkube.config.models import Cluster, Context, User

from flyball.adapters.fleet_export import FleetsMetrics
from flyball.adapters.kubernetes import KubernetesCluster, ScaleTarget
from flyball.controller.operator import Reconciler
from flyball.core.clock import VirtualClock
from flyball.core.errors import ActuationFailed, ObservationFailed

CONFIG = SingleConfig(
    context_name="c", context=Context(cluster="c", user="u"), cluster=Cluster(server="http://kubernetes"), user=User()
)
MODEL = "default/default"
OBJECTS: dict[str, list[dict[str, Any]]] = {
    "serviceclasses": [
        {"metadata": {"name": "gold"}, "spec": {"targets": [{"model": MODEL, "ttftMs": 200, "itlMs": 15}]}}
    ],
    "accelerators": [],
    "modelprofiles": [{
        "metadata": {"name": "p"},
        "spec": {"model": MODEL, "accelerator": "H100", "alphaMs": 9, "betaMs": 0.03, "gammaMs": 6e-5, "maxBatch": 256},
    }],
    "deployments": [{
        "metadata": {"name": "chat", "labels": {"inferno.server.allocation.accelerator": "H100"}},
        "spec": {"replicas": 1, "selector": {"matchLabels": {"app": "chat"}}, "template": {}},
    }],
    "horizontalpodautoscalers": [{
        "metadata": {"name": "hpa", "annotations": {"llm-d.ai/managed": "true", "llm-d.ai/model-id": MODEL}},
        "spec": {"scaleTargetRef": {"kind": "Deployment", "name": "chat"}, "minReplicas": 1, "maxReplicas": 9},
    }],
    "pods": [{
        "metadata": {"name": "chat-0", "creationTimestamp": "2026-01-01T00:00:00Z"},
        "status": {"conditions": [{"type": "Ready", "status": "True"}]},
    }],
}  # fmt: skip


def client(answer: Callable[[httpx2.Request], httpx2.Response]) -> Client:
    """A real client whose requests are answered by a function."""
    return Client(config=CONFIG, transport=httpx2.MockTransport(answer))


class Kubernetes:
    """Objects by kind, as read; what was patched."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.fleet: dict[str, Any] = {"metadata": {"name": "f", "namespace": "prod", "generation": 1}, "spec": spec}
        self.patched: list[tuple[str, dict[str, Any]]] = []

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        """KEDA's kind is not installed; all else is."""
        parts = request.url.path.strip("/").split("/")
        if request.method == "PATCH":
            body = json.loads(request.content)
            self.patched.append((request.url.path, body))
            self.fleet["status"] = body.get("status")
            return httpx2.Response(200, json=body)
        if "fleets" in parts:
            return httpx2.Response(200, json=self.fleet)
        if parts[-1] in OBJECTS:
            return httpx2.Response(200, json={"items": OBJECTS[parts[-1]], "metadata": {}})
        found = [o for o in OBJECTS.get(parts[-2], []) if o["metadata"]["name"] == parts[-1]]
        if found:
            return httpx2.Response(200, json=found[0])
        return httpx2.Response(404, json={"kind": "Status", "code": 404, "message": "not found"})

    def client(self) -> Client:
        """A real client of it."""
        return client(self.answer)


class Prometheus(BaseHTTPRequestHandler):
    """One ready replica, and 900 requests a minute at the gateway."""

    def do_POST(self) -> None:  # noqa: D102
        query = parse_qs(self.rfile.read(int(self.headers["content-length"])).decode())["query"][0]
        value = next((v for word, v in self.said().items() if word in query), None)
        labels = {"pod": "chat-0"} if "by (" in query or query.startswith(("{", "timestamp")) else {}
        found = [] if value is None else [{"metric": labels, "value": [1000.0, str(value)]}]
        if query == "time()":
            data: dict[str, Any] = {"resultType": "scalar", "result": [1000.0, "1000"]}
        else:
            data = {"resultType": "vector", "result": found}
        body = json.dumps({"status": "success", "data": data}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    @staticmethod
    def said() -> dict[str, float]:
        """By a word of the query, the first that fits."""
        return {
            "timestamp": 1000, '"up"': 1, "scheduler_attempts": 225, "request_success": 200, "num_requests_running": 50,
            "prompt_tokens": 236_000, "generation_tokens": 43_000,
        }  # fmt: skip

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def prometheus() -> Iterator[str]:
    """Its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Prometheus)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_adopted_variant_is_advised_through_metrics(prometheus: str) -> None:
    """llm-d's annotated HPA is found, its Deployment sized, and the wish published for the HPA under its own labels;
    nothing is scaled, and once the fleet is gone nothing is advised."""
    spec = {"prometheus": {"url": prometheus}, "adopt": True, "actuation": "metrics", "serviceClass": "gold"}
    kubernetes, metrics = Kubernetes(spec), FleetsMetrics()
    reconciler = Reconciler(kubernetes.client(), "prod", "f", clock=VirtualClock(), metrics=metrics)
    wait_s, _ = reconciler.reconcile()
    assert wait_s == 15.0
    status = kubernetes.fleet["status"]
    assert {c["type"]: c["status"] for c in status["conditions"]} == {
        "Valid": "True", "DataFresh": "True", "Actuated": "True",
    }  # fmt: skip
    wanted = status["servers"][0]["desired"]["H100"]
    assert wanted >= 3
    assert {path.rpartition("/")[2] for path, _ in kubernetes.patched} == {"status"}
    labels = {"variant_name": "chat", "namespace": "prod", "accelerator_type": "H100", "fleet": "prod/f"}
    assert metrics.registry.get_sample_value("wva_desired_replicas", labels) == wanted
    reconciler.close()
    assert metrics.registry.get_sample_value("wva_desired_replicas", labels) is None


def test_labels_that_do_not_fit_are_a_condition(prometheus: str) -> None:
    """An HPA in charge of what the fleet would scale itself is told in `Valid` and in an event, once."""
    kubernetes = Kubernetes({"prometheus": {"url": prometheus}, "adopt": True, "serviceClass": "gold"})
    reconciler = Reconciler(kubernetes.client(), "prod", "f", clock=VirtualClock())
    _, events = reconciler.reconcile()
    assert [reason for reason, _ in events] == ["Invalid"]
    condition = kubernetes.fleet["status"]["conditions"][0]
    assert (condition["type"], condition["status"]) == ("Valid", "False")
    assert "actuation to metrics" in condition["message"]
    assert reconciler.reconcile()[1] == []


def test_an_api_server_that_is_gone_is_an_error_of_ours() -> None:
    """A connection refused is told as what could not be read or scaled, so that the loop holds and tries again."""

    def refuse(_: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("connection refused")

    targets = {"chat": (ScaleTarget(accelerator="H100", name="chat"),)}
    cluster = KubernetesCluster(client(refuse), "prod", targets, clock=VirtualClock())
    with pytest.raises(ObservationFailed, match="connection refused"):
        cluster.wanted("chat")
    with pytest.raises(ActuationFailed, match="connection refused"):
        cluster.scale({"chat": {"H100": 2}})
