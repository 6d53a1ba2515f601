"""Who is let in, and how many are inside: readiness, draining, and the end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from flyball.core.errors import EngineFailed
from flyball.server.errors import ApiError


class Gate:
    """Open while the server takes requests; shut while it drains: who is inside ends, nobody enters."""

    def __init__(self) -> None:
        self.started = False  # the engine runs
        self._draining: set[str] = set()  # who asked for it: an operator, a signal
        self.inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def draining(self) -> bool:
        """Whether new requests are turned away."""
        return bool(self._draining)

    def shut(self, by: str) -> None:
        """Turn new requests away, and say not ready."""
        self._draining.add(by)

    def reopen(self, by: str) -> None:
        """Take one's wish to drain back."""
        self._draining.discard(by)

    def check(self) -> None:
        """Raise unless requests may be sent."""
        if not self.started:
            raise EngineFailed("the engine is not running yet, or stops; ask again later")
        if self._draining:
            raise ApiError(
                503,
                "the server drains: it ends what it has and takes nothing new; ask another replica",
                code="draining",
            )

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Be inside for a while."""
        self.check()
        self.inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self.inside -= 1
            if not self.inside:
                self._empty.set()

    async def empty(self) -> None:
        """Wait until nobody is inside."""
        await self._empty.wait()
