"""A tiny server with live knobs and streamed completions: what `flyball tune` needs of a server, on a real socket.

An answer takes `seqs_s` seconds a token for every 16 sequences allowed at once, so that the default configuration,
which allows 64, is the slowest.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from aiohttp import web

from flyball.core.errors import InvalidKnob
from flyball.core.knobs import Knob, Space, Value, generation_of

SPACE = Space((
    Knob(name="max_num_seqs", kind="int", default=64, low=1, high=64, log=True),
    Knob(name="max_num_batched_tokens", kind="int", default=256, low=1, high=256, log=True),
    Knob(name="max_wait_ms", kind="float", default=0.0, low=0.0, high=1000.0),
    Knob(name="prefix_caching", kind="bool", default=True),
))  # fmt: skip


@dataclass(kw_only=True)
class TunableServer:
    """See the module; `applied` lists every configuration that was set, in order."""

    seqs_s: float = 0.002
    api_key: str | None = None
    url: str = ""
    values: dict[str, Value] = field(default_factory=SPACE.defaults)
    applied: list[dict[str, Value]] = field(default_factory=list)
    version: int = 1
    answered: int = 0

    def _view(self) -> dict[str, Any]:
        knobs = {knob.name: {k: v for k, v in asdict(knob).items() if k != "name"} for knob in SPACE}
        return {"version": self.version, "generation": generation_of(self.values), "values": self.values,
                "knobs": knobs}  # fmt: skip

    async def _config(self, request: web.Request) -> web.Response:
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": {"message": "no valid key"}}, status=401)
        if request.method == "PATCH":
            try:
                after = self.values | SPACE.check(await request.json())
                if int(after["max_num_seqs"]) > int(after["max_num_batched_tokens"]):
                    raise InvalidKnob("max_num_seqs is over max_num_batched_tokens")  # noqa: TRY301  # as the engine
            except InvalidKnob as error:
                return web.json_response({"error": {"message": str(error)}}, status=400)
            self.values, self.version = after, self.version + 1
            self.applied.append(after)
        return web.json_response(self._view())

    async def _models(self, request: web.Request) -> web.Response:
        card = {"id": "tunable", "vocab_size": 3000, "max_model_len": 1024}
        return web.json_response({"object": "list", "data": [card]})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(body["max_tokens"]):
            await asyncio.sleep(self.seqs_s * int(self.values["max_num_seqs"]) / 16)
            await response.write(b'data: {"choices": [{"index": 0, "text": " a", "token_ids": [7]}]}\n\n')
        await response.write(b"data: [DONE]\n\n")
        self.answered += 1
        return response

    def app(self) -> web.Application:
        """Its routes."""
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_route("GET", "/v1/config", self._config)
        app.router.add_route("PATCH", "/v1/config", self._config)
        app.router.add_post("/v1/completions", self._completions)
        return app


@contextmanager
def running(server: TunableServer) -> Iterator[TunableServer]:
    """Serve on a free port of the loopback interface, in a thread."""
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    ready = threading.Event()

    async def serve() -> None:
        runner = web.AppRunner(server.app(), shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    ready.wait()
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
