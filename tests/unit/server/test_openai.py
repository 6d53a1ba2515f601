"""OpenAI's routes over a parrot: what is asked is what is answered, or refused by name."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest

from flyball.core.errors import QueueFull
from flyball.server.app import create_app
from flyball.server.auth import Keys

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
    sent = {
        "max_tokens": 5, "min_tokens": 2, "temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "seed": -7,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.5, "ignore_eos": True,
        "priority": -3, "n": 2, "optimization": "basic",
    }  # fmt: skip
    lists: dict[str, Any] = {"stop_token_ids": [3], "allowed_token_ids": [5, 6], "logit_bias": {"7": -100, "8": 2.5}}
    post(prompt="the", top_k=-1, timeout=9, **sent, **lists)
    seen = parrot.params[-1]
    assert {name: getattr(seen, name) for name in sent} == sent
    assert (seen.top_k, seen.stop_token_ids, seen.allowed_token_ids) == (0, (3,), (5, 6))
    assert (seen.logit_bias, seen.timeout_s) == (((7, -100), (8, 2.5)), 9)
    assert (seen.logprobs, seen.grammar) == (None, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [("best_of", 3), ("suffix", "x"), ("bad_words", ["x"]), ("tools", [{"a": 1}]), ("prompt_logprobs", 1),
     ("guided_json", {}), ("chat_template", "x"), ("use_beam_search", True), ("truncate_prompt_tokens", 5)],
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
    extras = {
        "n": 1,
        "logprobs": None,
        "best_of": 1,
        "tools": [],
        "logit_bias": {},
        "user": "me",
        "metadata": {"a": "b"},
    }
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
        ({"prompt": "the", "stop": ["x"] * 65}, "invalid_value", "stop"),
        ({"prompt": "the", "n": 0}, "invalid_value", "n=0"),
        ({"prompt": ["the"] * 9, "n": 128}, "invalid_value", "1024"),
        ({"prompt": "the", "logprobs": 21}, "invalid_value", "logprobs=21"),
        ({"prompt": "the", "logprobs": 1, "echo": True}, "invalid_value", "echo"),
        ({"prompt": "the", "logit_bias": {"x": 1}}, "invalid_value", "logit_bias"),
        ({"prompt": "the", "logit_bias": {"5": 101}}, "invalid_value", "logit_bias"),
        ({"prompt": "the", "min_tokens": 99}, "invalid_value", "min_tokens=99"),
        ({"prompt": "the", "timeout": 0}, "invalid_value", "timeout"),
        ({"prompt": "the", "response_format": {"type": "xml"}}, "invalid_value", "response_format"),
        ({"prompt": "the", "response_format": {"type": "json_schema"}}, "invalid_value", "schema"),
        ({"prompt": "the", "response_format": {"type": "regex", "pattern": "bad["}}, "invalid_value", "bad"),
        ({"prompt": "the", "structured_outputs": {}}, "invalid_value", "exactly one"),
        ({"prompt": "the", "structured_outputs": {"regex": "a", "choice": ["b"]}}, "invalid_value", "exactly one"),
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


WORDS = "the cat sat on the mat and said: stop here. "


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_n_answers_are_n_choices(post: Any, parrot: Any, tokenizer: Any, stream: bool, chat: bool) -> None:
    """Each choice is a stream of its own, under its index; the prompt counts once; one may end before the others."""
    path, ask = ("/v1/completions", {"prompt": WORDS})
    if chat:
        path, ask = ("/v1/chat/completions", {"messages": [{"role": "user", "content": WORDS}]})
    body = {**ask, "n": 3, "max_tokens": 5, "stop": ["cat sat"], "stream": stream, "return_token_ids": True}
    texts, ids, reasons = ["", "", ""], [[], [], []], [None] * 3  # type: ignore[var-annotated]
    if stream:
        *chunks, last, done = events(post(path, **body, stream_options={"include_usage": True}).text)
        assert done == "[DONE]"
        for chunk in chunks:
            for choice in chunk["choices"]:
                assert reasons[choice["index"]] is None, "nothing comes after the end"
                texts[choice["index"]] += choice["delta"]["content"] if chat else choice["text"]
                ids[choice["index"]] += choice["token_ids"]
                reasons[choice["index"]] = choice["finish_reason"]
        usage = last["usage"]
    else:
        answer = post(path, **body).json()
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        texts = [choice["message"]["content"] if chat else choice["text"] for choice in answer["choices"]]
        ids = [choice["token_ids"] for choice in answer["choices"]]
        reasons = [choice["finish_reason"] for choice in answer["choices"]]
        usage = answer["usage"]
    prompt = usage["prompt_tokens"]
    if not chat:
        own = tokenizer(WORDS)["input_ids"]
        assert prompt == len(own)
        assert [one[:2] for one in ids] == [own[i : i + 2] for i in range(3)]
        assert texts[2] == tokenizer.decode(own[2:7])
        assert (texts[0], reasons) == (
            "the ",
            ["stop", "stop" if "cat sat" in tokenizer.decode(own[1:6]) else "length", "length"],
        )
        assert ("stop" in reasons) == bool(parrot.silenced)
    assert usage["completion_tokens"] == sum(map(len, ids))
    assert usage["total_tokens"] == prompt + usage["completion_tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_completions_tell_log_probabilities_their_way(post: Any, tokenizer: Any, stream: bool) -> None:
    """Parallel lists; the chosen token is always among the alternatives; offsets count characters of the text."""
    body = {"prompt": WORDS, "max_tokens": 4, "logprobs": 2, "stream": stream}
    if stream:
        *chunks, _ = events(post(**body).text)
        parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        told = {key: [item for part in parts for item in part[key]] for key in parts[0]}
    else:
        told = post(**body).json()["choices"][0]["logprobs"]
    ids = tokenizer(WORDS)["input_ids"]
    texts = [tokenizer.decode([i]) for i in ids[:5]]
    assert told["tokens"] == texts[:4]
    assert told["text_offset"] == [len("".join(texts[:i])) for i in range(4)]
    assert told["token_logprobs"] == pytest.approx([math.log(0.75)] * 4)
    for i, top in enumerate(told["top_logprobs"]):
        assert top == pytest.approx({texts[i]: math.log(0.75), texts[i + 1]: math.log(0.25)})
    none = post(**{**body, "logprobs": 0, "stream": False}).json()["choices"][0]["logprobs"]
    assert [list(top) for top in none["top_logprobs"]] == [[text] for text in texts[:4]]


@pytest.mark.parametrize("stream", [False, True])
def test_chats_tell_log_probabilities_their_way(post: Any, stream: bool) -> None:
    """An entry a token, with its bytes: those of a split character join to it."""
    messages = [{"role": "user", "content": "🦊 " * 20}]
    body = {"messages": messages, "max_tokens": 12, "logprobs": True, "top_logprobs": 2, "stream": stream}
    if stream:
        *chunks, _ = events(post("/v1/chat/completions", **body).text)
        content = [one for chunk in chunks for one in chunk["choices"][0]["logprobs"]["content"]]
    else:
        content = post("/v1/chat/completions", **body).json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 12
    whole = bytes(byte for one in content for byte in one["bytes"]).decode(errors="ignore")
    assert "🦊" in whole
    assert any(one["token"].startswith("bytes:") for one in content)
    for one in content:
        assert one["logprob"] == pytest.approx(math.log(0.75))
        assert [top["logprob"] for top in one["top_logprobs"]] == pytest.approx([math.log(0.75), math.log(0.25)])
        assert one["top_logprobs"][0]["token"] == one["token"]
    off = post("/v1/chat/completions", messages=messages, max_tokens=2, top_logprobs=2)
    assert off.json()["error"]["param"] == "top_logprobs"


def test_echo_repeats_the_prompt_before_the_answer(post: Any) -> None:
    """Of each prompt, once, streamed or not."""
    for stream in (False, True):
        response = post(prompt=["the cat", "mat"], max_tokens=1, n=2, echo=True, stream=stream)
        texts = ["", "", "", ""]
        if stream:
            for chunk in events(response.text)[:-1]:
                texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
        else:
            texts = [choice["text"] for choice in response.json()["choices"]]
        assert [text[:8].rstrip() for text in texts[:1]] == ["the catt"] or texts[0].startswith("the cat")
        assert all(text.startswith("the cat") for text in texts[:2])
        assert all(text.startswith("mat") for text in texts[2:])


def test_what_stops_an_answer_is_told_and_shown_if_asked(post: Any, tokenizer: Any) -> None:
    """`stop_reason` is the string or the token's id; include_stop_str_in_output leaves it in the text."""
    ids = tokenizer(WORDS)["input_ids"]
    by_text = post(prompt=WORDS, max_tokens=50, stop="on the").json()["choices"][0]
    assert (by_text["text"], by_text["stop_reason"]) == ("the cat sat ", "on the")
    shown = post(prompt=WORDS, max_tokens=50, stop="on the", include_stop_str_in_output=True).json()["choices"][0]
    assert shown["text"] == "the cat sat on the"
    by_token = post(prompt=WORDS, max_tokens=50, stop_token_ids=[ids[2]]).json()["choices"][0]
    assert (by_token["text"], by_token["stop_reason"]) == (tokenizer.decode(ids[:2]), ids[2])
    shown = post(prompt=WORDS, max_tokens=50, stop_token_ids=[ids[2]], include_stop_str_in_output=True).json()
    assert shown["choices"][0]["text"] == tokenizer.decode(ids[:3])
    assert post(prompt="the", max_tokens=2).json()["choices"][0]["stop_reason"] is None


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", None),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            "json_schema",
            SCHEMA,
        ),
        ({"response_format": {"type": "regex", "pattern": "[ab]+"}}, "regex", "[ab]+"),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", SCHEMA),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json_schema", SCHEMA),
        ({"structured_outputs": {"json_object": True}}, "json_object", None),
        ({"structured_outputs": {"regex": "x|y"}}, "regex", "x|y"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "choice", ["yes", "no"]),
        ({"structured_outputs": {"grammar": 'root ::= "x"'}}, "ebnf", 'root ::= "x"'),
    ],
)
def test_forms_of_answers_reach_the_engine(post: Any, parrot: Any, body: Any, kind: str, text: Any) -> None:
    """OpenAI's response_format and vLLM's structured_outputs name the same grammars."""
    assert post(prompt="the", max_tokens=2, **body).status_code == 200
    grammar = parrot.params[-1].grammar
    assert grammar.kind == kind
    told = json.loads(grammar.text) if kind in ("json_schema", "choice") else grammar.text or None
    assert told == text
    assert post(prompt="the", max_tokens=2, response_format={"type": "text"}).status_code == 200
    assert parrot.params[-1].grammar is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_says_when_to_come_back(post: Any, parrot: Any, stream: bool) -> None:
    """429 with Retry-After in whole seconds, as the engine measured it, before any stream begins."""
    parrot.full = QueueFull("9 requests wait already; send the request again in 7 s", 6.2)
    response = post(prompt="the", stream=stream)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "7"
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("timeout", "status"), [(5.0, 408), (None, 504)])
def test_a_deadline_that_passes_is_an_error(
    parrot: Any, connect: Any, stream: bool, timeout: float | None, status: int
) -> None:
    """408 for the client's own timeout, 504 for the server's; in a stream an event, and never a [DONE]."""

    async def go() -> None:
        real = parrot.generate

        async def slow(prompt: Any, params: Any, **kwargs: Any) -> Any:
            limited = replace(params, timeout_s=params.timeout_s or 5.0)
            async for output in real(prompt, limited, **kwargs):
                yield output
                parrot.clock.advance(2.0)

        parrot.generate = slow
        async with connect(create_app(parrot)) as client:
            body = {"prompt": WORDS, "max_tokens": 50, "timeout": timeout, "stream": stream}
            response = await client.post("/v1/completions", json=body)
            if stream:
                *chunks, last = events(response.text)
                assert len(chunks) == 3
                error = last["error"]
            else:
                assert response.status_code == status
                error = response.json()["error"]
            assert (error["code"], error["param"]) == ("timeout", "timeout" if timeout else None)
            assert "after 3 tokens" in error["message"]
            seen = (await client.get("/v1/stats")).json()
            assert seen["requests_by_finish_reason"] == {"timeout": 1}
            assert parrot.running == set()

    asyncio.run(go())


def test_tenants_share_no_prefixes(parrot: Any, connect: Any) -> None:
    """With several keys each has a salt of its own; a request may narrow it; with one key all share."""

    async def salts(users: tuple[str, ...], *asks: tuple[str, str | None]) -> list[bytes]:
        parrot.salts.clear()
        async with connect(create_app(parrot, keys=Keys(users=users))) as client:
            for key, salt in asks:
                headers = {"authorization": f"Bearer {key}"}
                body = {"prompt": "the", "cache_salt": salt}
                assert (await client.post("/v1/completions", json=body, headers=headers)).status_code == 200
        return list(parrot.salts)

    async def go() -> None:
        one = await salts(("a",), ("a", None), ("a", None), ("a", "s"))
        assert one[0] == one[1] == b""
        assert one[2] != b""
        a, b, again, narrow = await salts(("a", "b"), ("a", None), ("b", None), ("a", None), ("a", "s"))
        assert a == again
        assert len({a, b, narrow, b""}) == 4

    asyncio.run(go())
