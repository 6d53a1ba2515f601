"""The holder over HTTP: status, commands, approval, explanations, keys, and every documented metric."""

from __future__ import annotations

import re
from pathlib import Path

from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from flyball.server.hold import Approvals, create_app
from flyball.tuner.audit import MemoryAudit
from flyball.tuner.guard import Guard
from flyball.tuner.guard_limits import PRESETS
from flyball.tuner.hold import Holder
from flyball.tuner.online.tuner import OnlineTuner
from helpers.held_service import ROUTED, HeldService

GUIDE = Path(__file__).parents[3] / "docs" / "guide" / "hold.md"


def holder_of(service: HeldService, approvals: Approvals | None = None) -> Holder:
    """A holder of a simulated service."""
    tuner = OnlineTuner(ROUTED, constraints=("quality", "latency"), start=dict(service.values))
    guard = Guard(ROUTED, dict(service.values), apply=service.apply, limits=PRESETS["aggressive"], audit=MemoryAudit(),
                  clock=service.clock)  # fmt: skip
    return Holder(tuner=tuner, guard=guard, judge=service.judge, generation=service.generation, clock=service.clock,
                  settle_s=0.0, approve=approvals)  # fmt: skip


def test_a_holder_is_watched_and_commanded() -> None:
    """Status, decisions and explanations are told; commands act; unknown ones are refused in one sentence."""
    service = HeldService()
    holder = holder_of(service)
    for _ in range(10):
        holder.step(service.read())
    with TestClient(create_app(holder)) as client:
        assert client.get("/v1/hold").json()["counts"]["windows"] == 10
        assert len(client.get("/v1/hold/decisions", params={"last": 3}).json()["decisions"]) == 3
        assert client.get("/v1/hold/explain/4").json()["number"] == 4
        assert client.get("/v1/hold/explain/400").status_code == 400
        for command, run in (("pause", "paused"), ("resume", "running"), ("rollback", "running"), ("safe", "running")):
            assert client.post(f"/v1/hold/{command}").json()["run"] == run
        assert client.get("/v1/hold").json()["safe_mode"]["reason"] == "manual"
        assert client.post("/v1/hold/explode").status_code == 400
        assert client.post("/v1/hold/kill").json()["run"] == "killed"
    assert service.values == ROUTED.defaults()


def test_the_key_is_asked_for() -> None:
    """With an admin key, all but health and metrics need it."""
    with TestClient(create_app(holder_of(HeldService()), admin_key="k")) as client:
        assert client.get("/v1/hold").status_code == 401
        assert client.post("/v1/hold/kill").status_code == 401
        assert client.get("/v1/hold", headers={"Authorization": "Bearer k"}).status_code == 200
        assert client.get("/metrics").status_code == 200


def test_a_change_waits_for_approval() -> None:
    """It is shown, and applied once approved."""
    service, approvals = HeldService(), Approvals()
    holder = holder_of(service, approvals)
    with TestClient(create_app(holder, approvals=approvals)) as client:
        assert client.post("/v1/hold/approval/approve").status_code == 400
        while holder.waiting_for is None:
            holder.step(service.read())
        assert client.get("/v1/hold").json()["waiting_for"] == dict(holder.waiting_for)
        client.post("/v1/hold/approval/approve")
    assert holder.step(service.read()).action == "apply"


def test_every_documented_metric_is_scraped() -> None:
    """The guide's table of metrics and what a scrape shows are the same names."""
    service = HeldService()
    holder = holder_of(service)
    for _ in range(5):
        holder.step(service.read())
    with TestClient(create_app(holder)) as client:
        text = client.get("/metrics").text
    scraped = {s.name for family in text_string_to_metric_families(text) for s in family.samples}
    documented = set(re.findall(r"^\| `(flyball_hold_\w+)` \|", GUIDE.read_text(encoding="utf-8"), re.MULTILINE))
    assert documented == scraped
    assert 'flyball_hold_decisions_total{action="apply"}' in text
