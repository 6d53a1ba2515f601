"""A small honest OpenAI-compatible server that misbehaves on request, for all who talk to one."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web


@dataclass(kw_only=True)
class FakeServer:
    """Answers /v1/completions with `max_tokens` tokens; `script` names, by order of arrival, how one goes wrong."""

    script: Callable[[int], str] = lambda index: "ok"
    tokens_per_chunk: int = 1
    token_ids: bool = True  # list the ids of each chunk's tokens, as vLLM and Flyball do when asked
    hold_until: int = 0  # answer no one before this many requests are here
    card: dict[str, Any] = field(default_factory=lambda: {"id": "fake", "vocab_size": 3000, "max_model_len": 1024})
    models_answers: int = 1_000_000  # after so many answers /v1/models is out of service
    generations: tuple[str, ...] = ()  # what GET /v1/config answers, one after another; the last stays
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    dropped: int = 0  # requests whose client went away
    answered: int = 0
    _config_calls: int = 0

    def __post_init__(self) -> None:
        self._enough = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve(ready)))
        self._thread.start()
        ready.wait()

    async def _serve(self, ready: threading.Event) -> None:
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/config", self._config)
        app.router.add_post("/v1/completions", self._completions)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await self._stop.wait()
        await runner.cleanup()

    def close(self) -> None:
        """Stop serving."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()
            self._loop.close()

    def sees_clients_leave(self) -> bool:
        """Whether, in the end, every request that is not answered has lost its client."""
        deadline = time.monotonic() + 20
        while self.dropped + self.answered < len(self.bodies) and time.monotonic() < deadline:
            time.sleep(0.001)
        return self.dropped + self.answered == len(self.bodies) and self.dropped > 0

    async def _models(self, request: web.Request) -> web.Response:
        self.models_answers -= 1
        if self.models_answers < 0:
            raise web.HTTPServiceUnavailable
        return web.json_response({"object": "list", "data": [self.card]})

    async def _config(self, request: web.Request) -> web.Response:
        if not self.generations:
            raise web.HTTPNotFound
        generation = self.generations[min(self._config_calls, len(self.generations) - 1)]
        self._config_calls += 1
        return web.json_response({"version": 1, "generation": generation, "values": {"max_num_seqs": 8}, "knobs": {}})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        fault = self.script(len(self.bodies))
        self.headers.append(dict(request.headers))
        self.bodies.append(await request.json())
        try:
            response = await self._answer(request, self.bodies[-1], fault)
            self.answered += 1
            return response
        except (asyncio.CancelledError, ConnectionResetError):
            self.dropped += 1
            raise

    async def _answer(self, request: web.Request, body: dict[str, Any], fault: str) -> web.StreamResponse:
        if len(self.bodies) >= self.hold_until:
            self._enough.set()
        await self._enough.wait()
        if fault.startswith("http_"):
            return web.json_response({"error": {"message": f"told to: {fault}"}}, status=int(fault[5:]))
        if fault == "timeout":
            await asyncio.sleep(3600)
        if fault == "connection":
            assert request.transport
            request.transport.abort()
            return web.Response()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await self._stream(response, request, body, fault)
        return response

    async def _stream(
        self, response: web.StreamResponse, request: web.Request, body: dict[str, Any], fault: str
    ) -> None:
        total = 0 if fault == "empty" else body["max_tokens"]
        for start in range(0, total, self.tokens_per_chunk):
            if fault == "stream_error" and start:
                await _event(response, '{"error": {"message": "told to fail", "code": 500}}')
                return
            if fault == "malformed" and start:
                await _event(response, "{not json")
                return
            if fault == "reset" and start:
                assert request.transport
                request.transport.abort()
                return
            if fault == "truncated" and start:
                return
            count = min(self.tokens_per_chunk, total - start)
            ids = f', "token_ids": {[7] * count}' if self.token_ids else ""
            text = "" if fault == "silent" else " a" * count
            await _event(response, f'{{"choices": [{{"index": 0, "text": "{text}"{ids}}}], "usage": null}}')
        if fault != "no_usage":
            usage = f'{{"prompt_tokens": {len(body["prompt"])}, "completion_tokens": {total}}}'
            await _event(response, f'{{"choices": [], "usage": {usage}}}')
        await _event(response, "[DONE]")


async def _event(response: web.StreamResponse, data: str) -> None:
    await response.write(f"data: {data}\n\n".encode())


@pytest.fixture
def fake_server() -> Iterator[Callable[..., FakeServer]]:
    """Starts fake servers; all stop when the test ends."""
    servers: list[FakeServer] = []

    def start(**settings: Any) -> FakeServer:
        servers.append(FakeServer(**settings))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
