"""O15, O16: the server with a real engine behind it, over a real socket, driven by the official OpenAI client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer

from flyball.engine.async_engine import AsyncEngine
from flyball.engine.config import EngineConfig
from flyball.server.app import create_app

Serve = Callable[..., str]


def tiny_engine(checkpoint: Path, **settings: Any) -> AsyncEngine:
    """An engine over the tiny checkpoint."""
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_blocks": 128} | settings
    return AsyncEngine(EngineConfig(model=checkpoint, dtype="float32", **sizes), model_name="tiny", seed=1)


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> AsyncEngine:
    """The engine that most tests share."""
    return tiny_engine(tiny_checkpoint)


@pytest.fixture(scope="module")
def url(serve: Serve, engine: AsyncEngine) -> str:
    """Where it is served."""
    return serve(create_app(engine))


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Any:
    """The checkpoint's own."""
    return AutoTokenizer.from_pretrained(tiny_checkpoint)


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    """The official client; it does not retry, so that failures are seen."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def until(true: Callable[[], bool], what: str) -> None:
    """Wait for something that the engine does on its own thread."""
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


def test_a_completion_is_the_engines_greedy_answer(client: openai.OpenAI, tokenizer: Any) -> None:
    """Whole and streamed, text or ids: one and the same answer, with true usage."""
    prompt = "the cat sat on"
    ids = tokenizer(prompt)["input_ids"]
    ask: dict[str, Any] = {"model": "tiny", "max_tokens": 20, "temperature": 0}
    extra = {"ignore_eos": True, "return_token_ids": True}
    whole = client.completions.create(prompt=prompt, extra_body=extra, **ask)
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), 20)
    assert whole.choices[0].finish_reason == "length"
    told = whole.choices[0].model_dump()["token_ids"]
    assert whole.choices[0].text == tokenizer.decode(told, skip_special_tokens=True)
    chunks = list(
        client.completions.create(
            prompt=ids, stream=True, stream_options={"include_usage": True}, extra_body=extra, **ask
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert [i for c in chunks if c.choices for i in c.choices[0].model_dump()["token_ids"]] == told
    assert len(chunks) == 20 + 1
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20


def test_a_chat_is_answered_whole_and_streamed(client: openai.OpenAI, tokenizer: Any) -> None:
    """The prompt is the model's own template; both ways give the same words."""
    messages: Any = [{"role": "system", "content": "go"}, {"role": "user", "content": "the cat"}]
    ask: dict[str, Any] = {"model": "tiny", "messages": messages, "max_completion_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**ask)
    assert whole.choices[0].message.role == "assistant"
    templated = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(tokenizer(templated, add_special_tokens=False)["input_ids"])
    chunks = list(client.chat.completions.create(stream=True, **ask))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_seed_repeats_an_answer_whatever_runs_beside_it(client: openai.OpenAI) -> None:
    """Alone or among others, the seeded sample is the same; another seed gives another."""

    def ask(seed: int | None) -> str:
        answer = client.completions.create(
            model="tiny", prompt="the dog", max_tokens=24, temperature=1.0, seed=seed, extra_body={"ignore_eos": True}
        )
        return answer.choices[0].text

    alone = ask(11)
    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(ask, None) for _ in range(5)]
        assert pool.submit(ask, 11).result() == alone
        assert len({alone, *(other.result() for other in others)}) > 1
    assert ask(12) != alone


def test_a_stop_string_across_chunks_ends_the_stream_and_the_request(
    client: openai.OpenAI, engine: AsyncEngine
) -> None:
    """Take a stop string from the middle of a known answer: the stream ends just before it and frees its blocks."""
    ask: dict[str, Any] = {"model": "tiny", "prompt": "the cat sat", "temperature": 0}
    extra = {"ignore_eos": True}
    text = client.completions.create(max_tokens=60, extra_body=extra, **ask).choices[0].text
    stop = text[10:14]
    assert len(stop) == 4
    assert stop.isprintable()
    cut = text[: text.index(stop)]
    chunks = list(client.completions.create(max_tokens=400, stop=stop, stream=True, extra_body=extra, **ask))
    assert "".join(c.choices[0].text for c in chunks) == cut
    assert chunks[-1].choices[0].finish_reason == "stop"
    until(lambda: engine.stats().blocks_used == 0, "blocks of a stopped request are still held")


def test_many_prompts_and_many_clients(client: openai.OpenAI) -> None:
    """Several prompts in one request, from several clients at once: each choice as if it were alone."""
    prompts = ["the cat", "the dog said", "go", "on the mat"]
    ask: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "temperature": 0}
    alone = [client.completions.create(prompt=prompt, **ask).choices[0].text for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(client.completions.create, prompt=prompts, **ask) for _ in range(6)]
        for answer in answers:
            assert [choice.text for choice in answer.result().choices] == alone


def test_errors_are_the_clients_own_types(client: openai.OpenAI) -> None:
    """The official client turns our refusals into its exceptions, with our code and sentence."""
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model="tiny", prompt="the cat", max_tokens=5000)
    assert too_long.value.code == "context_length_exceeded"
    assert "512" in too_long.value.message
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="the cat")
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], n=129, stream=True)
    assert "n=129" in refused.value.message
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="x", suffix="y")
    assert (refused.value.param, refused.value.code) == ("suffix", "unsupported_field")
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt=[10**6])
    (card,) = client.models.list().data
    assert (card.id, card.model_dump()["max_model_len"]) == ("tiny", 512)


def test_n_answers_stream_side_by_side(client: openai.OpenAI) -> None:
    """Seeded choices are seed, seed + 1, ...: each the one that a request of its own gives, streamed or whole."""
    ask: dict[str, Any] = {"model": "tiny", "prompt": "the dog", "max_tokens": 12, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(n=3, seed=5, **ask)
    texts = [choice.text for choice in whole.choices]
    assert texts == [client.completions.create(seed=5 + i, **ask).choices[0].text for i in range(3)]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 36
    streamed = ["", "", ""]
    for chunk in client.completions.create(n=3, seed=5, stream=True, **ask):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_the_models_own(client: openai.OpenAI, tiny_checkpoint: Path, stream: bool) -> None:
    """Both routes tell what transformers computes for the same tokens, and which were the likeliest."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    prompt = [7, 8, 9, 10, 11]
    ask: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0.9, "seed": 3}
    extra = {"ignore_eos": True, "return_token_ids": True}
    told: list[Any]
    if stream:
        chunks = list(client.completions.create(logprobs=3, stream=True, extra_body=extra, **ask))
        ids = [i for chunk in chunks for i in chunk.choices[0].model_dump()["token_ids"]]
        told = [lp for chunk in chunks for lp in (chunk.choices[0].logprobs.token_logprobs or [])]  # type: ignore[union-attr]
        tops = [top for chunk in chunks for top in (chunk.choices[0].logprobs.top_logprobs or [])]  # type: ignore[union-attr]
    else:
        choice = client.completions.create(logprobs=3, extra_body=extra, **ask).choices[0]
        assert choice.logprobs is not None
        ids = choice.model_dump()["token_ids"]
        told, tops = choice.logprobs.token_logprobs or [], choice.logprobs.top_logprobs or []
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits.float(), -1)
    assert told == pytest.approx(expected[torch.arange(8), torch.tensor(ids)].tolist(), abs=1e-3)
    for row, top in zip(expected, tops, strict=True):
        assert 3 <= len(top) <= 4
        assert sorted(top.values(), reverse=True)[:3] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)


def test_a_chat_tells_log_probabilities(client: openai.OpenAI) -> None:
    """The official types hold: an entry a token with its bytes, likeliest first."""
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "the cat"}], max_tokens=10, logprobs=True, top_logprobs=4,
        temperature=0, extra_body={"ignore_eos": True},
    )  # fmt: skip
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert len(told.content) == 10
    for one in told.content:
        assert len(one.top_logprobs) == 4
        assert one.top_logprobs[0].token == one.token  # greedy
        assert bytes(one.bytes or []).decode(errors="replace") == one.token or one.token.startswith("bytes:")


def test_penalties_bias_and_minimum_change_the_answer(client: openai.OpenAI) -> None:
    """Each through the official client, against what it is defined to do."""

    def ask(**settings: Any) -> list[int]:
        extra = {"return_token_ids": True, "ignore_eos": True} | settings.pop("extra", {})
        choice = client.completions.create(
            model="tiny", prompt="the cat", max_tokens=12, temperature=0, extra_body=extra, **settings
        ).choices[0]
        ids: list[int] = choice.model_dump()["token_ids"]
        return ids

    plain = ask()
    assert plain[0] not in ask(logit_bias={str(plain[0]): -100})
    assert ask(logit_bias={"42": 100}) == [42] * 12
    assert len(set(ask(presence_penalty=2, frequency_penalty=2, logit_bias={"42": 5}))) > 1
    assert set(ask(extra={"allowed_token_ids": [50, 51]})) <= {50, 51}
    assert len(ask(extra={"stop_token_ids": [plain[0]]})) == 1
    assert len(ask(extra={"stop_token_ids": [plain[0]], "min_tokens": 5})) >= 5


def test_a_full_queue_is_a_rate_limit_error(serve: Serve, tiny_checkpoint: Path) -> None:
    """429 with a Retry-After that the official client honours: it waits, asks again and gets its answer."""
    engine = tiny_engine(tiny_checkpoint, max_num_seqs=1)
    base = serve(create_app(engine))
    httpx.patch(f"{base}/v1/config", json={"max_queue_len": 1})
    ask: dict[str, Any] = {"model": "tiny", "prompt": "go", "max_tokens": 300, "extra_body": {"ignore_eos": True}}
    with (
        ThreadPoolExecutor(8) as pool,
        openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as hasty,
        openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=10) as patient,
    ):
        asks = [pool.submit(hasty.completions.create, **ask) for _ in range(6)]
        errors = [one.exception() for one in asks]
        refused = [error for error in errors if error is not None]
        assert refused
        for error in refused:
            assert isinstance(error, openai.RateLimitError)
            assert int(error.response.headers["retry-after"]) >= 1
            assert error.code == "queue_full"
        answers = [pool.submit(patient.completions.create, **ask) for _ in range(3)]
        assert all(answer.result().choices[0].finish_reason == "length" for answer in answers)
    text = httpx.get(f"{base}/metrics").text
    assert (
        f'engine_admission_rejections_total{{reason="queue_full"}} {float(engine.stats().refused["queue_full"])}'
        in text
    )


@pytest.mark.parametrize("own", [True, False])
def test_deadlines_end_requests(serve: Serve, tiny_checkpoint: Path, own: bool) -> None:
    """The request's timeout is a 408, the server's live default a 504; a stream is told; nothing is left running."""
    engine = tiny_engine(tiny_checkpoint)
    base = serve(create_app(engine))
    if not own:
        httpx.patch(f"{base}/v1/config", json={"request_timeout_s": 0.05})
    body = {"prompt": "go", "max_tokens": 500, "ignore_eos": True} | ({"timeout": 0.05} if own else {})
    response = httpx.post(f"{base}/v1/completions", json=body, timeout=60)
    assert (response.status_code, response.json()["error"]["code"]) == (408 if own else 504, "timeout")
    with httpx.stream("POST", f"{base}/v1/completions", json=body | {"stream": True}, timeout=60) as streamed:
        lines = [line for line in streamed.iter_lines() if line]
    assert '"timeout"' in lines[-1]
    assert "[DONE]" not in lines[-1]
    assert engine.stats().blocks_used == 0
    assert 'finished_reason="timeout"} 2.0' in httpx.get(f"{base}/metrics").text


def _hostile(path: str, *bodies: str) -> list[tuple[str, str]]:
    return [(path, body) for body in bodies]


NINES = "9" * 400
HOSTILE = [
    *_hostile(
        "/v1/completions",
        '{"prompt": "a", "temperature": 1e-300}',
        '{"prompt": "a", "top_p": 1e-300}',
        '{"prompt": "a", "seed": -1}',
        '{"prompt": "a", "temperature": NaN}',
        f'{{"prompt": "a", "top_k": {NINES}}}',
        f'{{"prompt": "a", "max_tokens": {NINES}}}',
        f'{{"prompt": [{NINES}]}}',
        '{"prompt": [4294967296]}',
        f'{{"prompt": "a", "stop_token_ids": [{NINES}]}}',
        '{"prompt": "\\ud800"}',
        '{"prompt": "\\u0000"}',
        '{"prompt": "a", "stop": "\\ud83d"}',
        '{"prompt": "a", "model": "\\ud800"}',
        '{"prompt": [[]]}',
        f'{{"prompt": "a", "n": {NINES}}}',
        '{"prompt": "a", "n": -1}',
        '{"prompt": "a", "logprobs": 99}',
        '{"prompt": "a", "logit_bias": {"9": 1e999}}',
        '{"prompt": "a", "logit_bias": {"99999": 1}}',
        '{"prompt": "a", "logit_bias": {"\\ud800": 1}}',
        '{"prompt": "a", "allowed_token_ids": [99999]}',
        '{"prompt": "a", "timeout": 1e-300}',
        '{"prompt": "a", "min_tokens": 1e400}',
        '{"prompt": "a", "cache_salt": "\\ud800"}',
        '{"prompt": "a", "best_of": "\\ud800"}',
        '{"prompt": "a", "structured_outputs": {"regex": "\\ud800"}}',
        '{"prompt": "a", "structured_outputs": {"json": "{"}}',
        '{"prompt": "a", "structured_outputs": {"choice": ["\\u0000"]}}',
        '{"prompt": "a", "structured_outputs": {"grammar": "root ::= root"}}',
        '{"prompt": "a", "response_format": {"type": "regex", "pattern": "(((((((((a{9}){9}){9}){9}"}}',
        '{"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}}',
        '{"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": false}}}',
        '{"prompt": %s' % ("[" * 100_000),
        "[]",
        "null",
        "",
        "\xff",
        '{"prompt": "%s"}' % ("x" * 10_000),
    ),
    *_hostile(
        "/v1/chat/completions",
        '{"messages": [{"role": "user", "content": "\\ud800"}]}',
        '{"messages": [{"role": "user"}]}',
    ),
    *_hostile("/v1/generate", '{"prompt": "\\ud800"}', '{"prompt": "a", "max_tokens": 1e400}'),
    *_hostile("/v1/generate/batch", '{"prompts": ["\\ud800", "a"]}', '{"prompts": [[]], "requests": null}'),
    *_hostile("/v1/tokenize", '{"prompt": "\\ud800"}'),
    *_hostile("/v1/detokenize", '{"tokens": [99999]}', '{"tokens": [-1]}'),
]


@pytest.mark.parametrize(("path", "body"), HOSTILE, ids=[f"{path[4:]}-{i}" for i, (path, _) in enumerate(HOSTILE)])
def test_no_body_harms_the_server(url: str, engine: AsyncEngine, path: str, body: str) -> None:
    """Answered or refused with a 4xx in OpenAI's form; the engine lives on."""
    response = httpx.post(
        url + path, content=body.encode("latin-1"), headers={"content-type": "application/json"}, timeout=60
    )
    assert response.status_code < 500, response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert engine.error is None


@pytest.mark.parametrize("value", ["9" * 400, "NaN", "1e999", "null", '"8"', "[]"])
def test_no_knob_value_harms_the_server(url: str, engine: AsyncEngine, value: str) -> None:
    """Refused with a 400; nothing has changed."""
    before = engine.runtime
    body = f'{{"max_wait_ms": 1, "max_num_seqs": {value}}}'
    response = httpx.patch(f"{url}/v1/config", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_knob"
    assert engine.runtime == before
    assert engine.error is None


def test_metrics_equal_what_the_script_did(serve: Serve, tiny_checkpoint: Path, tokenizer: Any) -> None:
    """O16: a scripted run on a fresh server; every counter is the script's own count."""
    engine = tiny_engine(tiny_checkpoint, block_size=4)
    base = serve(create_app(engine))
    prompt = "the cat sat on the mat; the dog said"
    length = len(tokenizer(prompt)["input_ids"])
    with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as client:
        cached = 0
        for tokens in (1, 7, 30):
            answer = client.completions.create(
                model="tiny", prompt=prompt, max_tokens=tokens, temperature=0, extra_body={"ignore_eos": True}
            )
            assert answer.usage is not None
            assert answer.usage.prompt_tokens_details is not None
            cached += answer.usage.prompt_tokens_details.cached_tokens or 0
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="tiny", prompt=prompt, max_tokens=5000)
    assert cached == 2 * ((length - 1) // 4 * 4)  # the second and third found all full blocks but the last token's
    seen = {}
    for family in text_string_to_metric_families(httpx.get(f"{base}/metrics").text):
        for sample in family.samples:
            seen[sample.name, *sample.labels.values()] = sample.value
    assert seen["engine_request_success_total", "length"] == 3
    assert seen["engine_generation_tokens_total",] == 38
    assert seen["engine_prompt_tokens_total", "cached"] == cached
    assert seen["engine_prompt_tokens_total", "computed"] == 3 * length - cached
    assert seen["engine_prefix_cache_queries_tokens_total",] == 3 * length
    assert seen["engine_prefix_cache_hits_tokens_total",] == cached
    assert seen["engine_time_to_first_token_seconds_count",] == 3
    assert seen["engine_inter_token_latency_seconds_count",] == 38 - 3
    assert seen["engine_num_preemptions_total",] == 0
    assert seen["engine_num_requests_running",] == seen["engine_num_requests_waiting",] == 0
    assert seen["engine_kv_blocks", "used"] == 0
    assert seen["engine_kv_blocks", "cached"] + seen["engine_kv_blocks", "free"] == 128
    assert seen["engine_step_duration_seconds_count",] == engine.stats().step


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks_within_a_step(serve: Serve, tiny_checkpoint: Path, stream: bool) -> None:
    """O15: after the disconnect the engine takes at most one more step for the request, and holds no block."""
    told: list[int] = []  # the engine's step when it was told

    class Observed(AsyncEngine):
        def abort(self, request_id: str) -> None:
            told.append(self.stats().step)
            super().abort(request_id)

    engine = Observed(EngineConfig(model=tiny_checkpoint, dtype="float32", num_blocks=128), model_name="tiny")
    base = serve(create_app(engine))

    async def leave() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            body = {"prompt": "the cat", "max_tokens": 500, "ignore_eos": True, "stream": stream}
            async with client.stream("POST", f"{base}/v1/completions", json=body) as response:
                await anext(response.aiter_lines())

    async def go() -> None:
        task = asyncio.create_task(leave())
        if not stream:
            while engine.stats().running == 0:
                await asyncio.sleep(0.001)
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(go())
    until(lambda: bool(told), "the disconnect never reached the engine")
    until(lambda: engine.stats().running == 0, "the request still runs")
    stats = engine.stats()
    assert stats.blocks_used == 0
    assert stats.finished == {"abort": 1}
    assert stats.step <= told[0] + 1
    assert stats.step < 490
    assert 'finished_reason="abort"} 1.0' in httpx.get(f"{base}/metrics").text


def test_clients_that_leave_at_any_moment_harm_nobody(serve: Serve, tiny_checkpoint: Path) -> None:
    """Cancelled before, while and after the engine takes them: nothing leaks, and the others get their answers."""
    engine = tiny_engine(tiny_checkpoint)
    base = serve(create_app(engine))

    async def go() -> None:
        async with httpx.AsyncClient(timeout=60) as client:

            async def ask(stream: bool) -> int:
                body = {"prompt": "the cat", "max_tokens": 60, "temperature": 0, "ignore_eos": True, "stream": stream}
                return (await client.post(f"{base}/v1/completions", json=body)).status_code

            tasks = [asyncio.create_task(ask(stream=i % 2 == 0)) for i in range(60)]
            for i, task in enumerate(tasks):
                await asyncio.sleep(0.002)
                if i % 3:
                    task.cancel()
            kept = [await task for i, task in enumerate(tasks) if i % 3 == 0]
            assert kept == [200] * 20

    asyncio.run(go())
    until(lambda: engine.stats().running + engine.stats().waiting == 0, "requests were left behind")
    assert engine.error is None
    assert engine.stats().blocks_used == 0


def test_the_policy_changes_under_load_and_answers_do_not(client: openai.OpenAI, url: str) -> None:
    """O17: PATCH between any two steps; all or nothing; greedy answers stay what they were."""
    ask: dict[str, Any] = {"model": "tiny", "max_tokens": 40, "temperature": 0, "extra_body": {"ignore_eos": True}}
    prompts = ["the cat", "the dog said: stop", "go on", "mat"]
    alone = {prompt: client.completions.create(prompt=prompt, **ask).choices[0].text for prompt in prompts}
    version = httpx.get(f"{url}/v1/config").json()["version"]
    with ThreadPoolExecutor(8) as pool:
        answers = [(prompt, pool.submit(client.completions.create, prompt=prompt, **ask)) for prompt in prompts * 6]
        for knobs in ({"max_num_seqs": 1}, {"max_num_batched_tokens": 8, "max_num_seqs": 2}, {"max_wait_ms": 3}):
            answer = httpx.patch(f"{url}/v1/config", json=knobs, headers={"if-match": str(version)})
            version += 1
            assert answer.json()["version"] == version
            bad = httpx.patch(f"{url}/v1/config", json={"max_wait_ms": 50, "max_num_seqs": 99})
            assert bad.status_code == 400
        for prompt, answer in answers:
            assert answer.result().choices[0].text == alone[prompt]
    values = httpx.get(f"{url}/v1/config").json()
    assert values["version"] == version
    assert (values["values"]["max_wait_ms"], values["values"]["max_num_seqs"]) == (3, 2)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_engine_threads_death_is_told_to_everyone(serve: Serve, tiny_checkpoint: Path) -> None:
    """O15: streams get an error event, new requests 503, and readiness is gone."""
    engine = tiny_engine(tiny_checkpoint)
    base = serve(create_app(engine))
    with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(
            model="tiny", prompt="the", max_tokens=500, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)

        def burn() -> None:
            raise MemoryError("no more")

        engine._inbox.put(burn)  # what a failing step does to the thread
        with pytest.raises(openai.APIError, match="no more"):
            list(stream)
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(model="tiny", prompt="the")
        assert refused.value.status_code == 503
    assert httpx.get(f"{base}/health/ready").status_code == 503
    assert httpx.get(f"{base}/health").status_code == 503
