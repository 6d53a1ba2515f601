"""O18: what is asked to be JSON of a schema is JSON of that schema, whatever the model would rather say."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from flyball.engine.async_engine import AsyncEngine
from flyball.engine.config import EngineConfig
from flyball.server.app import create_app

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

Serve = Callable[..., str]

SCHEMAS = 500
MAX_TOKENS = 160


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> AsyncEngine:
    """Random weights: left alone they never write JSON."""
    config = EngineConfig(model=tiny_checkpoint, dtype="float32", max_num_seqs=16, max_num_batched_tokens=256)
    return AsyncEngine(config, model_name="tiny", seed=1)


@pytest.fixture(scope="module")
def client(serve: Serve, engine: AsyncEngine) -> Iterator[openai.OpenAI]:
    """The official client."""
    with openai.OpenAI(base_url=f"{serve(create_app(engine))}/v1", api_key="none", max_retries=0, timeout=120) as one:
        yield one


def schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """A small random schema, with the keywords that people use."""
    simple = ("integer", "number", "boolean", "null", "string", "enum", "pattern", "const")
    kind = rng.choice((*simple, "object", "object", "array", "anyOf") if depth else simple)
    if kind == "object":
        names = rng.sample(("name", "age", "tags", "ok", "next", "é"), rng.randint(1, 3))
        return {
            "type": "object",
            "properties": {name: schema(rng, depth - 1) for name in names},
            "required": names[: rng.randint(0, len(names))],
            "additionalProperties": False,
        }
    if kind == "array":
        low = rng.randint(0, 2)
        return {"type": "array", "items": schema(rng, depth - 1), "minItems": low, "maxItems": low + rng.randint(0, 2)}
    if kind == "anyOf":
        return {"anyOf": [schema(rng, depth - 1) for _ in range(2)]}
    return {
        "string": {"type": "string", "minLength": rng.randint(0, 2), "maxLength": rng.randint(3, 8)},
        "enum": {"enum": rng.sample(["red", "green", 3, None, True, 2.5], 3)},
        "pattern": {"type": "string", "pattern": "^[a-c]{2}-[0-9]{1,3}$"},
        "const": {"const": rng.choice(["x", 7, [1, 2]])},
        "integer": {"type": "integer", "minimum": rng.randint(-99, 0), "maximum": rng.randint(0, 999)},
    }.get(kind, {"type": kind})


def ask(client: openai.OpenAI, form: dict[str, Any], seed: int, **settings: Any) -> tuple[str, str]:
    """The text of an answer, and why it ended."""
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "the cat"}], response_format=form, seed=seed,  # type: ignore[call-overload]
        **({"max_tokens": MAX_TOKENS, "temperature": 1.0} | settings),
    )  # fmt: skip
    return answer.choices[0].message.content, answer.choices[0].finish_reason


def test_every_answer_is_of_its_schema(client: openai.OpenAI, engine: AsyncEngine) -> None:
    """Random schemas, many at a time, at temperature 1: every answer that ended by itself validates."""
    rng = random.Random(18)
    schemas = [schema(rng) for _ in range(SCHEMAS)]

    def one(i: int) -> tuple[str, str]:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schemas[i], "strict": True}}
        return ask(client, form, seed=i)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(one, range(SCHEMAS)))
    ends = Counter(reason for _, reason in answers)
    for wanted, (text, reason) in zip(schemas, answers, strict=True):
        if reason == "stop":
            jsonschema.validate(json.loads(text), wanted, jsonschema.Draft202012Validator)
    assert set(ends) <= {"stop", "length"}
    assert ends["stop"] > SCHEMAS / 2, ends
    assert engine.stats().blocks_used == 0


@pytest.mark.parametrize("stream", [False, True])
def test_expressions_objects_and_choices_hold_too(client: openai.OpenAI, stream: bool) -> None:
    """A regular expression, any JSON object, one of several words, an EBNF grammar; streamed and whole."""

    def complete(**extra: Any) -> tuple[str, str | None]:
        settings: dict[str, Any] = {"model": "tiny", "prompt": "the cat", "max_tokens": MAX_TOKENS, "extra_body": extra}
        if not stream:
            choice = client.completions.create(seed=3, **settings).choices[0]
            return choice.text, choice.finish_reason
        chunks = [chunk.choices[0] for chunk in client.completions.create(seed=3, stream=True, **settings)]
        return "".join(chunk.text for chunk in chunks), chunks[-1].finish_reason

    pattern = "[a-f]{3}(-[0-9]{2}){2}"
    text, reason = complete(response_format={"type": "regex", "pattern": pattern})
    assert re.fullmatch(pattern, text)
    assert reason == "stop"
    text, _ = complete(structured_outputs={"choice": ["yes", "no", "naïve"]})
    assert text in ("yes", "no", "naïve")
    text, _ = complete(structured_outputs={"grammar": 'root ::= "(" root ")" | "."'}, temperature=0.5)
    assert text.strip("(") in ("." + ")" * text.count("("), "")
    text, reason = complete(response_format={"type": "json_object"}, temperature=0.3, logit_bias={})
    assert text.startswith("{")
    if reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_n_answers_walk_their_own_ways(client: openai.OpenAI) -> None:
    """Each of n answers is held to the form by itself; a cut-off one is a beginning."""
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "go"}], n=4, seed=5, max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}},
    )  # fmt: skip
    texts = [choice.message.content or "" for choice in answer.choices]
    assert len(set(texts)) > 1
    for text in texts:
        assert re.fullmatch("-?(0|[1-9][0-9]*)|-", text)


def test_a_schema_that_cannot_be_used_is_a_400(client: openai.OpenAI, engine: AsyncEngine) -> None:
    """One sentence about the schema; the engine never sees it."""
    for form in (
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/nowhere"}}},
        {"type": "regex", "pattern": "(unclosed"},
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            ask(client, form, seed=1)
        assert "cannot be used" in refused.value.message
    assert engine.error is None
