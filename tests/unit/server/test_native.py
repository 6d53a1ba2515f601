"""The native routes over a parrot: what they answer is what happened."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from flyball.server.app import create_app

WORDS = "the cat sat on the mat and said: stop here. "


@pytest.fixture
def post(parrot: Any, connect: Any) -> Callable[..., httpx.Response]:
    """Send one body to a fresh server."""

    def send(path: str, **body: Any) -> httpx.Response:
        async def go() -> httpx.Response:
            async with connect(create_app(parrot)) as client:
                return await client.post(path, json=body)

        return asyncio.run(go())

    return send


def test_an_answer_is_the_engines_with_its_numbers(post: Any, parrot: Any, tokenizer: Any) -> None:
    """Text, tokens and what the engine did for it; the level asked for reaches the engine."""
    ids = tokenizer(WORDS)["input_ids"]
    answer = post("/v1/generate", prompt=WORDS, max_tokens=7, optimization="basic", return_token_ids=True).json()
    assert answer["text"] == tokenizer.decode(ids[:7])
    assert (answer["tokens_generated"], answer["token_ids"], answer["prompt_tokens"]) == (7, ids[:7], len(ids))
    assert (answer["finish_reason"], answer["stop_reason"], answer["model"]) == ("length", None, "parrot")
    assert answer["latency_ms"] >= answer["ttft_ms"] > 0
    assert answer["optimization"] == parrot.params[-1].optimization == "basic"
    assert answer["optimization_used"] == {
        "batch_size_seen": 1, "cached_tokens": 0, "spec_accepted_tokens": 0, "preemptions": 0, "quantization": None,
    }  # fmt: skip


def test_a_limit_not_given_is_256_or_what_fits(post: Any, parrot: Any) -> None:
    """Token ids are prompts, too."""
    post("/v1/generate", prompt=[5] * 28)
    assert parrot.params[-1].max_tokens == 100


def test_a_stream_ends_with_the_numbers(post: Any, tokenizer: Any) -> None:
    """Pieces join to the text; the event before [DONE] has everything but the text."""
    response = post("/v1/generate", prompt=WORDS, max_tokens=7, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    *data, done = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert done == "[DONE]"
    *pieces, last = map(json.loads, data)
    assert "".join(piece["text"] for piece in pieces) == tokenizer.decode(tokenizer(WORDS)["input_ids"][:7])
    assert last["tokens_generated"] == 7
    assert "text" not in last


def test_a_batch_isolates_what_fails(post: Any, parrot: Any, tokenizer: Any) -> None:
    """Results stand in the order of the prompts; one that cannot be served has an error and harms no other."""
    ids = tokenizer(WORDS)["input_ids"]
    answer = post("/v1/generate/batch", prompts=[WORDS, [5] * 500, "", [7]], max_tokens=3, optimization="none").json()
    first, long, empty, last = answer["results"]
    assert first["text"] == tokenizer.decode(ids[:3])
    assert long["error"]["code"] == "context_length_exceeded"
    assert empty["error"]["code"] == "invalid_value"
    assert last["tokens_generated"] == 3
    assert answer["tokens_generated"] == 6
    assert {params.optimization for params in parrot.params} == {"none"}
    assert parrot.running == set()


def test_a_batch_of_requests_gives_each_its_own(post: Any) -> None:
    """Each body of /v1/generate counts by itself."""
    asks = [{"prompt": WORDS, "max_tokens": n, "optimization": level} for n, level in ((1, "none"), (4, "full"))]
    results = post("/v1/generate/batch", requests=asks).json()["results"]
    assert [one["tokens_generated"] for one in results] == [1, 4]
    assert [one["optimization"] for one in results] == ["none", "full"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/generate", {"prompt": "x", "max_tokens": -1}, None),
        ("/v1/generate", {"prompt": "x", "optimization": "max"}, "optimization"),
        ("/v1/generate", {"prompt": ""}, None),
        ("/v1/generate", {}, "prompt"),
        ("/v1/generate", {"prompt": "x", "tools": [1]}, "tools"),
        ("/v1/generate/batch", {}, "prompts"),
        ("/v1/generate/batch", {"prompts": ["a"], "requests": [{"prompt": "b"}]}, "prompts"),
        ("/v1/generate/batch", {"prompts": ["a"], "stream": True}, "stream"),
        ("/v1/generate/batch", {"prompts": ["a"] * 1025}, "prompts"),
    ],
)
def test_what_makes_no_sense_is_a_400(post: Any, path: str, body: Any, param: str | None) -> None:
    """Negative limits, empty prompts, unknown levels: named, and not served."""
    response = post(path, **body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_text_becomes_ids_and_back(post: Any, tokenizer: Any) -> None:
    """Tokenise a text or a conversation; detokenise what came out; ids that do not exist are refused."""
    ids = tokenizer(WORDS)["input_ids"]
    told = post("/v1/tokenize", prompt=WORDS, return_token_strs=True).json()
    assert (told["tokens"], told["count"], told["max_model_len"]) == (ids, len(ids), 128)
    assert "".join(told["token_strs"]) == WORDS
    assert post("/v1/detokenize", tokens=ids).json() == {"prompt": WORDS}
    messages = [{"role": "user", "content": "the cat"}]
    chat = post("/v1/tokenize", messages=messages).json()["tokens"]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert post("/v1/tokenize").status_code == 400
    assert post("/v1/tokenize", prompt="a", messages=messages).status_code == 400
    assert post("/v1/detokenize", tokens=[10**6]).status_code == 400
