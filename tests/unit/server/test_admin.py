"""Live configuration over HTTP: all or nothing, versioned, explained."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from flyball.server.app import create_app


@pytest.fixture
def talk(parrot: Any, connect: Any) -> Callable[[Callable[[httpx.AsyncClient], Awaitable[None]]], None]:
    """Run a conversation with a fresh server."""

    def run(script: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
        async def go() -> None:
            async with connect(create_app(parrot)) as client:
                await script(client)

        asyncio.run(go())

    return run


def test_the_configuration_explains_itself(talk: Any, parrot: Any) -> None:
    """Values, version, generation, and each knob's type, bounds, default and meaning."""

    async def script(client: httpx.AsyncClient) -> None:
        response = await client.get("/v1/config")
        config = response.json()
        assert response.headers["etag"] == '"1"'
        assert (config["version"], config["generation"]) == (1, parrot.runtime.generation)
        assert config["values"] == parrot.runtime.values()
        assert set(config["knobs"]) == set(config["values"])
        knob = config["knobs"]["max_num_seqs"]
        assert set(knob) == {"kind", "default", "low", "high", "log", "choices", "live", "doc"}
        assert (knob["kind"], knob["low"], knob["high"], knob["live"]) == ("int", 1, 8, True)

    talk(script)


def test_a_change_is_versioned_and_in_force(talk: Any, parrot: Any) -> None:
    """The answer is the new configuration, and the engine's own."""

    async def script(client: httpx.AsyncClient) -> None:
        before = (await client.get("/v1/config")).json()
        after = (await client.patch("/v1/config", json={"max_num_seqs": 4, "max_wait_ms": 2.5})).json()
        assert after == (await client.get("/v1/config")).json()
        assert (after["version"], after["values"]["max_num_seqs"], after["values"]["max_wait_ms"]) == (2, 4, 2.5)
        assert after["generation"] != before["generation"]
        assert parrot.runtime.max_num_seqs == 4

    talk(script)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_wait_ms": 1, "max_num_seqs": 0},
        {"max_wait_ms": 1, "unknown": 3},
        {"max_wait_ms": 1, "prefix_caching": "yes"},
        {"max_wait_ms": 1, "max_num_batched_tokens": 4},  # below max_num_seqs: wrong only together
        {},
    ],
)
def test_a_bad_change_changes_nothing(talk: Any, parrot: Any, changes: dict[str, Any]) -> None:
    """All or nothing: one bad knob, and the good one beside it is not set either."""

    async def script(client: httpx.AsyncClient) -> None:
        response = await client.patch("/v1/config", json=changes)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "invalid_knob"
        assert (parrot.runtime.version, parrot.runtime.max_wait_ms) == (1, 0.0)

    talk(script)


def test_a_dry_run_shows_what_would_be(talk: Any, parrot: Any) -> None:
    """The answer of a dry run is the next snapshot; the one in force stays."""

    async def script(client: httpx.AsyncClient) -> None:
        response = await client.patch("/v1/config?dry_run=true", json={"max_num_seqs": 2})
        assert response.json()["values"]["max_num_seqs"] == 2
        assert parrot.runtime.version == 1
        bad = await client.patch("/v1/config?dry_run=true", json={"max_num_seqs": 99})
        assert bad.status_code == 400

    talk(script)


def test_a_stale_version_is_refused(talk: Any, parrot: Any) -> None:
    """If-Match guards read-modify-write, as a number or as an ETag; what is no version is a 400."""

    async def script(client: httpx.AsyncClient) -> None:
        async def patch(tag: str) -> int:
            return (await client.patch("/v1/config", json={"max_wait_ms": 1}, headers={"if-match": tag})).status_code

        assert [await patch(tag) for tag in ("1", "1", '"2"', '"1"', "*", "W/x")] == [200, 412, 200, 412, 200, 400]
        assert parrot.runtime.version == 4

    talk(script)


def test_a_body_that_is_no_object_is_refused(talk: Any) -> None:
    """A list of knobs is not a change."""

    async def script(client: httpx.AsyncClient) -> None:
        assert (await client.patch("/v1/config", json=["max_num_seqs"])).status_code == 400

    talk(script)


def test_changes_are_remembered_and_undone(talk: Any, parrot: Any) -> None:
    """The history tells each change; an earlier version's values come back as a new version."""

    async def script(client: httpx.AsyncClient) -> None:
        await client.patch("/v1/config", json={"max_num_seqs": 4})
        await client.patch("/v1/config", json={"max_wait_ms": 2})
        start, first, second = (await client.get("/v1/config/history")).json()["changes"]
        assert (start["version"], start["by"], start["changes"], start["before"]) == (1, "start", {}, None)
        assert (first["changes"], first["by"]) == ({"max_num_seqs": [8, 4]}, "anyone")
        assert (second["version"], second["changes"]) == (3, {"max_wait_ms": [0.0, 2.0]})
        assert set(second["before"]) == set(second["after"]) > {"seconds", "generation_tokens_per_s"}
        dry = await client.patch("/v1/config?revert_to=1&dry_run=true", json={})
        assert dry.json()["values"]["max_num_seqs"] == 8
        assert parrot.runtime.version == 3
        back = (await client.patch("/v1/config?revert_to=2", json={})).json()
        assert (back["version"], back["values"]["max_num_seqs"], back["values"]["max_wait_ms"]) == (4, 4, 0.0)
        unknown = await client.patch("/v1/config?revert_to=77", json={})
        assert unknown.status_code == 400
        assert "1 to 4" in unknown.json()["error"]["message"]

    talk(script)


def test_requests_under_way_are_listed(talk: Any, parrot: Any) -> None:
    """The engine's own list."""

    async def script(client: httpx.AsyncClient) -> None:
        parrot.running.add("x")
        assert (await client.get("/v1/requests")).json() == {"requests": [{"request_id": "x", "state": "running"}]}
        parrot.running.clear()

    talk(script)


def test_every_setting_explains_itself(talk: Any) -> None:
    """The engine's own words."""

    async def script(client: httpx.AsyncClient) -> None:
        (setting,) = (await client.get("/v1/config/explain")).json()["settings"]
        assert setting == {
            "name": "max_num_seqs", "value": 8, "source": "default", "why": "it is a parrot", "live": True,
        }  # fmt: skip

    talk(script)
