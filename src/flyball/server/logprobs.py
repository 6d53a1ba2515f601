"""Log-probabilities as OpenAI's two routes show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flyball.engine.request import TokenLogprobs
from flyball.engine.text import TextCodec

Json = dict[str, Any]

_NEVER = -9999.0  # OpenAI's word for a token of probability 0; JSON has no infinity


def chat_logprobs(codec: TextCodec, tokens: Sequence[TokenLogprobs]) -> Json:
    """A chat's form: an entry for each token, with its bytes, since a token may be part of a character."""

    def entry(token_id: int, logprob: float) -> Json:
        raw = codec.token_bytes(token_id)
        return {"token": codec.token_text(token_id), "logprob": max(logprob, _NEVER), "bytes": list(raw)}

    content = [
        {**entry(token.token_id, token.logprob), "top_logprobs": [entry(*top) for top in token.top]} for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(codec: TextCodec, tokens: Sequence[TokenLogprobs], *, offset: int) -> Json:
    """A completion's form: parallel lists; `text_offset` counts characters of the tokens' texts from `offset` on.

    The alternatives always include the token that was chosen, as OpenAI's do.
    """
    texts = [codec.token_text(token.token_id) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [max(token.logprob, _NEVER) for token in tokens],
        "top_logprobs": [
            {codec.token_text(i): max(logprob, _NEVER) for i, logprob in (*token.top, (token.token_id, token.logprob))}
            for token in tokens
        ],
        "text_offset": offsets,
    }
