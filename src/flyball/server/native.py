"""The native routes: one prompt or a batch, with optimisation levels that act, and a report of what really happened."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.params import Depends as Dependency
from starlette.responses import Response

from flyball.core.errors import FlyballError
from flyball.server.auth import Keys
from flyball.server.edge import account_of
from flyball.server.errors import error_body, invalid
from flyball.server.generation import Generator, Job, Piece
from flyball.server.protocol import BatchBody, GenerateBody
from flyball.server.sse import EventStream, JsonResponse, event, until_disconnect

Json = dict[str, Any]

DEFAULT_MAX_TOKENS = 256


def routes(generator: Generator, keys: Keys, hold: Dependency) -> APIRouter:
    """The routes over one engine; `hold` keeps the server from ending while a request is answered."""
    router = APIRouter(prefix="/v1")

    async def job_of(body: GenerateBody, request: Request) -> Job:
        body.refuse_unsupported()
        ids = await generator.encode(body.prompt)
        limit = body.token_limit()
        account = account_of(request)
        return Job(
            prompt_ids=ids,
            params=body.sampling(max_tokens=min(DEFAULT_MAX_TOKENS, generator.room(ids)) if limit is None else limit),
            stops=body.stops(),
            include_stop=body.include_stop_str_in_output,
            show_special=not body.skip_special_tokens,
            request_id=f"gen-{uuid.uuid4().hex}",
            account=account,
            arrival_s=account.arrival_s,
            salt=keys.salt(request, body.cache_salt),
        )

    async def whole(body: GenerateBody, request: Request) -> Json:
        job = await job_of(body, request)
        async with aclosing(generator.answer(job)) as answer:
            pieces = [piece async for batch in answer for piece in batch]
        return _result(generator, body, job, pieces)

    async def isolated(body: GenerateBody, request: Request) -> Json:
        try:
            return await whole(body, request)
        except FlyballError as error:
            return error_body(error)

    @router.post("/generate", dependencies=[hold])
    async def generate(body: GenerateBody, request: Request) -> Response:
        """Continue one prompt; the answer says what was done for it."""
        if not body.stream:
            return JsonResponse(await until_disconnect(request.receive, whole(body, request)))
        job = await job_of(body, request)
        return EventStream(_events(generator, body, job), job.account)

    @router.post("/generate/batch", dependencies=[hold])
    async def batch(body: BatchBody, request: Request) -> Response:
        """Continue several prompts at once; one that fails leaves the others alone and has an `error` in its place."""
        bodies = body.bodies()
        if body.stream or any(one.stream for one in bodies):
            raise invalid("stream", "a batch cannot be streamed; leave stream out, or send each to /v1/generate")
        account = account_of(request)

        async def all_of_them() -> list[Json]:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(isolated(one, request)) for one in bodies]
            return [task.result() for task in tasks]

        results = await until_disconnect(request.receive, all_of_them())
        return JsonResponse(
            {
                "results": results,
                "tokens_generated": sum(result.get("tokens_generated", 0) for result in results),
                "latency_ms": (generator.clock.now_s() - account.arrival_s) * 1e3,
            }
        )

    return router


async def _events(generator: Generator, body: GenerateBody, job: Job) -> AsyncGenerator[bytes, None]:
    """Text as it comes; then, in a last event, what the whole answer would have told, without its text."""
    own: list[Piece] = []
    async with aclosing(generator.answer(job)) as answer:
        async for pieces in answer:
            own += pieces
            told: Json = {"text": "".join(piece.text for piece in pieces)}
            if body.return_token_ids:
                told["token_ids"] = [i for piece in pieces for i in piece.token_ids]
            yield event(told)
    result = _result(generator, body, job, own)
    del result["text"]
    result.pop("token_ids", None)
    yield event(result)


def _result(generator: Generator, body: GenerateBody, job: Job, pieces: list[Piece]) -> Json:
    """An answer with its numbers; times are in milliseconds and count from the arrival of the HTTP request."""
    last = pieces[-1]
    record = last.record
    assert record is not None
    report = record.report  # None: a stop string ended the answer before the engine did, and not all is known
    seen: Json = {
        "batch_size_seen": report.batch_size_seen if report else None,
        "cached_tokens": last.cached_tokens,
        "spec_accepted_tokens": report.spec_accepted_tokens if report else None,
        "preemptions": report.num_preemptions if report else None,
        "quantization": generator.engine.info().get("quantization"),
    }
    result: Json = {
        "request_id": job.account.request_id,
        "model": generator.engine.model_name,
        "text": "".join(piece.text for piece in pieces),
        "finish_reason": last.finish_reason,
        "stop_reason": last.stop,
        "prompt_tokens": last.prompt_tokens,
        "tokens_generated": sum(len(piece.token_ids) for piece in pieces),
        "latency_ms": (generator.clock.now_s() - job.arrival_s) * 1e3,
        "ttft_ms": None if record.ttft_s is None else record.ttft_s * 1e3,
        "optimization": body.optimization,
        "optimization_used": seen,
    }
    if body.return_token_ids:
        result["token_ids"] = [i for piece in pieces for i in piece.token_ids]
    return result
