"""What the server needs of an engine; `flyball.engine.async_engine.AsyncEngine` is the real one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Protocol

from flyball.core.knobs import Space
from flyball.engine.config import RuntimeConfig
from flyball.engine.request import RequestOutput, SamplingParams
from flyball.engine.stats import EngineStats
from flyball.engine.text import Tokenizer


class EngineClient(Protocol):
    """An engine as its front door sees it: token ids in, token ids out, one item a step."""

    @property
    def model_name(self) -> str:
        """The name clients ask for."""
        ...

    @property
    def max_model_len(self) -> int:
        """Most tokens of one request, prompt and output."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids go from 0 to one below this."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's own."""
        ...

    @property
    def space(self) -> Space:
        """The live knobs."""
        ...

    @property
    def runtime(self) -> RuntimeConfig:
        """The policy in force."""
        ...

    @property
    def error(self) -> str | None:
        """Why the engine died, in one sentence; None while it lives."""
        ...

    def start(self) -> None:
        """Begin to work; requests may be sent from now on."""
        ...

    async def stop(self, drain_s: float = 0.0) -> None:
        """End within `drain_s` seconds; what still runs then is aborted."""
        ...

    def generate(
        self, prompt_ids: list[int], params: SamplingParams, *, request_id: str | None = None, salt: bytes = b""
    ) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of one request; closing the generator frees its blocks at the next step boundary.

        The first item raises ContextLengthExceeded, InvalidInput or EngineFailed when the request is not taken.
        """
        ...

    async def update_runtime(
        self, changes: Mapping[str, object], *, if_version: int | None = None, dry_run: bool = False
    ) -> RuntimeConfig:
        """Set knobs, all or none, at the next step boundary; a dry run only says what would be in force.

        Raises InvalidKnob, or VersionConflict when `if_version` is not the version in force.
        """
        ...

    def stats(self) -> EngineStats:
        """Gauges of now, counters since the start."""
        ...
