"""One line a request, with its numbers, written by structlog as JSON or for people."""

from __future__ import annotations

from typing import Any, TextIO

import structlog

from flyball.server.account import Account, Watcher

_PROBES = frozenset({"/health", "/health/ready", "/metrics"})  # told only when they fail


def access_log(out: TextIO, *, as_json: bool = True) -> Watcher:
    """A watcher that writes each request's line to a stream."""
    render: Any = structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer(colors=False)
    log = structlog.wrap_logger(
        structlog.WriteLogger(out),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            render,
        ],
        wrapper_class=structlog.BoundLogger,
        cache_logger_on_first_use=True,
    )

    def write(account: Account) -> None:
        if account.path in _PROBES and account.status == 200:
            return
        failed = account.error is not None or (account.status or 0) >= 500
        (log.error if failed else log.info)("request", **account.line())

    return write
