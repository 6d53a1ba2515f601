"""From prompts to answers: tokens of the engine to text, stop strings, latencies. All routes that generate share it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from flyball.core.clock import Clock
from flyball.core.errors import EngineFailed, InvalidInput, RequestRefused
from flyball.engine.request import FinishReason, RequestOutput, SamplingParams
from flyball.engine.text import StopStrings, TextCodec
from flyball.server.engine_client import EngineClient
from flyball.server.metrics import RequestTimer, ServerMetrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One answer to make."""

    prompt_ids: list[int]
    params: SamplingParams
    stops: Sequence[str]
    request_id: str
    arrival_s: float  # of the HTTP request, before its text was encoded
    index: int = 0  # among the choices of one response


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one engine output added to an answer; the text may be empty while characters are held back."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    finish_reason: str | None = None  # stop or length, with the last piece


class Generator:
    """Makes answers with one engine, and times them."""

    def __init__(self, engine: EngineClient, metrics: ServerMetrics, clock: Clock) -> None:
        self.engine = engine
        self.codec = TextCodec(engine.tokenizer)
        self.clock = clock
        self._metrics = metrics

    async def encode(self, prompt: str | list[int]) -> list[int]:
        """Ids of a prompt; a long text does not hold the event loop up."""
        return await asyncio.to_thread(self.codec.encode, prompt) if isinstance(prompt, str) else prompt

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation, up to where the assistant speaks next."""
        return await asyncio.to_thread(self.codec.encode_chat, messages)

    def room(self, prompt_ids: Sequence[int]) -> int:
        """Tokens that fit behind a prompt; 1 where none does, so that the engine refuses it in its own words."""
        return max(1, self.engine.max_model_len - len(prompt_ids))

    async def answer(self, job: Job) -> AsyncGenerator[Piece, None]:
        """The answer in pieces, one an engine output; closing it aborts the request.

        Raises what the engine raises at first: InvalidInput, ContextLengthExceeded; and EngineFailed at any time.
        """
        timer = self._metrics.timer(job.arrival_s)
        ended = "abort"
        try:
            async with aclosing(self._pieces(job, timer)) as pieces:
                async for piece in pieces:
                    if piece.finish_reason is not None:
                        ended = piece.finish_reason
                        timer.finished(ended)  # before the last piece is out: who has it also finds it counted
                    yield piece
        except (InvalidInput, RequestRefused):
            ended = "refused"  # it never ran
            raise
        except Exception:
            ended = "error"
            raise
        finally:
            if ended in ("abort", "error"):
                timer.finished(ended)

    async def _pieces(self, job: Job, timer: RequestTimer) -> AsyncGenerator[Piece, None]:
        text_of = self.codec.detokenizer(job.prompt_ids)
        stops = StopStrings(job.stops)
        outputs = self.engine.generate(job.prompt_ids, job.params, request_id=job.request_id)
        async with aclosing(outputs):
            async for output in outputs:
                timer.output()
                finish = _finish(output)
                # The token that stopped the answer is no part of its text.
                shown = output.new_token_ids[:-1] if finish == "stop" else output.new_token_ids
                text = text_of.push(shown) + (text_of.flush() if finish else "")
                text, hit = stops.push(text)
                if hit is not None:
                    finish = "stop"
                elif finish:
                    text += stops.flush()
                yield Piece(
                    index=job.index,
                    text=text,
                    token_ids=output.new_token_ids,
                    prompt_tokens=output.num_prompt_tokens,
                    cached_tokens=output.num_cached_tokens,
                    finish_reason=finish,
                )
                if finish:
                    return
        raise EngineFailed("the engine ended an answer without a reason; send the request again")


def _finish(output: RequestOutput) -> str | None:
    """OpenAI's word for why an answer ended; an answer that was cut off is no answer."""
    if output.finish_reason is FinishReason.ABORT:
        raise EngineFailed("the server is stopping and dropped this request; send it again")
    if output.finish_reason is FinishReason.ERROR:
        raise EngineFailed(output.error or "the engine failed; the server's log says more")
    return output.finish_reason.value if output.finish_reason else None
