"""OpenAI's routes over a parrot: what is asked is what is answered, or refused by name."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from flyball.server.app import create_app

Run = Callable[..., dict[str, Any]]


def events(body: str) -> list[Any]:
    """The data of each event: JSON, or the closing word."""
    data = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


@pytest.fixture
def post(parrot: Any, connect: Any) -> Callable[..., httpx.Response]:
    """Send one body to a fresh server."""

    def send(path: str = "/v1/completions", **body: Any) -> httpx.Response:
        async def go() -> httpx.Response:
            async with connect(create_app(parrot)) as client:
                return await client.post(path, json=body)

        return asyncio.run(go())

    return send


def test_a_completion_says_what_the_engine_said(post: Any, tokenizer: Any) -> None:
    """Text, finish reason and usage are the engine's own."""
    prompt = "the cat sat"
    length = len(tokenizer(prompt)["input_ids"])
    answer = post(prompt=prompt, max_tokens=2 * length).json()
    assert answer["object"] == "text_completion"
    assert answer["model"] == "parrot"
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (prompt * 2, "length")
    assert answer["usage"]["prompt_tokens"] == length
    assert answer["usage"]["completion_tokens"] == 2 * length
    assert answer["usage"]["total_tokens"] == 3 * length


def test_a_chat_goes_through_the_models_template(post: Any) -> None:
    """The parrot repeats the templated conversation, roles (special tokens) left out of the text."""
    messages = [
        {"role": "developer", "content": "sat"},
        {"role": "user", "content": [{"type": "text", "text": "the"}, {"type": "text", "text": "cat"}]},
    ]
    answer = post("/v1/chat/completions", messages=messages, max_completion_tokens=30).json()
    message = answer["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert message["content"].startswith("satthe\ncat")


def test_a_stream_has_one_chunk_an_engine_output(post: Any, parrot: Any) -> None:
    """Chunks carry their token ids when asked, join to the whole text, and end with usage and [DONE]."""
    body = {"prompt": "the cat 😀", "max_tokens": 20, "stream": True}
    body |= {"stream_options": {"include_usage": True}, "return_token_ids": True}
    response = post(**body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events(response.text)
    assert done == "[DONE]"
    assert [len(chunk["choices"][0]["token_ids"]) for chunk in chunks] == [1] * 20
    whole = post(prompt="the cat 😀", max_tokens=20).json()
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 19 + ["length"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]


def test_a_chat_stream_names_the_role_once(post: Any) -> None:
    """The first delta opens the assistant's turn; no usage is sent where none is asked."""
    response = post("/v1/chat/completions", messages=[{"role": "user", "content": "cat"}], max_tokens=3, stream=True)
    *chunks, _ = events(response.text)
    assert [list(chunk["choices"][0]["delta"]) for chunk in chunks] == [["role", "content"], ["content"], ["content"]]
    assert not any("usage" in chunk for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_before_it(post: Any, parrot: Any, stream: bool) -> None:
    """The stop string and what follows are cut, across chunks too, and the engine's request is ended."""
    response = post(prompt="the mat and said: stop here", max_tokens=100, stop=["zzz", "aid: st"], stream=stream)
    if stream:
        *chunks, done = events(response.text)
        assert done == "[DONE]"
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        finish = chunks[-1]["choices"][0]["finish_reason"]
    else:
        choice = response.json()["choices"][0]
        text, finish = choice["text"], choice["finish_reason"]
    assert (text, finish) == ("the mat and s", "stop")
    assert parrot.running == set()


def test_the_token_that_stops_is_not_shown(post: Any, tokenizer: Any) -> None:
    """A stop token counts as generated but is no part of the text."""
    ids = tokenizer("the cat sat")["input_ids"]
    answer = post(prompt=ids, max_tokens=50, stop_token_ids=[ids[-1]], return_token_ids=True).json()
    assert answer["choices"][0]["token_ids"] == ids
    assert answer["choices"][0]["text"] == tokenizer.decode(ids[:-1])
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_give_several_choices(post: Any, tokenizer: Any, stream: bool) -> None:
    """Texts or token lists, one choice each, in order; usage is their sum."""
    texts = ["the cat", "sat", "on the mat"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    for prompt in (texts, ids):
        body = {"prompt": prompt, "max_tokens": 6, "stream": stream}
        if stream:
            *chunks, done = events(post(**body, stream_options={"include_usage": True}).text)
            assert done == "[DONE]"
            shown = ["", "", ""]
            for chunk in chunks:
                for choice in chunk["choices"]:
                    shown[choice["index"]] += choice["text"]
            usage = chunks[-1]["usage"]
        else:
            answer = post(**body).json()
            shown = [choice["text"] for choice in answer["choices"]]
            usage = answer["usage"]
        assert shown == [tokenizer.decode((i * 6)[:6]) for i in ids]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (sum(map(len, ids)), 18)


def test_limits_not_given_are_clamped_to_what_fits(post: Any, parrot: Any) -> None:
    """A chat may fill the context; a completion gets OpenAI's 16 tokens, or fewer near the end of the context."""
    post("/v1/chat/completions", messages=[{"role": "user", "content": "the"}], stop=" never")
    assert parrot.params[-1].max_tokens > 100
    post(prompt="the")
    assert parrot.params[-1].max_tokens == 16
    post(prompt=[5] * 120)
    assert parrot.params[-1].max_tokens == 8


def test_parameters_reach_the_engine(post: Any, parrot: Any) -> None:
    """Every sampling field arrives as it was sent; -1 is vLLM's word for no top-k."""
    post(
        prompt="the", max_tokens=5, temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, seed=-7, stop_token_ids=[3],
        ignore_eos=True,
    )  # fmt: skip
    seen = parrot.params[-1]
    assert (seen.max_tokens, seen.temperature, seen.top_p, seen.top_k) == (5, 0.5, 0.9, 0)
    assert (seen.min_p, seen.seed, seen.stop_token_ids, seen.ignore_eos) == (0.1, -7, (3,), True)


@pytest.mark.parametrize(
    ("field", "value"),
    [("n", 2), ("logprobs", 0), ("logprobs", True), ("echo", True), ("logit_bias", {"3": 5}), ("tools", [{"a": 1}]),
     ("presence_penalty", 0.5), ("response_format", {"type": "json_object"}), ("best_of", 3), ("min_tokens", 1)],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(post: Any, field: str, value: Any) -> None:
    """Nothing that would change the answer is silently dropped."""
    response = post(prompt="the", **{field: value})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"], error["type"]) == (field, "unsupported_field", "invalid_request_error")
    assert field in error["message"]


def test_what_asks_for_nothing_or_is_unknown_is_ignored(post: Any) -> None:
    """OpenAI's clients send extras; neutral values and unknown fields change nothing."""
    extras = {"n": 1, "logprobs": None, "presence_penalty": 0, "logit_bias": {}, "user": "me", "metadata": {"a": "b"}}
    assert post(prompt="the", **extras).status_code == 200


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        ({"prompt": "the", "max_tokens": 0}, "invalid_value", "max_tokens=0"),
        ({"prompt": "the", "temperature": -1}, "invalid_value", "temperature"),
        ({"prompt": "the", "temperature": "hot"}, "invalid_value", "temperature"),
        ({"prompt": "the", "max_tokens": 500}, "context_length_exceeded", "128"),
        ({"prompt": [5] * 128}, "context_length_exceeded", "128"),
        ({"prompt": [5] * 500}, "context_length_exceeded", "128"),
        ({"prompt": []}, "invalid_value", "at least one"),
        ({"prompt": ""}, "invalid_value", "empty"),
        ({"prompt": [-1]}, "invalid_value", "prompt"),
        ({"prompt": [10**6]}, "invalid_value", "vocabulary"),
        ({"prompt": ["the", [5] * 500]}, "invalid_value", "prompt"),
        ({}, "invalid_value", "prompt"),
        ({"prompt": "the", "stop": ""}, "invalid_value", "stop string"),
        ({"prompt": "the", "stream_options": {"include_usage": True}}, "invalid_value", "stream"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_is_a_400_that_says_why(post: Any, body: Any, code: str, says: str, stream: bool) -> None:
    """Refused before anything is sent, so that a stream, too, has a status code."""
    response = post(**body, stream=stream and "stream_options" not in body)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["code"] == code
    assert says in error["message"]


def test_one_prompt_that_cannot_fit_refuses_all(post: Any, parrot: Any) -> None:
    """Several prompts are one request: nothing is half done, nothing left running."""
    response = post(prompt=[[5] * 3, [5] * 500], max_tokens=9)
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert parrot.running == set()


def test_another_model_is_not_found(post: Any) -> None:
    """A model not served is a 404, on each route; no model named means the one served."""
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        response = post(path, model="gpt-9", **body)
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"


def test_roles_and_parts_that_are_not_text_are_refused(post: Any) -> None:
    """Tools and images are named in the refusal."""
    for message in ({"role": "tool", "content": "x"}, {"role": "user", "content": [{"type": "image_url"}]}):
        response = post("/v1/chat/completions", messages=[message])
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "messages"


def test_models_tell_what_a_client_must_know(parrot: Any, connect: Any) -> None:
    """The one model served, with its context length and vocabulary."""

    async def go() -> None:
        async with connect(create_app(parrot)) as client:
            listed = (await client.get("/v1/models")).json()
            assert listed["object"] == "list"
            (card,) = listed["data"]
            assert (card["id"], card["max_model_len"], card["vocab_size"]) == ("parrot", 128, parrot.vocab_size)
            assert (await client.get("/v1/models/parrot")).json() == card
            assert (await client.get("/v1/models/other")).status_code == 404

    asyncio.run(go())


def test_an_engine_that_dies_mid_stream_is_told_and_never_done(parrot: Any, connect: Any) -> None:
    """The stream ends with an error event, without [DONE]; later requests get 503."""

    async def go() -> None:
        async with connect(create_app(parrot)) as client:
            real = parrot.generate

            async def two_tokens_then_death(*args: Any, **kwargs: Any) -> Any:
                count = 0
                async for output in real(*args, **kwargs):
                    yield output
                    count += 1
                    if count == 2:
                        parrot.die("the engine failed: out of luck")

            parrot.generate = two_tokens_then_death
            body = {"prompt": "the cat sat", "max_tokens": 9, "stream": True}
            *chunks, last = events((await client.post("/v1/completions", json=body)).text)
            assert len(chunks) == 2
            assert last["error"]["code"] == "engine_failed"
            assert "out of luck" in last["error"]["message"]
            after = await client.post("/v1/completions", json={"prompt": "the"})
            assert after.status_code == 503

    asyncio.run(go())


def test_a_failure_nobody_foresaw_keeps_its_insides_to_itself(parrot: Any, connect: Any) -> None:
    """A bug is a 500 in OpenAI's form, in a stream an error event; the client learns no detail."""

    async def go() -> None:
        async with connect(create_app(parrot)) as client:

            async def broken(*args: Any, **kwargs: Any) -> Any:
                if kwargs["request_id"].endswith("-0"):
                    raise RuntimeError("secret")
                yield None

            parrot.generate = broken
            response = await client.post("/v1/completions", json={"prompt": "the"})
            assert response.status_code == 500
            assert response.json()["error"]["type"] == "server_error"
            assert "secret" not in response.text

    asyncio.run(go())
