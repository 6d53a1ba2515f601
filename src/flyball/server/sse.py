"""Answers that take a while: server-sent events, several streams as one, and clients that leave before the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import orjson
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from flyball.core.errors import FlyballError
from flyball.server.account import Account
from flyball.server.errors import error_body

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


class JsonResponse(Response):
    """A JSON answer, written by orjson."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        """The body."""
        return orjson.dumps(content)


def event(data: dict[str, Any]) -> bytes:
    """One event."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, but cancel it as soon as the client is gone (raises ClientDisconnect then).

    To be called when the request's body has been read: what is received after it can only be the disconnect.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def merged(streams: Sequence[AsyncGenerator[list[T], None]]) -> AsyncGenerator[list[T], None]:
    """The items of several streams, all that are there at once; the first failure ends all, closing this closes all."""
    if len(streams) == 1:  # by far the most: without a task and an event between
        async with aclosing(streams[0]) as only:
            async for batch in only:
                yield batch
        return
    items: list[T] = []
    ended: list[asyncio.Task[None]] = []
    news = asyncio.Event()

    async def drain(stream: AsyncGenerator[list[T], None]) -> None:
        async with aclosing(stream):
            async for batch in stream:
                items.extend(batch)
                news.set()

    def end(task: asyncio.Task[None]) -> None:
        ended.append(task)
        news.set()

    tasks = [asyncio.create_task(drain(stream)) for stream in streams]
    for task in tasks:
        task.add_done_callback(end)
    running = len(tasks)
    try:
        while running:
            await news.wait()
            news.clear()
            done, ended[:] = ended[:], []
            batch, items[:] = items[:], []
            if batch:
                yield batch
            for task in done:
                task.result()  # raises what the stream raised
            running -= len(done)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Streams events, then `[DONE]`; its source is closed when the client leaves.

    An error before the first event is raised, and so becomes a status code. A later one is told in an event of its own
    and ends the stream without `[DONE]`: a client must not take half an answer for a whole one.
    """

    media_type = "text/event-stream"

    def __init__(self, source: AsyncGenerator[bytes, None], account: Account) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._source = source
        self._account = account

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the source ends or the client leaves."""
        with suppress(ClientDisconnect):
            await until_disconnect(receive, self._stream(send))

    async def _stream(self, send: Send) -> None:
        async with aclosing(self._source) as source:
            first = await anext(source)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await _send(send, first)
            try:
                async for events in source:
                    await _send(send, events)
            except Exception as error:
                told = error_body(error)
                self._account.error = told["error"]["message"]
                await _send(send, event(told), more=False)
                if isinstance(error, FlyballError):
                    return
                raise  # nobody foresaw it: the server's log must have it
            await _send(send, DONE, more=False)


async def _send(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
