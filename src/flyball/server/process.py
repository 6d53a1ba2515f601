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
from flyball.server.gate import Gate

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
    gate: Gate,
    on_ready: Callable[[], None],
    grace_s: float = GRACE_S,
) -> None:
    """Serve until SIGTERM (returns) or SIGINT (raises KeyboardInterrupt), or raise EngineFailed when the engine dies.

    A signal first shuts the app's gate: readiness is gone and new requests are turned away, while health, metrics and
    what runs are still answered. When the last request has ended, after `grace_s`, or at a second signal, the server
    ends; what still runs then is told so.
    """
    config = uvicorn.Config(
        app,
        lifespan="on",
        access_log=False,  # the app has its own
        log_level="warning",
        timeout_graceful_shutdown=5,  # only a client that does not read its answer needs it
    )
    told, died = asyncio.run(_Run(_Server(config), engine, gate, grace_s, on_ready).until_the_end(listener))
    if died is not None:
        raise EngineFailed(died)
    if told is signal.SIGINT:
        raise KeyboardInterrupt


class _Server(uvicorn.Server):
    """Leaves signals to `serve`: uvicorn's second Ctrl-C cancels whatever runs, with a traceback for each."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Run:
    """One server's life."""

    def __init__(
        self, server: uvicorn.Server, engine: EngineClient, gate: Gate, grace_s: float, on_ready: Callable[[], None]
    ) -> None:
        self._server = server
        self._engine = engine
        self._gate = gate
        self._grace_s = grace_s
        self._on_ready = on_ready
        self._told: list[signal.Signals] = []
        self._died: str | None = None
        self._first = asyncio.Event()
        self._enough = asyncio.Event()

    async def until_the_end(self, listener: socket.socket) -> tuple[signal.Signals | None, str | None]:
        """Returns the first signal, and why the engine died; None for what did not happen."""
        if threading.current_thread() is threading.main_thread():
            for sent in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(sent, self._tell, sent)
        watcher = asyncio.create_task(self._watch())
        try:
            await self._server.serve(sockets=[listener])
        finally:
            watcher.cancel()
        return self._told[0] if self._told else None, self._died

    def _tell(self, sent: signal.Signals) -> None:
        self._gate.shut("signal")
        (self._enough if self._told else self._first).set()
        self._told.append(sent)

    async def _watch(self) -> None:
        """End the server when it is told to, or when its engine dies."""
        while not self._server.started:
            await asyncio.sleep(0.01)
        self._on_ready()
        while not self._first.is_set():
            if self._engine.error is not None:
                self._died = self._engine.error
                self._server.should_exit = True
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._first.wait(), 0.1)
        ends = [asyncio.create_task(end()) for end in (self._gate.empty, self._enough.wait)]
        await asyncio.wait(ends, timeout=self._grace_s, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
        self._server.should_exit = True
        await self._engine.stop()  # from here on it has an error because it was stopped
