"""One engine as a web application. The application starts the engine and stops it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from flyball import __version__
from flyball.core.clock import Clock, SystemClock
from flyball.core.errors import EngineFailed
from flyball.server import admin, errors, native, openai, status, tokens
from flyball.server.account import Watcher
from flyball.server.auth import Keys
from flyball.server.edge import Edge
from flyball.server.engine_client import EngineClient
from flyball.server.gate import Gate
from flyball.server.generation import Generator
from flyball.server.metrics import ServerMetrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of the front door; the engine has its own."""

    max_body_bytes: int = 16 * 2**20
    stall_s: float = 120.0  # a busy engine that does not advance for so long is not ready


def create_app(
    engine: EngineClient,
    *,
    keys: Keys | None = None,
    clock: Clock | None = None,
    gate: Gate | None = None,
    limits: Limits | None = None,
    watchers: Sequence[Watcher] = (),
) -> FastAPI:
    """An application over an engine that is loaded but not started.

    Whoever stops the server shuts its gate first. Watchers are told of each request at its end.
    """
    clock, keys, gate, limits = clock or SystemClock(), keys or Keys(), gate or Gate(), limits or Limits()
    metrics = ServerMetrics(engine, clock)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        gate.started = True
        yield
        gate.started = False
        await engine.stop()

    app = FastAPI(
        title="Flyball",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses={status: {"model": errors.ErrorBody} for status in ("4XX", "5XX")},
    )
    app.add_middleware(Edge, clock=clock, max_body_bytes=limits.max_body_bytes, watchers=watchers)
    errors.install(app)
    _include(app, engine, keys, gate, Generator(engine, metrics, clock), metrics)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether the process is worth keeping: 503 once the engine has died."""
        if engine.error is not None:
            raise EngineFailed(engine.error)
        return {"status": "ok"}

    @app.get("/health/ready")
    async def ready() -> dict[str, Any]:
        """Whether requests may be sent: 503 before the engine runs, while it drains, stops or hangs, and once dead."""
        if engine.error is not None:
            raise EngineFailed(engine.error)
        gate.check()
        stalled_s = engine.stalled_s()
        if stalled_s > limits.stall_s:
            raise EngineFailed(f"the engine has work but has not advanced for {stalled_s:.0f} s; restart the server")
        return {"status": "ready"}

    @app.get("/metrics")
    async def scrape() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _include(
    app: FastAPI, engine: EngineClient, keys: Keys, gate: Gate, generator: Generator, metrics: ServerMetrics
) -> None:
    """All routes but those for probes and scrapers, each behind its guard."""

    async def held() -> AsyncIterator[None]:
        with gate.enter():
            yield

    user, operator, hold = Depends(keys.user_guard), Depends(keys.admin_guard), Depends(held)
    for router in (
        openai.routes(generator, keys, hold),
        native.routes(generator, keys, hold),
        tokens.routes(generator),
        status.routes(engine, metrics),
    ):
        app.include_router(router, dependencies=[user])
    for router in (admin.config_routes(engine, keys), admin.operation_routes(engine, gate)):
        app.include_router(router, dependencies=[operator])
