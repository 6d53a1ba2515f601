"""The files under deploy/: rendered, and held against Kubernetes' schemas, promtool and what we really export."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from flyball.adapters.fleet_export import FleetMetrics

DEPLOY = Path(__file__).parents[2] / "deploy"
OWN = ("flyball.dev", "kopf.dev")


def manifests() -> list[dict[str, Any]]:
    """Every object of every manifest."""
    files = [f for f in sorted(DEPLOY.rglob("*.yaml")) if f.name not in ("kustomization.yaml", "rules.yaml")]
    return [one for file in files for one in yaml.safe_load_all(file.read_text())]


def test_manifests_are_valid_kubernetes() -> None:
    """Every shipped object of Kubernetes' own kinds holds against its schema, strictly."""
    kinds = []
    for one in manifests():
        if not one["apiVersion"].startswith(OWN):
            kubernetes_validate.validate(one, "1.30", strict=True)
        kinds.append(one["kind"])
    assert kinds.count("CustomResourceDefinition") == 5
    assert {"ClusterRole", "Deployment", "ServiceAccount"} <= set(kinds)


def test_the_role_is_small() -> None:
    """The operator may write nothing but scales, its own status and annotations, and events."""
    role = next(one for one in manifests() if one["kind"] == "ClusterRole")
    for rule in role["rules"]:
        assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"]
        if {"patch", "update", "create", "delete"} & set(rule["verbs"]):
            assert all(
                r.endswith("/scale") or r in ("fleets", "fleets/status", "events", "clusterkopfpeerings")
                for r in rule["resources"]
            )


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_renders_all() -> None:
    """`kubectl kustomize` renders every object once."""
    text = subprocess.run(
        ["kubectl", "kustomize", str(DEPLOY / "operator")], capture_output=True, text=True, check=True
    ).stdout  # fmt: skip
    assert len(list(yaml.safe_load_all(text))) == len(manifests())


@pytest.mark.skipif(shutil.which("promtool") is None, reason="the program promtool is not installed")
def test_rules_are_valid() -> None:
    """Prometheus itself accepts the rules."""
    command = ["promtool", "check", "rules", str(DEPLOY / "monitoring" / "rules.yaml")]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout + told.stderr


def test_dashboard_and_rules_ask_for_metrics_that_exist() -> None:
    """Every metric named in a panel or a rule is one that we export."""
    exported = {f.name for f in FleetMetrics().registry.collect()}
    exported |= {f"{name}_total" for name in exported}
    dashboard = json.loads((DEPLOY / "monitoring" / "grafana-dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    rules = yaml.safe_load((DEPLOY / "monitoring" / "rules.yaml").read_text())
    asked += [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    names = {name for text in asked for name in re.findall(r"\b(?:wva|flyball)_\w+", text)}
    assert names
    assert names <= exported
