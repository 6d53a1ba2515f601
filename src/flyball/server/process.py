"""One process that serves: take the port, serve until told to stop or until the engine dies."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from flyball.core.errors import InvalidInput
from flyball.server.engine_client import EngineClient

GRACE_S = 30  # for requests under way once the server is told to stop


def listen(host: str, port: int) -> socket.socket:
    """Take a port (0: a free one) before anything slow is done; clients that come early wait."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:  # the second for a port beyond 65535
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise InvalidInput(
                f"port {port} on {host} is in use; stop what listens there, or give another --port (0 picks a free one)"
            ) from error
        raise InvalidInput(f"cannot listen on {host} port {port} ({error}); give another --host or --port") from error


def url_of(listener: socket.socket) -> str:
    """Where a listening socket is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(
    app: FastAPI,
    engine: EngineClient,
    listener: socket.socket,
    *,
    on_ready: Callable[[], None],
    access_log: bool = False,
) -> str | None:
    """Serve until a signal comes or the engine dies; returns why it died, or None.

    SIGTERM and SIGINT let requests under way end first (a second SIGINT does not). Both are raised again at the end,
    for whoever handles them outside.
    """
    config = uvicorn.Config(
        app,
        lifespan="on",
        access_log=access_log,
        log_level="info" if access_log else "warning",
        timeout_graceful_shutdown=GRACE_S,
    )
    server = uvicorn.Server(config)
    died: list[str] = []

    async def watch() -> None:
        while not server.started:
            await asyncio.sleep(0.01)
        on_ready()
        # An engine that is stopped with the server also has its reason, but should_exit is set before.
        while not server.should_exit:
            if engine.error is not None:
                died.append(engine.error)
                server.should_exit = True
            await asyncio.sleep(0.1)

    async def run() -> None:
        watcher = asyncio.create_task(watch())
        try:
            await server.serve(sockets=[listener])
        finally:
            watcher.cancel()

    asyncio.run(run())
    return died[0] if died else None
