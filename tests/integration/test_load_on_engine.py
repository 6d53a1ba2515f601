"""The load generator against our own server with a real engine: both sides count the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from flyball.adapters.loadgen import HttpLoad
from flyball.adapters.server_facts import ServerFacts, ask_server
from flyball.adapters.traces import Lengths, poisson, read_trace, trace_path
from flyball.core.metrics import MetricsWindow
from flyball.core.slo import Slo
from flyball.core.workload import RequestSpec, Workload
from flyball.engine.async_engine import AsyncEngine
from flyball.engine.config import EngineConfig
from flyball.server.app import create_app

Server = tuple[ServerFacts, HttpLoad]


@pytest.fixture(scope="module")
def server(serve: Callable[[FastAPI], str], tiny_checkpoint: Path) -> Iterator[Server]:
    """A tiny random model served for real, what it says of itself, and a load for it."""
    config = EngineConfig(
        model=tiny_checkpoint, dtype="float32", max_num_seqs=8, max_num_batched_tokens=128, num_blocks=512
    )
    facts = ask_server(serve(create_app(AsyncEngine(config, model_name="tiny", seed=1))))
    return facts, HttpLoad(url=facts.url, model=facts.model, vocab_size=facts.vocab_size)


def _counters(url: str) -> dict[tuple[str, str], float]:
    text = httpx.get(f"{url}/metrics").text
    return {
        (sample.name, sample.labels.get("source", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _run(server: Server, workload: Workload) -> tuple[MetricsWindow, Callable[..., float]]:
    """A window, and by how much each of the server's counters grew meanwhile."""
    facts, load = server
    before = _counters(facts.url)
    window = load.run(workload, Slo(), facts.generation)
    after = _counters(facts.url)
    return window, lambda name, source="": after[name, source] - before[name, source]


def test_the_server_says_what_it_is(server: Server) -> None:
    """Model, vocabulary, context and configuration all come from the server itself."""
    facts, _ = server
    assert facts.model == "tiny"
    assert facts.max_model_len == 512
    assert facts.vocab_size
    assert facts.configuration["max_num_seqs"] == 8
    assert facts.generation not in {"", "unversioned"}


def test_both_sides_count_the_same_tokens(server: Server) -> None:
    """Every request of a real trace completes with the lengths stated; the server's counters agree to the token."""
    rows = read_trace(trace_path("azure-conv"))
    lengths = Lengths(scale=0.05, max_input=100, max_output=20)
    workload = poisson(rows, name="azure-conv", rate_rps=50, seed=1, count=40, lengths=lengths)
    window, grew = _run(server, workload)
    assert window.errors == {}
    for trace, spec in zip(window.traces, workload.requests, strict=True):
        assert (trace.input_tokens, trace.output_tokens) == (spec.input_tokens, spec.output_tokens)
        assert len(trace.token_times_s) == spec.output_tokens
    assert grew("engine_generation_tokens_total") == sum(r.output_tokens for r in workload.requests)
    assert grew("engine_prompt_tokens_total", "computed") == sum(r.input_tokens for r in workload.requests)
    assert grew("engine_prompt_tokens_total", "cached") == 0


@pytest.mark.slow
def test_shared_prefixes_are_real(server: Server) -> None:
    """Requests with a common prefix id reuse its KV blocks in the server; a second run of the load starts cold."""
    spec = RequestSpec(arrival_s=0.0, input_tokens=200, output_tokens=2, prefix_ids=(5,), prefix_tokens=128)
    workload = Workload(requests=(spec, *(replace(spec, arrival_s=2.0) for _ in range(3))), source="shared prefix")
    for _ in range(2):
        window, grew = _run(server, workload)
        assert window.errors == {}
        assert grew("engine_prompt_tokens_total", "cached") == 3 * 128
