"""One engine as a web application. The application starts the engine and stops it."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flyball import __version__
from flyball.core.clock import Clock, SystemClock
from flyball.core.errors import EngineFailed
from flyball.server import admin, errors, openai
from flyball.server.auth import Keys
from flyball.server.engine_client import EngineClient
from flyball.server.generation import Generator
from flyball.server.metrics import ServerMetrics


def create_app(engine: EngineClient, *, keys: Keys | None = None, clock: Clock | None = None) -> FastAPI:
    """An application over an engine that is loaded but not started."""
    clock = clock or SystemClock()
    keys = keys or Keys()
    metrics = ServerMetrics(engine, clock)
    started = False

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        nonlocal started
        engine.start()
        started = True
        yield
        started = False
        await engine.stop()

    app = FastAPI(title="Flyball", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(RequestIds)
    errors.install(app)
    generator = Generator(engine, metrics, clock)
    app.include_router(openai.routes(generator), dependencies=[Depends(keys.user_guard)])
    app.include_router(admin.routes(engine), dependencies=[Depends(keys.admin_guard)])

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether the process is worth keeping: 503 once the engine has died."""
        if engine.error is not None:
            raise EngineFailed(engine.error)
        return {"status": "ok"}

    @app.get("/health/ready")
    async def ready() -> dict[str, Any]:
        """Whether requests may be sent: 503 before the engine runs, while it stops, and once it has died."""
        if engine.error is not None:
            raise EngineFailed(engine.error)
        if not started:
            raise EngineFailed("the engine is not running yet, or stops; ask again later")
        return {"status": "ready"}

    @app.get("/metrics")
    async def scrape() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


class RequestIds:
    """Gives every answer an `x-request-id`: the client's own, or a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Request(scope).headers.get("x-request-id", "")
        request_id = given or uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)
