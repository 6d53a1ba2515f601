"""A small front door for the replicas of one server: counts what arrives, picks the least loaded, loses nothing.

A request waits here while no replica is ready; one that a replica turns away before its first byte (it drains, or is
gone) goes to another. What has begun to stream stays where it is, which is why a replica that is to go is first taken
off the list, and ended only when its last answer has.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import ClientConnectionError, ClientSession, ClientTimeout, TCPConnector, web

from flyball.core.errors import InvalidInput

_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length", "host", "te", "upgrade"})
_MAX_BODY = 64 << 20
_AWAY = {503}  # a replica that drains, or is not ready yet, answers so before it does anything


@dataclass
class Backend:
    """A replica as the gateway sees it."""

    url: str
    open: bool = True  # takes new requests
    inside: int = 0


@dataclass
class Counts:
    """What the gateway counted."""

    arrived: int = 0
    queued: int = 0
    retried: int = 0
    answered: Counter[int] = field(default_factory=Counter)  # by status
    broken: int = 0  # answers cut off by their replica


class Gateway:
    """One server's front door; the event loop that serves runs in a thread of its own (see `gateway`)."""

    def __init__(self, server: str, *, wait_s: float = 300.0, host: str = "127.0.0.1", port: int = 0) -> None:
        if not wait_s > 0:
            raise InvalidInput(f"wait_s is {wait_s}; give the seconds that a request may wait for a replica, above 0")
        self.server = server
        self.counts = Counts()
        self.url = ""
        self._backends: dict[str, Backend] = {}
        self._wait_s = wait_s
        self._address = host, port
        self._loop: asyncio.AbstractEventLoop | None = None
        self._session: ClientSession | None = None
        self._changed: asyncio.Event | None = None

    def inside(self, name: str) -> int:
        """Answers that a replica is still giving."""
        backend = self._backends.get(name)
        return 0 if backend is None else backend.inside

    def route(self, backends: Mapping[str, tuple[str, bool]]) -> None:
        """The replicas there are: name -> address, and whether it takes new requests. From any thread."""
        assert self._loop is not None  # used inside `gateway` only
        asyncio.run_coroutine_threadsafe(self._route(dict(backends)), self._loop).result()

    async def _route(self, backends: Mapping[str, tuple[str, bool]]) -> None:
        for name, (url, takes) in backends.items():
            old = self._backends.setdefault(name, Backend(url))
            old.open = takes
        for name in [n for n in self._backends if n not in backends]:
            del self._backends[name]
        assert self._changed is not None
        self._changed.set()

    async def _pick(self, tried: set[str]) -> tuple[str, Backend] | None:
        """The least loaded open replica not tried yet, waiting until there is one; None when that takes too long."""
        assert self._loop is not None
        assert self._changed is not None
        deadline_s = self._loop.time() + self._wait_s
        self.counts.queued += 1
        try:
            while True:
                free = [(n, b) for n, b in self._backends.items() if b.open and n not in tried]
                if free:
                    return min(free, key=lambda one: (one[1].inside, one[0]))
                tried.clear()  # those that turned us away may take us a little later
                self._changed.clear()
                left_s = deadline_s - self._loop.time()
                if left_s <= 0:
                    return None
                try:
                    await asyncio.wait_for(self._changed.wait(), min(left_s, 0.2))
                except TimeoutError:
                    continue
        finally:
            self.counts.queued -= 1

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        self.counts.arrived += 1
        body = await request.read()
        tried: set[str] = set()
        while True:
            picked = await self._pick(tried)
            if picked is None:
                self.counts.answered[503] += 1
                return web.json_response({"error": {"message": "no replica became ready; try again later"}}, status=503)
            name, backend = picked
            backend.inside += 1
            try:
                answer = await self._try(request, backend, body)
            finally:
                backend.inside -= 1
            if answer is not None:
                self.counts.answered[answer.status] += 1
                return answer
            self.counts.retried += 1
            tried.add(name)

    async def _try(self, request: web.Request, backend: Backend, body: bytes) -> web.StreamResponse | None:
        """The replica's answer streamed through, or None if it turned the request away untouched."""
        assert self._session is not None
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _HOP}
        answer: web.StreamResponse | None = None
        try:
            async with self._session.request(
                request.method, backend.url + request.path_qs, headers=headers, data=body
            ) as reply:
                if reply.status in _AWAY:
                    return None
                kept = {k: v for k, v in reply.headers.items() if k.lower() not in _HOP}
                answer = web.StreamResponse(status=reply.status, headers=kept)
                await answer.prepare(request)
                async for part in reply.content.iter_any():
                    await answer.write(part)
                await answer.write_eof()
                return answer
        except ClientConnectionError:
            if answer is None:
                return None
            self.counts.broken += 1
            raise

    async def _metrics(self, _request: web.Request) -> web.Response:
        return web.Response(text=self.exposition(), headers={"content-type": "text/plain; version=0.0.4"})

    def exposition(self) -> str:
        """The counts in Prometheus' text format."""
        label, c = f'server="{self.server}"', self.counts
        lines = [
            "# HELP gateway_requests_total Requests that reached the gateway.",
            "# TYPE gateway_requests_total counter",
            f"gateway_requests_total{{{label}}} {c.arrived}",
            "# HELP gateway_requests_queued Requests that wait for a replica.",
            "# TYPE gateway_requests_queued gauge",
            f"gateway_requests_queued{{{label}}} {c.queued}",
            "# HELP gateway_retries_total Requests that went on to another replica, untouched by the first.",
            "# TYPE gateway_retries_total counter",
            f"gateway_retries_total{{{label}}} {c.retried}",
            "# HELP gateway_answers_broken_total Answers cut off by their replica.",
            "# TYPE gateway_answers_broken_total counter",
            f"gateway_answers_broken_total{{{label}}} {c.broken}",
            "# HELP gateway_answers_total Answers by status.",
            "# TYPE gateway_answers_total counter",
            *(f'gateway_answers_total{{{label},status="{s}"}} {n}' for s, n in sorted(c.answered.items())),
        ]
        return "\n".join(lines) + "\n"

    async def _serve(self, started: threading.Event, end: asyncio.Event) -> None:
        app = web.Application(client_max_size=_MAX_BODY)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_route("*", "/{path:.*}", self._forward)
        runner = web.AppRunner(app, access_log=None)
        # Engines' servers close idle connections after 5 s; one reused while it closes would look like a failure.
        connector = TCPConnector(limit=0, keepalive_timeout=2)
        patience = ClientTimeout(total=None, sock_connect=5.0)
        async with ClientSession(connector=connector, timeout=patience, auto_decompress=False) as session:
            self._session = session
            await runner.setup()
            try:
                site = web.TCPSite(runner, *self._address, backlog=1024)
                await site.start()
                host, port = runner.addresses[0][:2]
                self.url = f"http://{host}:{port}"
                started.set()
                await end.wait()
            finally:
                await runner.cleanup()

    def _run(self, started: threading.Event, stop: list[asyncio.Event]) -> None:
        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            self._changed = asyncio.Event()
            end = asyncio.Event()
            stop.append(end)
            await self._serve(started, end)

        try:
            asyncio.run(main())
        finally:
            started.set()


@contextmanager
def gateway(server: str, *, wait_s: float = 300.0, host: str = "127.0.0.1", port: int = 0) -> Iterator[Gateway]:
    """Serve a front door while the block runs; a port of 0 picks a free one."""
    door = Gateway(server, wait_s=wait_s, host=host, port=port)
    started = threading.Event()
    stop: list[asyncio.Event] = []
    thread = threading.Thread(target=door._run, args=(started, stop), name=f"gateway-{server}", daemon=True)
    thread.start()
    started.wait()
    if not door.url:
        thread.join()
        raise InvalidInput(f"the gateway cannot listen on {host} port {port}; give another address")
    try:
        yield door
    finally:
        assert door._loop is not None
        door._loop.call_soon_threadsafe(stop[0].set)
        thread.join()
