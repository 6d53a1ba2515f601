"""From prompts to answers: tokens of the engine to text, stop strings, latencies. All routes that generate share it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import NoReturn

from flyball.core.clock import Clock
from flyball.core.errors import EngineFailed, InvalidInput, RequestRefused
from flyball.engine.request import FinishReason, RequestOutput, RequestReport, SamplingParams, TokenLogprobs
from flyball.engine.text import Detokenizer, StopStrings, TextCodec
from flyball.server.account import Account, AnswerRecord
from flyball.server.engine_client import EngineClient
from flyball.server.errors import ApiError
from flyball.server.metrics import AnswerTimer, ServerMetrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One prompt, and what is asked of its answers."""

    prompt_ids: list[int]
    params: SamplingParams
    request_id: str
    account: Account
    arrival_s: float  # of the HTTP request, before its text was encoded
    stops: Sequence[str] = ()
    include_stop: bool = False  # show what stopped the answer
    show_special: bool = False
    salt: bytes = b""
    first_index: int = 0  # of its answers among the choices of one response


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one engine output added to an answer; the text may be empty while characters are held back."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: str | None = None  # stop or length, with the last piece
    stop: str | int | None = None  # the stop string or token that ended it
    record: AnswerRecord | None = None  # with the last piece


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

    async def answer(self, job: Job) -> AsyncGenerator[list[Piece], None]:
        """The answers in pieces, one an engine output, all that are there at once; closing it aborts what still runs.

        Raises what the engine raises at first: InvalidInput, ContextLengthExceeded, QueueFull; an ApiError when the
        deadline passes; and EngineFailed at any time.
        """
        choices = [_Choice(job, index, self.codec, self._metrics) for index in range(job.params.n)]
        ended = "abort"
        try:
            async with aclosing(self._pieces(job, choices)) as pieces:
                async for piece in pieces:
                    yield piece
        except (InvalidInput, RequestRefused):
            ended = "refused"  # it never ran
            raise
        except _Ended as error:
            ended = error.how
            raise error.told from None
        except EngineFailed as error:
            ended = "error"
            if job.params.grammar is None or self.engine.error is not None:
                raise
            # The engine lives: the model's tokens cannot go on in this form, as with a rule that never ends.
            raise ApiError(400, f"{error}; change the form asked for", code="grammar_dead_end") from None
        except Exception:
            ended = "error"
            raise
        finally:
            for choice in choices:
                if not choice.ended and ended != "refused":
                    choice.end(ended)

    async def _pieces(self, job: Job, choices: Sequence[_Choice]) -> AsyncGenerator[list[Piece], None]:
        ended, seen = 0, False
        steps = self.engine.steps(job.prompt_ids, job.params, request_id=job.request_id, salt=job.salt)
        async with aclosing(steps):
            async for outputs in steps:
                if not seen:
                    seen = True
                    job.account.prompt_tokens += outputs[0].num_prompt_tokens
                    job.account.cached_tokens += outputs[0].num_cached_tokens
                pieces = []
                for output in outputs:
                    choice = choices[output.index]
                    if choice.ended:
                        continue  # the engine has not yet heard of it
                    piece = choice.take(output)
                    pieces.append(piece)
                    if piece.finish_reason is not None:
                        ended += 1
                        if ended < len(choices) and output.finish_reason is None:  # a stop string: the others go on
                            self.engine.abort_answer(job.request_id, output.index)
                if pieces:
                    yield pieces
                if ended == len(choices):
                    return
        raise EngineFailed("the engine ended an answer without a reason; send the request again")


@dataclass(slots=True)
class _Choice:
    """One answer in the making."""

    job: Job
    index: int
    codec: TextCodec
    metrics: ServerMetrics
    ended: bool = False
    tokens: int = 0
    _text_of: Detokenizer = field(init=False)
    _stops: StopStrings = field(init=False)
    _timer: AnswerTimer = field(init=False)

    def __post_init__(self) -> None:
        job = self.job
        self._text_of = self.codec.detokenizer(job.prompt_ids, show_special=job.show_special)
        self._stops = StopStrings(job.stops, include=job.include_stop)
        self._timer = self.metrics.timer(job.arrival_s)

    def take(self, output: RequestOutput) -> Piece:
        """The piece that an output makes."""
        job, finish = self.job, None
        ids = output.new_token_ids
        if output.finish_reason is not None:
            finish = self._finish(output)
        if ids:
            self._timer.output(len(ids), output.num_prompt_tokens, output.num_cached_tokens)
            self.tokens += len(ids)
        # The token that stopped the answer is no part of its text.
        by_token = finish == "stop" and bool(ids) and job.params.grammar is None
        hidden = by_token and not job.include_stop
        text = self._text_of.push(ids[:-1] if hidden else ids) + (self._text_of.flush() if finish else "")
        text, stop = self._stops.push(text)
        if stop is not None:
            finish = "stop"
        elif finish:
            text += self._stops.flush()
        # Before the last piece is out: who has it also finds it counted.
        record = self.end(finish, output.report) if finish else None
        return Piece(
            index=job.first_index + self.index,
            text=text,
            token_ids=ids,
            prompt_tokens=output.num_prompt_tokens,
            cached_tokens=output.num_cached_tokens,
            logprobs=output.logprobs,
            finish_reason=finish,
            stop=stop if stop is not None or not by_token else ids[-1],
            record=record,
        )

    def end(self, how: str, report: RequestReport | None = None) -> AnswerRecord:
        """Count it."""
        self.ended = True
        self._timer.ended(how, report)
        record = AnswerRecord(
            completion_tokens=self.tokens, finish_reason=how, ttft_s=self._timer.ttft_s, report=report
        )
        self.job.account.answers.append(record)
        return record

    def _finish(self, output: RequestOutput) -> str:
        """OpenAI's word for why an answer ended; an answer that was cut off is no answer."""
        reason = output.finish_reason
        if reason is FinishReason.TIMEOUT:
            self.end("timeout", output.report)
            self._timed_out()
        if reason is FinishReason.ABORT:
            raise EngineFailed("the server is stopping and dropped this request; send it again")
        if reason is FinishReason.ERROR:
            raise EngineFailed(output.error or "the engine failed; the server's log says more")
        assert reason is not None
        return str(reason.value)

    def _timed_out(self) -> NoReturn:
        """Who set the deadline decides the status: 408 is the client's own, 504 the server's."""
        own_s = self.job.params.timeout_s
        if own_s is not None:
            told = ApiError(
                408,
                f"the request's timeout of {own_s:g} s passed after {self.tokens} tokens; "
                "allow more time or ask for fewer tokens",
                code="timeout",
                param="timeout",
            )
        else:
            told = ApiError(
                504,
                f"this server's time limit passed after {self.tokens} tokens; ask for fewer tokens, or try again when "
                "it is less busy",
                code="timeout",
            )
        raise _Ended("timeout", told)


class _Ended(Exception):
    """An answer ended in a way of its own."""

    def __init__(self, how: str, told: ApiError) -> None:
        super().__init__(how)
        self.how = how
        self.told = told
