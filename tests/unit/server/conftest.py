"""A small honest engine without a model: it repeats its prompt, one token a step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from flyball.core.errors import ContextLengthExceeded, EngineFailed, InvalidInput
from flyball.engine.config import EngineConfig, RuntimeConfig, first_runtime, knob_space
from flyball.engine.request import FinishReason, RequestOutput, SamplingParams
from flyball.engine.stats import EngineStats
from flyball.engine.tiny_model import train_tokenizer

CONFIG = EngineConfig(model=Path("parrot"), max_num_seqs=8, max_num_batched_tokens=64)


class Parrot:
    """Says its prompt again and again. Each request holds one block; `pause` stops all work between two steps."""

    model_name = "parrot"
    max_model_len = 128

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.space = knob_space(CONFIG)
        self.runtime: RuntimeConfig = first_runtime(CONFIG)
        self.error: str | None = None
        self.go = asyncio.Event()
        self.go.set()
        self.running: set[str] = set()
        self.params: list[SamplingParams] = []
        self._counts = EngineStats()

    def start(self) -> None:
        """Nothing to start."""

    async def stop(self, drain_s: float = 0.0) -> None:
        """Nothing runs by itself."""

    def die(self, reason: str) -> None:
        """Fail as an engine thread does: every request gets an error, no other is taken."""
        self.error = reason
        self.go.set()

    async def generate(
        self, prompt_ids: list[int], params: SamplingParams, *, request_id: str | None = None, salt: bytes = b""
    ) -> AsyncGenerator[RequestOutput, None]:
        """One token a step."""
        if not prompt_ids or not all(0 <= i < self.vocab_size for i in prompt_ids):
            raise InvalidInput("the prompt is empty or not of this vocabulary; give valid token ids")
        if len(prompt_ids) + params.max_tokens > self.max_model_len:
            raise ContextLengthExceeded(f"more than {self.max_model_len} tokens; shorten the prompt")
        assert request_id is not None
        assert request_id not in self.running
        self.params.append(params)
        self.running.add(request_id)
        self._counts.prompt_tokens_computed += len(prompt_ids)
        try:
            for i in range(params.max_tokens):
                await self.go.wait()
                await asyncio.sleep(0)
                if self.error is not None:
                    raise EngineFailed(self.error)
                token = prompt_ids[i % len(prompt_ids)]
                stopped = token in params.stop_token_ids
                last = FinishReason.LENGTH if i + 1 == params.max_tokens else None
                self._counts.generation_tokens += 1
                yield RequestOutput(
                    request_id=request_id,
                    new_token_ids=(token,),
                    finish_reason=FinishReason.STOP if stopped else last,
                    num_prompt_tokens=len(prompt_ids),
                )
                if stopped:
                    return
        finally:
            self.running.discard(request_id)

    async def update_runtime(
        self, changes: Mapping[str, object], *, if_version: int | None = None, dry_run: bool = False
    ) -> RuntimeConfig:
        """As the engine does, but at once."""
        after = self.runtime.changed(changes, self.space, if_version)
        if not dry_run:
            self.runtime = after
        return after

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
