"""What the server needs of an engine; `flyball.engine.async_engine.AsyncEngine` is the real one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

from flyball.core.knobs import Space
from flyball.engine.config import RuntimeConfig
from flyball.engine.explain import Setting
from flyball.engine.history import ConfigChange
from flyball.engine.request import RequestOutput, SamplingParams
from flyball.engine.stats import EngineStats
from flyball.engine.text import Tokenizer


class EngineClient(Protocol):
    """An engine as its front door sees it: token ids in, token ids out, step by step."""

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

    def info(self) -> Mapping[str, Any]:
        """What was loaded, as it was: architecture, parameters, dtype, device, quantization, sizes of the KV cache."""
        ...

    def stalled_s(self) -> float:
        """Seconds since anything advanced although there is work; 0 while idle."""
        ...

    async def explain(self) -> Sequence[Setting]:
        """Every setting, where its value came from and why."""
        ...

    def requests(self) -> Sequence[Mapping[str, Any]]:
        """The answers in the making, as of the last step."""
        ...

    def start(self) -> None:
        """Begin to work; requests may be sent from now on."""
        ...

    async def stop(self, drain_s: float = 0.0) -> None:
        """End within `drain_s` seconds; what still runs then is aborted."""
        ...

    def steps(
        self, prompt_ids: list[int], params: SamplingParams, *, request_id: str | None = None, salt: bytes = b""
    ) -> AsyncGenerator[list[RequestOutput], None]:
        """The outputs of one request's `params.n` answers, all that are there at once.

        Closing it frees the answers' blocks at the next step boundary.

        The first item raises ContextLengthExceeded, InvalidInput (also for a grammar that cannot be used), QueueFull or
        EngineFailed when the request is not taken. An answer whose deadline passes ends with FinishReason.TIMEOUT.
        """
        ...

    def abort_answer(self, request_id: str, index: int) -> None:
        """Drop one of the answers to a request; the others go on, and nothing more comes of this one."""
        ...

    async def flush_cache(self) -> int:
        """Forget every known prefix, also under load; returns how many blocks were known."""
        ...

    async def update_runtime(
        self,
        changes: Mapping[str, object],
        *,
        if_version: int | None = None,
        dry_run: bool = False,
        revert_to: int | None = None,
        preempt: bool = False,
        by: str = "",
    ) -> RuntimeConfig:
        """Set knobs, all or none, at the next step boundary; a dry run only says what would be in force.

        `revert_to` starts from the values of an earlier version; with `preempt`, what no longer fits gives way at once.
        Raises InvalidKnob, or VersionConflict when `if_version` is not the version in force.
        """
        ...

    async def history(self) -> Sequence[ConfigChange]:
        """The last changes of the policy, oldest first, with what was measured before and after each."""
        ...

    def stats(self) -> EngineStats:
        """Gauges of now, counters since the start."""
        ...
