"""A small honest engine without a model: it repeats its prompt, one token a step."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from flyball.core.clock import VirtualClock
from flyball.core.errors import ContextLengthExceeded, EngineFailed, InvalidInput, QueueFull
from flyball.engine.config import EngineConfig, RuntimeConfig, first_runtime, knob_space
from flyball.engine.explain import Setting
from flyball.engine.history import ConfigChange, ConfigHistory
from flyball.engine.request import (
    FinishReason,
    RequestOutput,
    RequestReport,
    SamplingParams,
    TokenLogprobs,
)
from flyball.engine.stats import EngineStats
from flyball.engine.tiny_model import train_tokenizer

CONFIG = EngineConfig(model=Path("parrot"), max_num_seqs=8, max_num_batched_tokens=64)


class Parrot:
    """Says its prompt again and again. Each request holds one block; `pause` stops all work between two steps.

    Choice i of n begins at the i-th token of the prompt. Each token is three times as likely as the one after it. Time
    passes only when told: a step after a request's timeout ends it.
    """

    model_name = "parrot"
    max_model_len = 128

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.space = knob_space(CONFIG)
        self.runtime: RuntimeConfig = first_runtime(CONFIG)
        self.error: str | None = None
        self.clock = VirtualClock()
        self.go = asyncio.Event()
        self.go.set()
        self.full: QueueFull | None = None
        self.stalled = 0.0
        self.running: set[str] = set()
        self.silenced: set[tuple[str, int]] = set()
        self.params: list[SamplingParams] = []
        self.salts: list[bytes] = []
        self.flushes = 0
        self._history = ConfigHistory()
        self._counts = EngineStats()
        self._history.record(self.runtime, "start", 0.0, 0.0, self._counts)

    def start(self) -> None:
        """Nothing to start."""

    async def stop(self, drain_s: float = 0.0) -> None:
        """Nothing runs by itself."""

    def info(self) -> Mapping[str, Any]:
        """A bird."""
        return {"architecture": "Psittacus", "block_size": 16, "quantization": None}

    def requests(self) -> Sequence[Mapping[str, Any]]:
        """Those under way."""
        return [{"request_id": one, "state": "running"} for one in sorted(self.running)]

    def die(self, reason: str) -> None:
        """Fail as an engine thread does: every request gets an error, no other is taken."""
        self.error = reason
        self.go.set()

    def stalled_s(self) -> float:
        """As the test says."""
        return self.stalled

    async def explain(self) -> Sequence[Setting]:
        """One setting."""
        return [Setting(name="max_num_seqs", value=8, source="default", why="it is a parrot", live=True)]

    def abort_answer(self, request_id: str, index: int) -> None:
        """Say no more of it."""
        self.silenced.add((request_id, index))

    async def steps(self, *args: Any, **kwargs: Any) -> AsyncGenerator[list[RequestOutput], None]:
        """One output at a time."""
        async with aclosing(self.generate(*args, **kwargs)) as outputs:
            async for output in outputs:
                yield [output]

    async def generate(
        self, prompt_ids: list[int], params: SamplingParams, *, request_id: str | None = None, salt: bytes = b""
    ) -> AsyncGenerator[RequestOutput, None]:
        """One token a step and choice."""
        if self.full is not None:
            raise self.full
        if params.grammar is not None and "bad" in params.grammar.text:
            raise InvalidInput(f"this {params.grammar.kind} cannot be used: it is bad; change it")
        if not prompt_ids or not all(0 <= i < self.vocab_size for i in prompt_ids):
            raise InvalidInput("the prompt is empty or not of this vocabulary; give valid token ids")
        if len(prompt_ids) + params.max_tokens > self.max_model_len:
            raise ContextLengthExceeded(f"more than {self.max_model_len} tokens; shorten the prompt")
        assert request_id is not None
        assert request_id not in self.running
        self.params.append(params)
        self.salts.append(salt)
        self.running.add(request_id)
        self._counts.prompt_tokens_computed += len(prompt_ids)
        arrival_s, open_choices = self.clock.now_s(), set(range(params.n))
        try:
            for step in range(params.max_tokens):
                await self.go.wait()
                await asyncio.sleep(0)
                if self.error is not None:
                    raise EngineFailed(self.error)
                late = params.timeout_s is not None and self.clock.now_s() > arrival_s + params.timeout_s
                open_choices -= {index for rid, index in self.silenced if rid == request_id}
                for index in sorted(open_choices):
                    output = self._say(prompt_ids, params, index, step, late)
                    output = replace(output, request_id=request_id)
                    if output.finish_reason is not None:
                        open_choices.discard(index)
                    yield output
                if not open_choices:
                    return
        finally:
            self.running.discard(request_id)

    def _say(self, prompt: list[int], params: SamplingParams, index: int, step: int, late: bool) -> RequestOutput:
        token, following = prompt[(index + step) % len(prompt)], prompt[(index + step + 1) % len(prompt)]
        finish = None
        if step + 1 == params.max_tokens:
            finish = FinishReason.LENGTH
        if token in params.stop_token_ids:
            finish = FinishReason.STOP
        if late:
            finish = FinishReason.TIMEOUT
        self._counts.generation_tokens += not late
        logprobs = None
        if params.logprobs is not None:
            top = ((token, math.log(0.75)), (following, math.log(0.25)))
            logprobs = (TokenLogprobs(token, math.log(0.75), top[: params.logprobs]),)
        return RequestOutput(
            request_id="",
            new_token_ids=() if late else (token,),
            index=index,
            logprobs=() if late and logprobs else logprobs,
            finish_reason=finish,
            num_prompt_tokens=len(prompt),
            report=RequestReport(
                arrival_s=0.0, first_scheduled_s=1.0, first_token_s=3.0, finished_s=7.0, num_preemptions=0,
                batch_size_seen=max(1, len(self.running)), num_cached_tokens=0,
            ) if finish else None,
        )  # fmt: skip

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
        """As the engine does, but at once."""
        earlier = self._history.values_of(revert_to) if revert_to is not None else {}
        after = self.runtime.changed({**earlier, **changes}, self.space, if_version)
        if not dry_run:
            self.runtime = after
            self._history.record(after, by, 0.0, 0.0, self._counts)
        return after

    async def history(self) -> Sequence[ConfigChange]:
        """The last changes."""
        return self._history.changes(0.0, self._counts)

    async def flush_cache(self) -> int:
        """There is never much in it."""
        self.flushes += 1
        return 3

    def stats(self) -> EngineStats:
        """Counts of now."""
        self._counts.running = self._counts.blocks_used = len(self.running)
        self._counts.blocks_free = 100 - len(self.running)
        return self._counts


_TEXT = "The cat sat on the mat and said: stop here. 😀 家 "


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level tokenizer with a chat template."""
    return train_tokenizer([_TEXT * 50], 400, 128)


@pytest.fixture
def parrot(tokenizer: Any) -> Parrot:
    """An engine."""
    return Parrot(tokenizer)


@pytest.fixture
def connect() -> Callable[[FastAPI], Any]:
    """An HTTP client of an application in process, between its start and its end."""

    @asynccontextmanager
    async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as c:
            yield c

    return client
