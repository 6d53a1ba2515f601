"""Batching for programs without a server: texts in, texts out, over an engine of their own.

`DynamicBatcher` gathers requests for a moment and answers each as a coroutine; `ContinuousBatcher` is stepped by hand.
Both run the same engine, so requests join and leave at every step, and a long one never holds up a short one.
"""

from __future__ import annotations

import itertools
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

from flyball.core.clock import Clock, SystemClock
from flyball.core.errors import EngineFailed
from flyball.engine.async_engine import AsyncEngine
from flyball.engine.config import EngineConfig
from flyball.engine.core import EngineCore
from flyball.engine.request import FinishReason, RequestOutput, SamplingParams
from flyball.engine.text import StopStrings, TextCodec


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceRequest:
    """One prompt, and how to answer it."""

    prompt: str
    max_tokens: int = 100
    temperature: float = 0.7
    top_p: float = 1.0
    stop: tuple[str, ...] = ()  # texts that end the answer and are no part of it
    ignore_eos: bool = False
    seed: int | None = None
    timeout_s: float | None = None  # from submission to the last token
    request_id: str | None = None  # None: one is made

    def params(self) -> SamplingParams:
        """As the engine takes it; raises InvalidInput for a value out of range."""
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            ignore_eos=self.ignore_eos,
            seed=self.seed,
            timeout_s=self.timeout_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceResult:
    """One answer, and what it took."""

    request_id: str
    text: str
    tokens_generated: int  # tokens, the end of sequence included
    prompt_tokens: int
    finish_reason: str  # stop, length, timeout or error
    ttft_ms: float  # from submission to the first token, waiting included
    latency_ms: float  # from submission to the last token
    error: str | None = None


class DynamicBatcher:
    """Gathers requests for up to `max_wait_ms` or until `max_batch_size` are there, and answers them together.

    A batch begins as soon as it is full or its oldest request has waited; while one runs, more join at every step.
    `max_tokens_per_batch` bounds a step: longer prompts are computed in parts.

        async with DynamicBatcher(Path("model")) as batcher:
            result = await batcher.submit(InferenceRequest(prompt="Once upon"))
    """

    def __init__(
        self,
        model: Path,
        max_batch_size: int = 32,
        max_wait_ms: float = 50.0,
        max_tokens_per_batch: int = 4096,
        config: EngineConfig | None = None,
    ) -> None:
        base = config or EngineConfig(model=model)
        self.engine = AsyncEngine(
            replace(base, model=model, max_num_seqs=max_batch_size, max_num_batched_tokens=max_tokens_per_batch)
        )
        self._max_wait_ms = max_wait_ms
        self._codec = TextCodec(self.engine.tokenizer)
        self._clock = SystemClock()
        self._ids = itertools.count()
        self._started = False

    async def __aenter__(self) -> DynamicBatcher:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Begin to work; a second call does nothing."""
        if not self._started:
            self._started = True
            self.engine.start()
            await self.engine.update_runtime({"max_wait_ms": self._max_wait_ms}, by="DynamicBatcher")

    async def stop(self, drain_s: float = 30.0) -> None:
        """End; what is under way has up to `drain_s` seconds to finish, then it fails, and nobody is left waiting."""
        if self._started:
            await self.engine.stop(drain_s)

    async def submit(self, request: InferenceRequest) -> InferenceResult:
        """Answer one request; cancelling the call takes it out of the batch.

        Raises InvalidInput, ContextLengthExceeded or QueueFull where it is not taken, EngineFailed where the engine
        ended. One request's failure is no other's.
        """
        rid = request.request_id or f"request-{next(self._ids)}"
        answer = _Answer(rid, request, self._codec, self._clock)
        outputs = self.engine.generate(answer.prompt_ids, request.params(), request_id=rid)
        async with aclosing(outputs):
            async for output in outputs:
                result = answer.push(output)
                if result is not None:
                    return result
        raise EngineFailed(f"request {rid} was dropped because the batcher stopped; send it again")


class ContinuousBatcher:
    """Requests join and leave the batch at every step, which the caller takes.

    `max_sequence_length` bounds a request's prompt and answer together; so do the model's own positions.
    """

    def __init__(
        self,
        model: Path,
        max_batch_size: int = 64,
        max_sequence_length: int = 2048,
        config: EngineConfig | None = None,
    ) -> None:
        base = config or EngineConfig(model=model)
        tokens = max(base.max_num_batched_tokens, max_batch_size)
        self.core = EngineCore(replace(base, model=model, max_num_seqs=max_batch_size, max_num_batched_tokens=tokens))
        length = min(max_sequence_length, self.core.max_model_len)
        self.core.config = replace(self.core.config, max_model_len=length)
        self._codec = TextCodec(self.core.tokenizer)
        self._ids = itertools.count()
        self._answers: dict[str, _Answer] = {}

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return self.core.busy

    def add_request(self, request: InferenceRequest) -> str:
        """Queue a request, which runs from the next step on; returns its id.

        Raises InvalidInput, ContextLengthExceeded or QueueFull where it is not taken.
        """
        rid = request.request_id or f"request-{next(self._ids)}"
        answer = _Answer(rid, request, self._codec, self.core.clock)
        self.core.add(rid, answer.prompt_ids, request.params())
        self._answers[rid] = answer
        return rid

    def abort(self, request_id: str) -> None:
        """Drop a request; its place in the batch is free with the next step. Unknown ids are ignored."""
        self.core.abort(request_id)
        self._answers.pop(request_id, None)

    def step(self) -> list[InferenceResult]:
        """Compute one step; returns the answers that it completed."""
        done = []
        for output in self.core.step()[0]:
            result = self._answers[output.request_id].push(output)
            if result is not None:
                self.abort(output.request_id)  # a stop text ends it before the engine does
                done.append(result)
        return done

    def run(self) -> dict[str, InferenceResult]:
        """Step until nothing is left; the answers by request id."""
        results = {}
        while self.busy:
            results.update({result.request_id: result for result in self.step()})
        return results


class _Answer:
    """The text of one answer as it comes."""

    def __init__(self, request_id: str, request: InferenceRequest, codec: TextCodec, clock: Clock) -> None:
        self.prompt_ids = codec.encode(request.prompt)
        self._id = request_id
        self._text_of = codec.detokenizer(self.prompt_ids)
        self._stops = StopStrings(request.stop)
        self._clock = clock
        self._submitted_s = clock.now_s()
        self._first_s: float | None = None
        self._text = ""
        self._tokens = 0

    def push(self, output: RequestOutput) -> InferenceResult | None:
        """Take an output; the result where it is the last."""
        now_s = self._clock.now_s()
        self._first_s = now_s if self._first_s is None else self._first_s
        self._tokens += len(output.new_token_ids)
        finish = output.finish_reason
        if finish is FinishReason.ABORT:
            raise EngineFailed(f"request {self._id} was dropped because the batcher stopped; send it again")
        # The token that ended the answer is no part of its text.
        shown = output.new_token_ids[:-1] if finish is FinishReason.STOP else output.new_token_ids
        text, hit = self._stops.push(self._text_of.push(shown) + (self._text_of.flush() if finish else ""))
        self._text += text
        if hit is None and finish is None:
            return None
        if hit is None:
            self._text += self._stops.flush()
        return InferenceResult(
            request_id=self._id,
            text=self._text,
            tokens_generated=self._tokens,
            prompt_tokens=len(self.prompt_ids),
            finish_reason="stop" if hit is not None or finish is None else finish.value,
            ttft_ms=(self._first_s - self._submitted_s) * 1e3,
            latency_ms=(now_s - self._submitted_s) * 1e3,
            error=output.error,
        )
