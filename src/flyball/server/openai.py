"""OpenAI's routes: completions, chat completions, models."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from flyball.server.errors import ApiError
from flyball.server.generation import Generator, Job, Piece
from flyball.server.protocol import COMPLETION_MAX_TOKENS, ChatBody, CompletionBody, GenerationBody
from flyball.server.sse import EventStream, merged, until_disconnect

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """Where a route's answers differ: their names, and where the text goes."""

    id_prefix: str
    whole_object: str
    chunk_object: str
    whole: Callable[[str], Json]
    chunk: Callable[[str, bool], Json]  # text; whether it is the choice's first chunk


_COMPLETION = _Form(
    id_prefix="cmpl",
    whole_object="text_completion",
    chunk_object="text_completion",
    whole=lambda text: {"text": text},
    chunk=lambda text, _first: {"text": text},
)
_CHAT = _Form(
    id_prefix="chatcmpl",
    whole_object="chat.completion",
    chunk_object="chat.completion.chunk",
    whole=lambda text: {"message": {"role": "assistant", "content": text}},
    chunk=lambda text, first: {"delta": {"role": "assistant", "content": text} if first else {"content": text}},
)


def routes(generator: Generator) -> APIRouter:
    """The routes over one engine."""
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

    @router.post("/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue one or several prompts."""
        arrival_s = generator.clock.now_s()
        check(body.model)
        body.refuse_unsupported()
        prompts = [await generator.encode(prompt) for prompt in body.prompts()]
        if not prompts:
            raise ApiError(400, "prompt is an empty list; give at least one", code="invalid_value", param="prompt")
        limits = [min(COMPLETION_MAX_TOKENS, generator.room(ids)) for ids in prompts]
        return await _respond(generator, _COMPLETION, body, request, arrival_s, prompts, limits)

    @router.post("/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        arrival_s = generator.clock.now_s()
        check(body.model)
        body.refuse_unsupported()
        ids = await generator.encode_chat([message.plain() for message in body.messages])
        return await _respond(generator, _CHAT, body, request, arrival_s, [ids], [generator.room(ids)])

    return router


async def _respond(
    generator: Generator,
    form: _Form,
    body: GenerationBody,
    request: Request,
    arrival_s: float,
    prompts: Sequence[list[int]],
    default_limits: Sequence[int],
) -> Response:
    """One choice a prompt, streamed or whole."""
    limit = body.token_limit()
    response_id = f"{form.id_prefix}-{uuid.uuid4().hex}"
    jobs = [
        Job(
            prompt_ids=ids,
            params=body.sampling(max_tokens=default if limit is None else limit),
            stops=body.stops(),
            request_id=f"{response_id}-{index}",
            arrival_s=arrival_s,
            index=index,
        )
        for index, (ids, default) in enumerate(zip(prompts, default_limits, strict=True))
    ]
    pieces = merged([generator.answer(job) for job in jobs])
    head = {"id": response_id, "created": int(generator.clock.wall_s()), "model": generator.engine.model_name}
    if body.stream:
        return EventStream(_chunks(pieces, form, head, body))
    return JSONResponse(await until_disconnect(request.receive, _whole(pieces, form, head, body)))


async def _chunks(
    pieces: AsyncGenerator[Piece, None], form: _Form, head: Json, body: GenerationBody
) -> AsyncGenerator[Json, None]:
    """One chunk an engine output; usage, where it is asked for, in a last chunk without choices."""
    head = {**head, "object": form.chunk_object}
    usage_field: Json = {"usage": None} if body.include_usage() else {}
    usage = _Usage()
    begun: set[int] = set()
    async with aclosing(pieces):
        async for piece in pieces:
            usage.add(piece)
            choice = {
                "index": piece.index,
                **form.chunk(piece.text, piece.index not in begun),
                "logprobs": None,
                "finish_reason": piece.finish_reason,
            }
            begun.add(piece.index)
            if body.return_token_ids:
                choice["token_ids"] = piece.token_ids
            yield {**head, "choices": [choice], **usage_field}
    if body.include_usage():
        yield {**head, "choices": [], "usage": usage.json()}


async def _whole(pieces: AsyncGenerator[Piece, None], form: _Form, head: Json, body: GenerationBody) -> Json:
    """All choices at once, in the order of their prompts."""
    usage = _Usage()
    parts: dict[int, list[Piece]] = {}
    async with aclosing(pieces):
        async for piece in pieces:
            usage.add(piece)
            parts.setdefault(piece.index, []).append(piece)
    choices = []
    for index, own in sorted(parts.items()):
        choice = {
            "index": index,
            **form.whole("".join(piece.text for piece in own)),
            "logprobs": None,
            "finish_reason": own[-1].finish_reason,
        }
        if body.return_token_ids:
            choice["token_ids"] = [i for piece in own for i in piece.token_ids]
        choices.append(choice)
    return {**head, "object": form.whole_object, "choices": choices, "usage": usage.json()}


@dataclass(slots=True)
class _Usage:
    """Tokens of one response."""

    completion_tokens: int = 0
    prompts: dict[int, tuple[int, int]] = field(default_factory=dict)  # choice -> its prompt's tokens, and cached ones

    def add(self, piece: Piece) -> None:
        self.completion_tokens += len(piece.token_ids)
        self.prompts[piece.index] = (piece.prompt_tokens, piece.cached_tokens)

    def json(self) -> Json:
        prompt = sum(tokens for tokens, _ in self.prompts.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(cached for _, cached in self.prompts.values())},
        }
