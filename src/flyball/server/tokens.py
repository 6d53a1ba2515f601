"""Text to token ids and back, as the engine would do it."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter

from flyball.server.errors import invalid
from flyball.server.generation import Generator
from flyball.server.protocol import DetokenizeBody, TokenizeBody

Json = dict[str, Any]


def routes(generator: Generator) -> APIRouter:
    """The routes over one engine's tokenizer."""
    router = APIRouter(prefix="/v1")
    codec, engine = generator.codec, generator.engine

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Json:
        """Ids of a text or of a conversation, and how many there are."""
        if (body.prompt is None) == (body.messages is None):
            raise invalid("prompt", "give either prompt, a text, or messages, a conversation")
        if body.messages is not None:
            ids = await generator.encode_chat([message.plain() for message in body.messages])
        else:
            ids = await asyncio.to_thread(codec.encode, body.prompt or "", add_special_tokens=body.add_special_tokens)
        told: Json = {"count": len(ids), "max_model_len": engine.max_model_len, "tokens": ids}
        if body.return_token_strs:
            told["token_strs"] = [codec.token_text(i) for i in ids]
        return told

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Json:
        """The text of ids, special tokens left out."""
        if any(i >= engine.vocab_size for i in body.tokens):
            raise invalid("tokens", f"tokens holds an id above {engine.vocab_size - 1}; give ids of this vocabulary")
        return {"prompt": await asyncio.to_thread(codec.decode, body.tokens)}

    return router
