"""OpenAI's routes: completions, chat completions, models."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.params import Depends as Dependency
from starlette.responses import Response

from flyball.server.auth import Keys
from flyball.server.edge import account_of
from flyball.server.errors import ApiError, invalid
from flyball.server.generation import Generator, Job, Piece
from flyball.server.logprobs import chat_logprobs, completion_logprobs
from flyball.server.protocol import COMPLETION_MAX_TOKENS, MAX_ANSWERS, ChatBody, CompletionBody, OpenAIBody
from flyball.server.sse import EventStream, JsonResponse, event, merged, until_disconnect

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """Where a route's answers differ: their names, and where the text goes."""

    id_prefix: str
    whole_object: str
    chunk_object: str
    whole: Callable[[str], Json]
    chunk: Callable[[str, bool], Json]  # text; whether it is the choice's first chunk
    logprobs: Callable[..., Json]  # codec, tokens, offset


_COMPLETION = _Form(
    id_prefix="cmpl",
    whole_object="text_completion",
    chunk_object="text_completion",
    whole=lambda text: {"text": text},
    chunk=lambda text, _first: {"text": text},
    logprobs=completion_logprobs,
)
_CHAT = _Form(
    id_prefix="chatcmpl",
    whole_object="chat.completion",
    chunk_object="chat.completion.chunk",
    whole=lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    chunk=lambda text, first: {"delta": {"role": "assistant", "content": text} if first else {"content": text}},
    logprobs=lambda codec, tokens, offset: chat_logprobs(codec, tokens),  # noqa: ARG005  # a chat counts no characters
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ask:
    """One request to a route, ready for the engine."""

    form: _Form
    body: OpenAIBody
    jobs: list[Job]
    head: Json  # what every chunk repeats
    echo: list[str]  # what the answers to each prompt begin with

    def first_text(self, index: int) -> str:
        """What a choice begins with."""
        return self.echo[index // self.body.answers()]


def routes(generator: Generator, keys: Keys, hold: Dependency) -> APIRouter:
    """The routes over one engine; `hold` keeps the server from ending while a request is answered."""
    router = APIRouter(prefix="/v1")
    engine = generator.engine
    started = int(generator.clock.wall_s())

    def card() -> Json:
        return {
            "id": engine.model_name,
            "object": "model",
            "created": started,
            "owned_by": "flyball",
            "max_model_len": engine.max_model_len,
            "vocab_size": engine.vocab_size,
        }

    def check(name: str | None) -> None:
        if name not in (None, engine.model_name):
            raise ApiError(
                404,
                f"the model {name!r} does not exist here; this server serves {engine.model_name!r}",
                code="model_not_found",
                param="model",
            )

    @router.get("/models")
    async def models() -> Json:
        """List the one model served."""
        return {"object": "list", "data": [card()]}

    @router.get("/models/{name:path}")
    async def model(name: str) -> Json:
        """Describe the model served."""
        check(name)
        return card()

    @router.post("/completions", dependencies=[hold])
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue one or several prompts."""
        check(body.model)
        body.refuse_unsupported()
        prompts = body.prompts()
        if not prompts:
            raise invalid("prompt", "prompt is an empty list; give at least one")
        if len(prompts) * body.answers() > MAX_ANSWERS:
            raise invalid(
                "prompt",
                f"{len(prompts)} prompts times n={body.answers()} make more than {MAX_ANSWERS} answers; "
                "send several requests",
            )
        ids = [await generator.encode(prompt) for prompt in prompts]
        limits = [min(COMPLETION_MAX_TOKENS, generator.room(one)) for one in ids]
        echo = [p if isinstance(p, str) else generator.codec.decode(p) for p in prompts] if body.echo else []
        return await respond(_COMPLETION, body, request, ids, limits, echo)

    @router.post("/chat/completions", dependencies=[hold])
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        check(body.model)
        body.refuse_unsupported()
        ids = await generator.encode_chat([message.plain() for message in body.messages])
        return await respond(_CHAT, body, request, [ids], [generator.room(ids)], [])

    async def respond(
        form: _Form,
        body: OpenAIBody,
        request: Request,
        prompts: Sequence[list[int]],
        default_limits: Sequence[int],
        echo: Sequence[str],
    ) -> Response:
        """`n` choices a prompt, streamed or whole."""
        limit = body.token_limit()
        account = account_of(request)
        response_id = f"{form.id_prefix}-{uuid.uuid4().hex}"
        jobs = [
            Job(
                prompt_ids=ids,
                params=body.sampling(max_tokens=default if limit is None else limit),
                stops=body.stops(),
                include_stop=body.include_stop_str_in_output,
                show_special=not body.skip_special_tokens,
                request_id=f"{response_id}-{i}",
                account=account,
                arrival_s=account.arrival_s,
                salt=keys.salt(request, body.cache_salt),
                first_index=i * body.answers(),
            )
            for i, (ids, default) in enumerate(zip(prompts, default_limits, strict=True))
        ]
        head = {"id": response_id, "created": int(generator.clock.wall_s()), "model": engine.model_name}
        ask = _Ask(form=form, body=body, jobs=jobs, head=head, echo=list(echo) or [""] * len(jobs))
        pieces = merged([generator.answer(job) for job in jobs])
        if body.stream:
            return EventStream(_chunks(generator, ask, pieces), account)
        return JsonResponse(await until_disconnect(request.receive, _whole(generator, ask, pieces)))

    return router


async def _chunks(
    generator: Generator, ask: _Ask, batches: AsyncGenerator[list[Piece], None]
) -> AsyncGenerator[bytes, None]:
    """One event an engine output; usage, where it is asked for, in a last one without choices.

    Outputs that came together, those of several choices or of a client that is slow, are written together.
    """
    form, body = ask.form, ask.body
    head = {**ask.head, "object": form.chunk_object}
    usage_field: Json = {"usage": None} if body.include_usage() else {}
    usage = _Usage(body.answers())
    offsets: dict[int, int] = {}  # choice -> characters of its tokens' texts so far
    async with aclosing(batches):
        async for pieces in batches:
            events = []
            for piece in pieces:
                usage.add(piece)
                first = piece.index not in offsets
                text = ask.first_text(piece.index) + piece.text if first else piece.text
                offset = offsets.setdefault(piece.index, 0)
                choice = {"index": piece.index, **form.chunk(text, first), **_ending(piece), "logprobs": None}
                if piece.logprobs is not None:
                    choice["logprobs"] = form.logprobs(generator.codec, piece.logprobs, offset=offset)
                    offsets[piece.index] += sum(len(generator.codec.token_text(t.token_id)) for t in piece.logprobs)
                if body.return_token_ids:
                    choice["token_ids"] = piece.token_ids
                events.append(event({**head, "choices": [choice], **usage_field}))
            yield b"".join(events)
    if body.include_usage():
        yield event({**head, "choices": [], "usage": usage.json()})


async def _whole(generator: Generator, ask: _Ask, batches: AsyncGenerator[list[Piece], None]) -> Json:
    """All choices at once, in the order of their prompts."""
    form, body = ask.form, ask.body
    usage = _Usage(body.answers())
    parts: dict[int, list[Piece]] = {}
    async with aclosing(batches):
        async for pieces in batches:
            for piece in pieces:
                usage.add(piece)
                parts.setdefault(piece.index, []).append(piece)
    choices = []
    for index, own in sorted(parts.items()):
        text = ask.first_text(index) + "".join(piece.text for piece in own)
        choice = {"index": index, **form.whole(text), **_ending(own[-1]), "logprobs": None}
        if body.top_logprobs_wanted() is not None:
            tokens = [token for piece in own for token in piece.logprobs or ()]
            choice["logprobs"] = form.logprobs(generator.codec, tokens, offset=0)
        if body.return_token_ids:
            choice["token_ids"] = [i for piece in own for i in piece.token_ids]
        choices.append(choice)
    return {**ask.head, "object": form.whole_object, "choices": choices, "usage": usage.json()}


def _ending(piece: Piece) -> Json:
    """Why a choice ended; with the stop string or stop token that ended it, as vLLM tells it."""
    if piece.finish_reason is None:
        return {"finish_reason": None}
    return {"finish_reason": piece.finish_reason, "stop_reason": piece.stop}


@dataclass(slots=True)
class _Usage:
    """Tokens of one response; a prompt counts once, however many answers it gets."""

    answers: int  # to each prompt
    completion_tokens: int = 0
    prompts: dict[int, tuple[int, int]] = field(default_factory=dict)  # prompt -> its tokens, and cached ones

    def add(self, piece: Piece) -> None:
        self.completion_tokens += len(piece.token_ids)
        self.prompts.setdefault(piece.index // self.answers, (piece.prompt_tokens, piece.cached_tokens))

    def json(self) -> Json:
        prompt = sum(tokens for tokens, _ in self.prompts.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(cached for _, cached in self.prompts.values())},
        }
