"""Answers that take a while: server-sent events, several streams as one, and clients that leave before the end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from flyball.core.errors import FlyballError
from flyball.server.errors import error_body

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # made once: dumps() makes one each time


def event(data: dict[str, Any]) -> bytes:
    """One event."""
    return b"data: " + _encode(data).encode() + b"\n\n"


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


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """The items of several streams as they come; the first failure ends all, and closing this closes all."""
    queue: asyncio.Queue[T | asyncio.Task[None]] = asyncio.Queue()

    async def drain(stream: AsyncGenerator[T, None]) -> None:
        async with aclosing(stream):
            async for item in stream:
                queue.put_nowait(item)

    tasks = [asyncio.create_task(drain(stream)) for stream in streams]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)
    running = len(tasks)
    try:
        while running:
            item = await queue.get()
            if isinstance(item, asyncio.Task):
                item.result()  # raises what the stream raised
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Streams JSON objects as events, then `[DONE]`; its source is closed when the client leaves.

    An error before the first event is raised, and so becomes a status code. A later one is told in an event of its own
    and ends the stream without `[DONE]`: a client must not take half an answer for a whole one.
    """

    media_type = "text/event-stream"

    def __init__(self, source: AsyncGenerator[dict[str, Any], None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._source = source

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the source ends or the client leaves."""
        with suppress(ClientDisconnect):
            await until_disconnect(receive, self._stream(send))

    async def _stream(self, send: Send) -> None:
        async with aclosing(self._source) as source:
            first = await anext(source)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await _send(send, event(first))
            try:
                async for item in source:
                    await _send(send, event(item))
            except Exception as error:
                await _send(send, event(error_body(error)), more=False)
                if isinstance(error, FlyballError):
                    return
                raise  # nobody foresaw it: the server's log must have it
            await _send(send, DONE, more=False)


async def _send(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
