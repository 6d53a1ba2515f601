"""`flyball bench` from the shell's side."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from flyball.adapters.bench_files import read_bench
from flyball.cli import main

Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    """Runs `flyball bench` as a shell would: exit code, output, errors."""

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flyball", "bench", *args])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return run


FAST = ("--rate", "200", "--requests", "12", "--scale-lengths", "0.02")


def test_a_bench_measures_and_writes(fake_server: Callable[..., Any], shell: Shell, tmp_path: Path) -> None:
    """The table tells every latency, the SLOs and the errors; the file holds the same under the schema."""
    server = fake_server(generations=("abc",), script=lambda index: "http_429" if index == 3 else "ok")
    path = tmp_path / "b.json"
    code, out, err = shell(
        "--url", server.url + "/v1/", *FAST, "--slo", "p50_ttft<60s", "--slo", "p99_e2e<60s", "--out", str(path)
    )  # fmt: skip
    assert code == 0
    for word in ("TTFT", "TPOT", "ITL", "E2E", "send lag", "p95", "11 of 12 requests completed", "goodput"):
        assert word in out
    assert "SLO p50_ttft<=60s: kept" in out
    assert "SLO p99_e2e<=60s: broken, measured inf ms" in out
    assert "1 failed: http_429" in out
    assert "attainment 91.7%" in out
    assert "12/12" in err
    result = read_bench(path)
    assert (result.requests, result.completed, result.errors) == (12, 11, {"http_429": 1})
    assert (result.generation, result.configuration, result.model) == ("abc", {"max_num_seqs": 8}, "fake")
    assert result.slo == ("p50_ttft<=60s", "p99_e2e<=60s")
    assert result.workload.startswith("Poisson at 200/s, seed 0, 12 requests of azure-conv from row 0, lengths x0.02")
    assert result.traces is None
    assert result.ttft_s.count == 11


def test_equal_seeds_repeat_a_bench(fake_server: Callable[..., Any], shell: Shell, tmp_path: Path) -> None:
    """With both seeds given the same bodies are sent again; without, prompts are new and their seed is on record."""
    server = fake_server()
    sent = []
    for seeds in (("--prompt-seed", "4"), ("--prompt-seed", "4"), ()):
        server.bodies.clear()
        path = tmp_path / f"{len(sent)}.json"
        assert shell("--url", server.url, *FAST, *seeds, "--save-requests", "--out", str(path))[0] == 0
        sent.append(sorted(map(str, server.bodies)))
    assert sent[0] == sent[1] != sent[2]
    results = [read_bench(tmp_path / f"{i}.json") for i in range(3)]
    assert results[0].prompt_seed == results[1].prompt_seed == 4
    schedules = [[trace.scheduled_s for trace in result.traces or ()] for result in results]
    assert schedules[0] == schedules[1] == schedules[2]
    assert len(schedules[0]) == 12


def test_lengths_fit_the_models_context(fake_server: Callable[..., Any], shell: Shell, tmp_path: Path) -> None:
    """Without limits given, every request fits the context the server states, and the result says what was cut."""
    server = fake_server(card={"id": "fake", "vocab_size": 3000, "max_model_len": 64})
    assert shell("--url", server.url, "--rate", "100", "--requests", "20", "--out", str(tmp_path / "b.json"))[0] == 0
    assert all(len(body["prompt"]) + body["max_tokens"] <= 64 for body in server.bodies)
    assert "input cut to 48" in read_bench(tmp_path / "b.json").workload


def test_fixed_lengths(fake_server: Callable[..., Any], shell: Shell) -> None:
    """Every request has the length asked for, at the trace's own times."""
    server = fake_server()
    code, _, err = shell("--url", server.url, "--input-tokens", "30", "--output-tokens", "3", "--requests", "4",
                         "--speed", "100")  # fmt: skip
    assert code == 0
    assert {(len(body["prompt"]), body["max_tokens"]) for body in server.bodies} == {(30, 3)}
    assert "azure-conv with input_tokens=30 with output_tokens=3[0:4] replayed at 100x speed" in err


def test_a_server_without_a_vocabulary_gets_words(fake_server: Callable[..., Any], shell: Shell) -> None:
    """A foreign server that states nothing is loaded with text, and the user is told."""
    server = fake_server(card={"id": "other"}, token_ids=False)
    code, _, err = shell("--url", server.url, *FAST, "--no-extensions")
    assert code == 0
    assert "prompts are words" in err
    assert all(isinstance(body["prompt"], str) and "ignore_eos" not in body for body in server.bodies)


def test_a_change_of_configuration_spoils_the_bench(
    fake_server: Callable[..., Any], shell: Shell, tmp_path: Path
) -> None:
    """A window across two configurations belongs to neither: it is thrown away, and nothing is written."""
    server = fake_server(generations=("abc", "def"))
    code, out, err = shell("--url", server.url, *FAST, "--out", str(tmp_path / "b.json"))
    assert (code, out) == (2, "")
    assert "changed during the bench, from abc to def" in err
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_dies_is_still_reported(fake_server: Callable[..., Any], shell: Shell, tmp_path: Path) -> None:
    """What was measured before the server went away is the result, and that it went away is said."""
    server = fake_server(models_answers=1, script=lambda index: "ok" if index < 5 else "connection")
    code, out, err = shell("--url", server.url, *FAST, "--out", str(tmp_path / "b.json"))
    assert code == 0
    assert "after the bench: " in err
    assert "7 failed: connection" in out
    assert read_bench(tmp_path / "b.json").completed == 5


def test_a_bench_without_an_answer_fails(fake_server: Callable[..., Any], shell: Shell) -> None:
    """When no request completes the table says so, the server's words are shown, and the exit code is 1."""
    code, out, _ = shell("--url", fake_server(script=lambda index: "http_400").url, *FAST)
    assert code == 1
    assert "0 of 12 requests completed" in out
    assert "12 failed: http_400" in out
    assert "told to: http_400" in out


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind(fake_server: Callable[..., Any], tmp_path: Path) -> None:
    """An interrupted bench ends at once with 130, writes no file, and the server sees its clients leave."""
    server = fake_server(script=lambda index: "timeout")
    args = (sys.executable, "-m", "flyball", "bench", "--url", server.url, *FAST, "--out", str(tmp_path / "b.json"))
    with subprocess.Popen(args, stderr=subprocess.PIPE, text=True) as bench:
        assert bench.stderr
        while len(server.bodies) < 12 and bench.poll() is None:
            time.sleep(0.01)
        bench.send_signal(signal.SIGINT)
        words = bench.stderr.read()
    assert bench.returncode == 130
    assert "Traceback" not in words
    assert server.sees_clients_leave()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_client_out_of_sockets_is_told(fake_server: Callable[..., Any]) -> None:
    """Requests that found no free socket in this process are the client's failures, and the result is not trusted."""
    server = fake_server(script=lambda index: "timeout")
    args = (sys.executable, "-m", "flyball", "bench", "--url", server.url, "--rate", "1000", "--requests", "60")
    limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (40, 40))
    bench = subprocess.run((*args, "--timeout", "2"), check=False, capture_output=True, text=True, preexec_fn=limit)
    assert bench.returncode == 1
    assert "failed: client_sockets" in bench.stdout
    assert "not trustworthy" in bench.stdout


MISTAKES = {
    "no server": (("--url", "http://127.0.0.1:1"), "no server answers at http://127.0.0.1:1"),
    "no address": (("--url", "nonsense"), "no server answers at nonsense"),
    "bad SLO": (("--slo", "p95_ttft"), "cannot read the SLO 'p95_ttft'"),
    "no folder": (("--out", "{tmp}/absent/b.json"), "cannot write {tmp}/absent/b.json"),
    "folder as file": (("--out", "{tmp}"), "it is a folder"),
    "no trace": (("--trace", "{tmp}/absent.csv"), "there is no trace file {tmp}/absent.csv"),
    "bad line": (("--trace", "{tmp}/bad.csv"), "{tmp}/bad.csv, line 2: input_tokens is 'x', but a whole number"),
    "rate and speed": (("--rate", "2", "--speed", "3"), "speed 3 scales a trace's own timing and rate 2 replaces it"),
    "negative rate": (("--rate", "-2"), "cannot arrive at -2 a second"),
    "no requests": (("--requests", "0"), "cannot send 0 requests"),
    "no time": (("--timeout", "0"), "cannot be given up after 0 s"),
    "another model": (("--model", "gpt"), "does not serve 'gpt'; it serves fake"),
    "too long": (("--max-input", "1000", "--max-output", "100"), "1000 tokens in and 100 out exceed the 1024"),
    "no length": (("--input-tokens", "0"), "input_tokens is 0"),
    "tiny vocabulary": (("--vocab-size", "3"), "vocabulary of 3 tokens is too small"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_sentence(
    fake_server: Callable[..., Any], shell: Shell, tmp_path: Path, mistake: str
) -> None:
    """What is wrong is said in one sentence with exit code 2, and no request is sent."""
    (tmp_path / "bad.csv").write_text("arrival_s,input_tokens,output_tokens\n0,x,1\n", encoding="utf-8")
    args, sentence = MISTAKES[mistake]
    server = fake_server()
    code, out, err = shell(*("--url", server.url), *(arg.format(tmp=tmp_path) for arg in args))
    assert (code, out) == (2, "")
    assert sentence.format(tmp=tmp_path) in err
    assert "Traceback" not in err
    assert server.bodies == []


@pytest.mark.parametrize("card", [{}, {"id": None}])
def test_a_server_that_lists_no_model(fake_server: Callable[..., Any], shell: Shell, card: dict[str, Any]) -> None:
    """An address where no model is served is refused."""
    code, _, err = shell("--url", fake_server(card=card).url, *FAST)
    assert code == 2
    assert "lists no model" in err


def test_save_requests_keeps_every_time(fake_server: Callable[..., Any], shell: Shell, tmp_path: Path) -> None:
    """On request the file holds each request's schedule and token times, as plain numbers."""
    path = tmp_path / "b.json"
    assert shell("--url", fake_server().url, *FAST, "--save-requests", "--out", str(path))[0] == 0
    traces = json.loads(path.read_text(encoding="utf-8"))["traces"]
    assert len(traces) == 12
    assert all(len(trace["token_times_s"]) == trace["output_tokens"] for trace in traces)
