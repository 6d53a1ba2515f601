"""One process that serves: take the port, serve until told to stop or until the engine dies."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from flyball.core.errors import EngineFailed, InvalidInput
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
) -> None:
    """Serve until SIGTERM (returns) or SIGINT (raises KeyboardInterrupt), or raise EngineFailed when the engine dies.

    Requests under way may end first, for GRACE_S or until a second signal; what still runs then is told so.
    """
    config = uvicorn.Config(
        app,
        lifespan="on",
        access_log=access_log,
        log_level="info" if access_log else "warning",
        timeout_graceful_shutdown=GRACE_S + 5,  # only a client that does not read its answer needs it
    )
    told, died = asyncio.run(_serve(_Server(config), engine, listener, on_ready))
    if died is not None:
        raise EngineFailed(died)
    if told is signal.SIGINT:
        raise KeyboardInterrupt


class _Server(uvicorn.Server):
    """Leaves signals to `serve`: uvicorn's second Ctrl-C cancels whatever runs, with a traceback for each."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(
    server: uvicorn.Server, engine: EngineClient, listener: socket.socket, on_ready: Callable[[], None]
) -> tuple[signal.Signals | None, str | None]:
    """Returns the first signal, and why the engine died; None for what did not happen."""
    told: list[signal.Signals] = []
    died: list[str] = []
    enough = asyncio.Event()

    def tell(sent: signal.Signals) -> None:
        if told:
            enough.set()
        told.append(sent)
        server.should_exit = True

    async def watch() -> None:
        while not server.started:
            await asyncio.sleep(0.01)
        on_ready()
        while not server.should_exit:  # once it is set, the engine has an error because it was stopped
            if engine.error is not None:
                died.append(engine.error)
                server.should_exit = True
            await asyncio.sleep(0.1)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(enough.wait(), GRACE_S)
        await engine.stop()

    if threading.current_thread() is threading.main_thread():
        for sent in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(sent, tell, sent)
    watcher = asyncio.create_task(watch())
    try:
        await server.serve(sockets=[listener])
    finally:
        watcher.cancel()
    return told[0] if told else None, died[0] if died else None
