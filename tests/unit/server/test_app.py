"""The application around the routes: health, keys, request ids, unknown paths."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from flyball.server.app import create_app
from flyball.server.auth import Keys


def test_ready_only_between_start_and_end(parrot: Any) -> None:
    """Live always; ready once the engine was started, not while it stops."""

    async def go() -> None:
        app = create_app(parrot)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/health/ready")).status_code == 503
            async with app.router.lifespan_context(app):
                assert (await client.get("/health/ready")).status_code == 200
            assert (await client.get("/health/ready")).status_code == 503

    asyncio.run(go())


def test_a_dead_engine_is_neither_live_nor_ready(parrot: Any, connect: Any) -> None:
    """Both say why."""

    async def go() -> None:
        async with connect(create_app(parrot)) as client:
            parrot.die("the engine failed: disk on fire")
            for path in ("/health", "/health/ready"):
                response = await client.get(path)
                assert response.status_code == 503
                assert "disk on fire" in response.json()["error"]["message"]

    asyncio.run(go())


def test_request_ids_are_echoed_or_made(parrot: Any, connect: Any) -> None:
    """On answers and on errors alike."""

    async def go() -> None:
        async with connect(create_app(parrot)) as client:
            given = await client.get("/v1/models", headers={"x-request-id": "abc"})
            assert given.headers["x-request-id"] == "abc"
            first = await client.post("/v1/completions", json={})
            second = await client.get("/nowhere")
            assert len({first.headers["x-request-id"], second.headers["x-request-id"]}) == 2

    asyncio.run(go())


def test_unknown_paths_and_methods_answer_in_openais_form(parrot: Any, connect: Any) -> None:
    """404 and 405 are errors like all others."""

    async def go() -> None:
        async with connect(create_app(parrot)) as client:
            for response, status in (
                (await client.get("/v1/nothing"), 404),
                (await client.get("/v1/completions"), 405),
                (await client.post("/v1/completions", content="{bad"), 400),
            ):
                assert response.status_code == status
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    asyncio.run(go())


@pytest.mark.parametrize(
    ("keys", "given", "user_status", "admin_status"),
    [
        (Keys(), None, 200, 200),
        (Keys(users=("u",)), None, 401, 401),
        (Keys(users=("u",)), "u", 200, 200),
        (Keys(users=("u",), admin="a"), "u", 200, 403),
        (Keys(users=("u",), admin="a"), "a", 200, 200),
        (Keys(users=("u",), admin="a"), "x", 401, 401),
        (Keys(admin="a"), None, 200, 401),
        (Keys(admin="a"), "a", 200, 200),
    ],
)
def test_keys_open_the_routes_they_should(
    parrot: Any, connect: Any, keys: Keys, given: str | None, user_status: int, admin_status: int
) -> None:
    """Users generate, admins also configure; health and metrics stay open for probes and scrapers."""

    async def go() -> None:
        async with connect(create_app(parrot, keys=keys)) as client:
            headers = {} if given is None else {"authorization": f"Bearer {given}"}
            user = await client.post("/v1/completions", json={"prompt": "the"}, headers=headers)
            admin = await client.patch("/v1/config", json={"max_num_seqs": 4}, headers=headers)
            assert (user.status_code, admin.status_code) == (user_status, admin_status)
            if user_status == 401:
                assert user.headers["www-authenticate"] == "Bearer"
            assert (await client.get("/health/ready")).status_code == 200
            assert (await client.get("/metrics")).status_code == 200

    asyncio.run(go())
