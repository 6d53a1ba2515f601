"""The operator, as `flyball operator` in a process of its own, against a real API server and a real Prometheus."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from lightkube import ApiError, Client
from lightkube.codecs import load_all_yaml
from lightkube.models.apps_v1 import DeploymentSpec
from lightkube.models.core_v1 import Container, PodSpec, PodTemplateSpec
from lightkube.models.meta_v1 import LabelSelector, ObjectMeta
from lightkube.models.rbac_v1 import RoleRef, Subject
from lightkube.resources.apps_v1 import Deployment
from lightkube.resources.core_v1 import Event
from lightkube.resources.rbac_authorization_v1 import ClusterRole, ClusterRoleBinding
from lightkube.types import PatchType

from flyball.adapters.prometheus_process import prometheus
from flyball.controller.operator import AcceleratorResource, FleetResource, ModelProfileResource, ServiceClassResource
from helpers.api_server import ApiServer, api_server_in, free_port
from helpers.scraped import scraped

PORT = free_port()  # of the operator's metrics
DEPLOY = Path(__file__).parents[2] / "deploy"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="the program prometheus is not installed"),
]


def resource(kind: Any, name: str, spec: dict[str, Any]) -> Any:
    """One of ours."""
    return kind(metadata=ObjectMeta(name=name, namespace="default"), spec=spec)


def fleet_spec(url: str, **changes: Any) -> dict[str, Any]:
    """A fleet of one server on one deployment."""
    target = {"name": "chat-h100", "accelerator": "h100"}
    server = {"name": "chat", "serviceClass": "gold", "model": "m", "minReplicas": 1, "scaleTargets": [target],
              "inputTokens": 1180, "outputTokens": 215}  # fmt: skip
    return {"prometheus": {"url": url}, "periodSeconds": 1, "capacity": {"h100": 8}, "servers": [server], **changes}


@pytest.fixture(scope="module")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """An empty cluster without nodes."""
    with api_server_in(tmp_path_factory.mktemp("kubernetes")) as server:
        yield server


@pytest.fixture(scope="module")
def admin(api_server: ApiServer) -> Iterator[Client]:
    """Our custom resources, and the operator's role for the user `operator`."""
    with closing(api_server.client("admin")) as client:
        _set_up(client)
        yield client


def _set_up(client: Client) -> None:
    for path in sorted((DEPLOY / "crds").glob("[!k]*.yaml")):
        for one in load_all_yaml(path.read_text()):
            client.create(one)
    shipped = [
        one
        for name in ("peering", "operator")
        for one in load_all_yaml((DEPLOY / "operator" / f"{name}.yaml").read_text(), create_resources_for_crds=True)
    ]
    role = next(one for one in shipped if isinstance(one, ClusterRole))
    client.create(role)
    client.create(
        ClusterRoleBinding(
            metadata=ObjectMeta(name="operator"),
            roleRef=RoleRef(apiGroup="rbac.authorization.k8s.io", kind="ClusterRole", name="flyball-operator"),
            subjects=[Subject(kind="User", name="operator", apiGroup="rbac.authorization.k8s.io")],
        )
    )
    until(lambda: list(client.list(FleetResource, namespace="default")) == [])
    gold = {"priority": 1, "targets": [{"model": "m", "ttftMs": 200, "itlMs": 15}]}
    client.create(resource(ServiceClassResource, "gold", gold))
    client.create(resource(AcceleratorResource, "h100", {"costPerHour": 4}))
    law = {"model": "m", "accelerator": "h100", "alphaMs": 9, "betaMs": 0.03, "gammaMs": 0.00006, "maxBatch": 256}
    client.create(resource(ModelProfileResource, "m-h100", law))
    labels = {"app": "chat"}
    pod = PodSpec(containers=[Container(name="engine", image="engine")])
    client.create(
        Deployment(
            metadata=ObjectMeta(name="chat-h100", namespace="default"),
            spec=DeploymentSpec(
                replicas=1,
                selector=LabelSelector(matchLabels=labels),
                template=PodTemplateSpec(metadata=ObjectMeta(labels=labels), spec=pod),
            ),
        )
    )


@pytest.fixture
def operator(api_server: ApiServer) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts the operator; what still runs at the end is ended."""
    running: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        environment = os.environ | {"KUBECONFIG": str(api_server.kubeconfig("operator"))}
        with (api_server.folder / f"operator-{len(running)}.log").open("wb") as log:
            running.append(
                subprocess.Popen(
                    [sys.executable, "-m", "flyball", "operator", "--namespace=default", f"--metrics-port={PORT}"],
                    env=environment, stdout=log, stderr=log,
                )
            )  # fmt: skip
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()


def until(true: Callable[[], bool], limit_s: float = 90.0) -> None:
    """Look until it is so."""
    late_s = time.monotonic() + limit_s
    while True:
        try:
            if true():
                return
        except ApiError as error:
            if time.monotonic() > late_s:
                raise AssertionError("it did not come about in time") from error
        assert time.monotonic() < late_s, "it did not come about in time"
        time.sleep(0.3)


def replicas(client: Client) -> int:
    """Of the deployment, as asked for."""
    spec = client.get(Deployment, "chat-h100", namespace="default").spec
    assert spec is not None
    return spec.replicas or 0


def condition(client: Client, kind: str, name: str = "fleet") -> tuple[str, str]:
    """Status and message of a condition."""
    status = client.get(FleetResource, name, namespace="default").to_dict().get("status", {})
    return next(((c["status"], c["message"]) for c in status.get("conditions", ()) if c["type"] == kind), ("", ""))


def set_replicas(client: Client, count: int) -> None:
    """As somebody with kubectl would."""
    client.patch(
        Deployment.Scale, "chat-h100", {"spec": {"replicas": count}}, namespace="default", patch_type=PatchType.MERGE
    )  # fmt: skip


def test_a_malformed_resource_is_rejected_with_a_reason(admin: Client) -> None:
    """The API server refuses what the schemas exclude, and names the field."""
    for changes, field in (({"servers": []}, "spec.servers"), ({"budgetPerHour": -1}, "spec.budgetPerHour"),
                           ({"forecast": "crystal"}, "spec.forecast")):  # fmt: skip
        with pytest.raises(ApiError, match=field):
            admin.create(resource(FleetResource, "bad", fleet_spec("http://127.0.0.1:1", **changes)))


def test_resources_are_reconciled_and_nothing_is_lost_when_the_operator_dies(
    admin: Client, operator: Callable[[], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """Applied resources are scaled, told in status, conditions and events; a restart, a stranger's hand and a role that
    is taken away for a while change nothing that lasts."""
    with (
        scraped(lambda seconds: f'gateway_requests_total{{server="chat"}} {int(15 * seconds)}\n') as address,
        prometheus(tmp_path, scrape_s=0.3, static=[address]) as url,
    ):
        process = operator()
        admin.create(resource(FleetResource, "fleet", fleet_spec(url)))
        until(lambda: replicas(admin) >= 3)
        until(lambda: all(condition(admin, kind)[0] == "True" for kind in ("Valid", "DataFresh", "Actuated")))
        until(lambda: any(e.reason == "Scaled" and "chat" in (e.message or "") for e in admin.list(Event)))
        page = httpx.get(f"http://127.0.0.1:{PORT}/metrics").text
        assert re.search(
            r'^wva_desired_replicas\{.*namespace="default",variant_name="chat-h100"\} [3-8]\.0$', page, re.MULTILINE
        )

        process.send_signal(signal.SIGKILL)
        process.wait()
        before = replicas(admin)
        operator()
        set_replicas(admin, 1)
        until(lambda: replicas(admin) >= min(before, 3))

        role = admin.get(ClusterRole, "flyball-operator")
        rules = role.rules or []
        role.rules = [r for r in rules if "deployments/scale" not in (r.resources or [])]
        admin.replace(role)
        set_replicas(admin, 1)
        until(lambda: condition(admin, "Actuated")[0] == "False")
        assert "cannot scale" in condition(admin, "Actuated")[1]
        role = admin.get(ClusterRole, "flyball-operator")
        role.rules = rules
        admin.replace(role)
        until(lambda: replicas(admin) >= 3 and condition(admin, "Actuated")[0] == "True")

        broken = fleet_spec(url)
        broken["servers"][0]["serviceClass"] = "platinum"
        admin.create(resource(FleetResource, "broken", broken))
        until(lambda: condition(admin, "Valid", "broken")[0] == "False")
        assert "platinum" in condition(admin, "Valid", "broken")[1]
    until(lambda: condition(admin, "DataFresh")[0] == "False")  # Prometheus is gone: held, and said
    assert replicas(admin) >= 3
