"""llm-inferno's collector and actuator: their bodies, a whole control cycle over HTTP, and nothing that breaks them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball.compat.inferno import create_app
from flyball.compat.inferno_world import World
from flyball.core.errors import ActuationFailed
from helpers.toy_fleet import ToyFleet, fleet_spec

pytestmark = pytest.mark.slow  # together too long for the inner loop

SYSTEM = json.loads((Path(__file__).parents[2] / "data" / "inferno" / "small" / "system-data.json").read_text())


def test_a_control_cycle_over_http() -> None:
    """Optimize, update, collect, as their controller does: what was allocated runs, split over its replicas."""
    client = TestClient(create_app())
    allocations = client.post("/optimizeOne", json=SYSTEM).json()["allocations"]
    before = client.get("/collect").json()
    assert client.post("/update", json={"allocations": allocations, **where(before)}).json() == "Done"
    after = client.get("/collect").json()
    assert after.keys() == {"servers", "replicas", "kube-resources"}
    assert len(after["servers"]) == 15
    assert after["kube-resources"]["Premium-llama_13b"].keys() == {"uid", "name", "space"}
    server = next(s for s in after["servers"] if s["name"] == "Premium-llama_13b")
    count = allocations["Premium-llama_13b"]["numReplicas"]
    own = [r for r in after["replicas"] if r["name"].startswith("Premium-llama_13b/")]
    assert server["currentAlloc"]["numReplicas"] == count == len(own) > 0
    total = sum(r["currentAlloc"]["load"]["arrivalRate"] for r in own)
    assert total == pytest.approx(server["currentAlloc"]["load"]["arrivalRate"])
    assert client.get("/sweep", params={"server": "Premium-llama_13b"}).json() == own
    assert client.get("/sweep", params={"server": "nobody"}).status_code == 404
    assert client.post("/tune", json=after["replicas"]).status_code in {200, 422}  # the same words
    assert client.post("/update", json={"allocations": {}, "kube-resources": {}}).json() == "Done"
    assert client.get("/collect").json()["servers"] == after["servers"]  # who is not named keeps what it has


def where(collected: dict[str, Any]) -> dict[str, Any]:
    """What the controller passes on."""
    return {"kube-resources": collected["kube-resources"]}


def test_a_real_fleet_is_collected_and_scaled() -> None:
    """From metrics: arrivals in requests a minute (not throughput), latencies in ms, replicas one by one; refusals and
    blindness are 424 with the reason."""
    spec = fleet_spec()
    fleet = ToyFleet(spec=spec, rates={"chat": lambda _: 20.0}, serves_rps=5.0)
    fleet.put("chat", "H100", 2)
    asked: list[tuple[str, str, str, int]] = []

    def scale(*, space: str, name: str, server: str, accelerator: str, replicas: int) -> None:
        asked.append((space, name, accelerator, replicas))
        fleet.scale({server: {accelerator: replicas}})

    client = TestClient(
        create_app(world=lambda state: World(state, spec=spec, source=fleet, scale=scale, space="prod", window_s=15.0))
    )
    fleet.advance(15.0)
    seen = client.get("/collect").json()
    current = seen["servers"][0]["currentAlloc"]
    assert current["load"] == {"arrivalRate": 1200.0, "throughput": 600.0, "avgInTokens": 1180, "avgOutTokens": 215}
    assert (current["accelerator"], current["numReplicas"]) == ("H100", 2)
    assert [r["currentAlloc"]["itlAverage"] for r in seen["replicas"]] == [12.0, 12.0]
    assert seen["kube-resources"] == {"chat": {"uid": "", "name": "chat", "space": "prod"}}
    wanted = {"chat": {"accelerator": "H100", "numReplicas": 4}}
    assert client.post("/update", json={"Allocations": wanted, **where(seen)}).status_code == 200
    assert asked == [("prod", "chat", "H100", 4)]
    assert fleet.count("chat") == 4
    fleet.refusing = True
    refused = client.post("/update", json={"allocations": wanted, **where(seen)})
    assert (refused.status_code, "quota exceeded" in refused.json()["message"]) == (424, True)
    fleet.blind = True
    assert client.get("/collect").status_code == 424
    assert client.post("/update", json={"allocations": wanted}).status_code == 400


def test_a_server_whose_arrivals_cannot_be_told_is_left_out() -> None:
    """Without a gateway's counter the first look tells of replicas only, the second of the demand as well."""
    spec = fleet_spec()
    fleet = ToyFleet(spec=spec, rates={"chat": lambda _: 20.0}, serves_rps=5.0, counted=False)
    fleet.put("chat", "H100", 2)
    client = TestClient(create_app(world=lambda state: World(state, spec=spec, source=fleet, window_s=15.0)))
    fleet.advance(15.0)
    assert client.get("/collect").json()["servers"] == []
    fleet.advance(15.0)
    load = client.get("/collect").json()["servers"][0]["currentAlloc"]["load"]
    assert load["arrivalRate"] == pytest.approx(1200, rel=0.05)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["chat", "numReplicas", "load", "accelerator", "name"]), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def refusing(**_: object) -> None:
    """A cluster that does nothing asked of it."""
    raise ActuationFailed("the cluster refuses")


FUZZED = [TestClient(create_app()), TestClient(create_app(world=lambda state: World(state, scale=refusing)))]
for one in FUZZED:
    one.post("/setServers", json={"servers": [{"name": "chat", "class": "c", "model": "m"}]})


@settings(max_examples=80, deadline=None)
@given(which=st.sampled_from(FUZZED), allocations=ANYTHING, resources=ANYTHING, server=st.text(max_size=5))
def test_no_body_breaks_the_routes(which: TestClient, allocations: Any, resources: Any, server: str) -> None:
    """Whatever is allocated or asked for, every route answers or refuses with a reason, and goes on collecting."""
    body = json.dumps({"allocations": allocations, "kube-resources": resources})
    for answer in (
        which.post("/update", content=body),
        which.get("/sweep", params={"server": server}),
        which.get("/collect"),
    ):
        assert answer.status_code == 200 or (400 <= answer.status_code < 500 and answer.json()["message"]), answer.text
