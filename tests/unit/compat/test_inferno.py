"""llm-inferno's stateless routes: their bodies in, their numbers out, and no body that breaks them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball.compat.inferno import create_app

pytestmark = pytest.mark.slow  # together too long for the inner loop

SYSTEM = (Path(__file__).parents[2] / "data" / "inferno" / "small" / "system-data.json").read_text()
ROUTES = ("/solve", "/target", "/optimize", "/optimizeOne")
PROBLEM = {  # examples/problem-data.json of queue-analysis, keys as published
    "RPS": 3.0, "maxBatchSize": 48, "AvgInputTokens": 128, "AvgOutputTokens": 512, "alpha": 12, "beta": 0.05,
    "gamma": 0.0005, "maxQueueSize": 128, "targetTTFT": 60.0, "targetITL": 20.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def client() -> TestClient:
    """The routes without a token; what they do not catch fails the test."""
    return TestClient(create_app())


def test_queue_analysis_answers_as_published(client: TestClient) -> None:
    """Their example at 3 requests/s, its targets, and its smallest batch: the current code's numbers to 1e-4."""
    solved = client.post("/solve", json=PROBLEM).json()
    assert (solved["avgTTFT"], solved["avgITL"], solved["maxRPS"]) == pytest.approx(
        (67.61465, 20.118889, 3.8609295), rel=1e-4
    )
    target = client.post("/target", json=PROBLEM).json()
    assert (target["RPSTargetTTFT"], target["RPSTargetITL"]) == pytest.approx((2.949462, 2.971982), rel=1e-4)
    best = client.post("/optimize", json=PROBLEM).json()
    assert (best["concurrency"], best["M_ITL"], best["M_TPF"], best["feasible"]) == (48, 31, 48, True)
    assert (best["throughput"], best["avgITL"], best["avgTTFT"]) == pytest.approx(
        (2.9494622, 19.90533, 60.000584), rel=1e-4
    )


def test_a_fleet_is_allocated(client: TestClient) -> None:
    """SystemData unchanged, keys in any case: 15 allocations in their form, unlimited at the recorded total."""
    body = json.loads(SYSTEM)
    answer = client.post("/optimizeOne", content=SYSTEM)
    assert answer.status_code == 200
    first = next(iter(answer.json()["allocations"].values()))
    assert len(answer.json()["allocations"]) == 15
    assert {"accelerator", "numReplicas", "maxBatch", "cost", "itlAverage", "ttftAverage", "load"} <= first.keys()
    body["system"]["OPTIMIZERDATA"] = {"optimizer": {"Unlimited": True}}
    del body["system"]["optimizerData"]
    assert TestClient(create_app(law="v3-compat")).post("/optimizeOne", json=body).json()["totalCost"] == 21252


def test_what_cannot_be_is_told(client: TestClient) -> None:
    """Targets that no load keeps, and a fleet without capacity, are 404 with the reason."""
    answer = client.post("/target", json=PROBLEM | {"targetITL": 5})
    assert (answer.status_code, "relax the targets" in answer.json()["message"]) == (404, True)
    assert client.post("/optimize", json=PROBLEM | {"targetITL": 5}).json()["feasible"] is False
    body = json.loads(SYSTEM)
    body["system"]["capacityData"] = {"count": []}
    answer = client.post("/optimizeOne", json=body)
    assert (answer.status_code, "the capacity is too small" in answer.json()["message"]) == (404, True)


def test_a_token_guards_all_routes() -> None:
    """Without the token 401, with it an answer."""
    client = TestClient(create_app(token="secret"))
    for path in ROUTES:
        assert client.post(path, json=PROBLEM).status_code == 401
    assert "HTTPBearer" in client.get("/openapi.json").json()["components"]["securitySchemes"]
    right = {"authorization": "Bearer secret"}
    assert client.post("/solve", json=PROBLEM, headers=right).status_code == 200


def test_the_routes_are_described(client: TestClient) -> None:
    """OpenAPI names every route and the fields of its body."""
    paths = client.get("/openapi.json").json()["paths"]
    assert set(ROUTES) <= paths.keys()
    schema = paths["/solve"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "avgInputTokens" in schema["properties"]


def refused(client: TestClient, path: str, body: bytes) -> None:
    """An answer, or 4xx with a reason."""
    answer = client.post(path, content=body)
    assert answer.status_code == 200 or (400 <= answer.status_code < 500 and answer.json()["message"]), answer.text


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
HOSTILE = [
    b"",
    b"{",
    b"[1]",
    b"null",
    b"NaN",
    b"\xff\xfe",
    b'{"RPS": 1e999}',
    b"[" * 100_000,
    b'{"RPS": 1%s}' % (b"0" * 400),
]


@pytest.mark.parametrize("path", ROUTES)
def test_hostile_bodies_are_refused(client: TestClient, path: str) -> None:
    """Truncated, deep, endless and binary bodies are 400 with a reason."""
    for body in HOSTILE:
        answer = client.post(path, content=body)
        assert (answer.status_code, bool(answer.json()["message"])) == (400, True), body[:20]


@settings(max_examples=150, deadline=None)
@given(path=st.sampled_from(ROUTES[:3]), key=st.sampled_from(sorted(PROBLEM)), value=ANYTHING)
def test_no_value_of_a_problem_breaks_a_route(client: TestClient, path: str, key: str, value: Any) -> None:
    """Whatever stands in a field, there is an answer or a reason."""
    refused(client, path, json.dumps(PROBLEM | {key: value}).encode())


@settings(max_examples=60, deadline=None)
@given(data=st.data(), value=ANYTHING)
def test_no_value_of_a_fleet_breaks_its_route(client: TestClient, data: st.DataObject, value: Any) -> None:
    """Anything in place of any part of a fleet of one server is answered or refused."""
    body = json.loads(SYSTEM)
    system = body["system"]
    system["serverData"]["servers"] = system["serverData"]["servers"][:1]
    at: Any = body
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], dict | list) or not at[key] or data.draw(st.integers(0, 3)) == 0:
            break
        at = at[key]
    at[key] = value
    refused(client, "/optimizeOne", json.dumps(body).encode())
