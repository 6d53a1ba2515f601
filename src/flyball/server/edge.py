"""Around every route: request ids, the bound on bodies, and an account of each request for those who watch."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flyball.core.clock import Clock
from flyball.server.account import Account, Watcher
from flyball.server.errors import BodyTooLarge, body_too_large, error_body

_GOOD_ID = re.compile(r"[\x21-\x7e]{1,128}")  # anything else could forge lines of a log


class Edge:
    """The outermost layer. Gives every answer an `x-request-id`: the client's own, or a new one."""

    def __init__(self, app: ASGIApp, *, clock: Clock, max_body_bytes: int, watchers: Sequence[Watcher]) -> None:
        self._app = app
        self._clock = clock
        self._max_body_bytes = max_body_bytes
        self._too_large = f"the body is larger than this server's limit of {max_body_bytes} bytes; send less at once"
        self._watchers = watchers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        account = self._open(scope)
        scope.setdefault("state", {})["account"] = account
        done = False

        async def send_with_id(message: Message) -> None:
            nonlocal done
            if message["type"] == "http.response.start":
                account.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = account.request_id
            else:
                done = not message.get("more_body", False)
            await send(message)

        try:
            length = Headers(scope=scope).get("content-length", "")
            if length.isdigit() and int(length) > self._max_body_bytes:
                error = error_body(body_too_large(self._too_large))
                await JSONResponse(error, 413)(scope, receive, send_with_id)
            else:
                await self._app(scope, self._bounded(receive), send_with_id)
        finally:
            account.ended_s = self._clock.now_s()
            account.left |= not done
            for watcher in self._watchers:
                watcher(account)

    def _open(self, scope: Scope) -> Account:
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        client = scope.get("client")
        return Account(
            request_id=given if _GOOD_ID.fullmatch(given) else uuid.uuid4().hex,
            method=scope["method"],
            path=scope["path"],
            client=client[0] if client else "",
            traceparent=headers.get("traceparent"),
            arrival_s=self._clock.now_s(),
        )

    def _bounded(self, receive: Receive) -> Receive:
        """A body without a length is counted as it comes."""
        seen = 0

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self._max_body_bytes:
                    raise BodyTooLarge(413, self._too_large)
            return message

        return bounded


def account_of(request: Request) -> Account:
    """The account that the edge opened for a request."""
    account: Account = request.state.account
    return account
