"""Bench files: what is written is read back, and nothing is ever half written."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyball.adapters.bench_files import BenchResult, check_writable, from_json, read_bench, to_json, write_bench
from flyball.core.errors import InvalidInput
from flyball.core.metrics import MetricsWindow, RequestTrace
from flyball.core.slo import Slo


def _trace(at_s: float, *gaps_s: float, error: str | None = None) -> RequestTrace:
    times = [at_s + 0.1]
    for gap_s in gaps_s:
        times.append(times[-1] + gap_s)
    return RequestTrace(
        scheduled_s=at_s,
        sent_s=at_s,
        input_tokens=int(10 * (at_s + 1)),
        output_tokens=len(times) * (error is None),
        token_times_s=() if error else tuple(times),
        error=error,
    )


def _result(*traces: RequestTrace, duration_s: float = 4.0, **settings: Any) -> BenchResult:
    window = MetricsWindow(duration_s=duration_s, generation="g1", traces=traces, slo=Slo(ttft_s=0.5, tpot_s=0.2))
    given = {
        "configuration": {"max_num_seqs": 8, "chunked": True, "policy": "fcfs"},
        "model": "tiny",
        "url": "http://127.0.0.1:8000",
        "workload": "by hand",
        "slo": ("p95_ttft<=500ms",),
        "seed": 1,
        "prompt_seed": 2,
        "client_bound": False,
    }
    return BenchResult.of(window, **(given | settings))


def test_the_arithmetic_of_a_window() -> None:
    """Four requests, one failed, one too slow: every figure as worked out by hand."""
    seen = _result(_trace(0), _trace(1, 0.1, 0.1), _trace(2, 0.3, 0.3), _trace(3, error="http_500"))
    assert (seen.requests, seen.completed, seen.errors) == (4, 3, {"http_500": 1})
    assert (seen.arrival_rps, seen.throughput_rps) == (1.0, 0.75)
    assert seen.attainment == 0.5  # the third is slower than .2 s a token, the fourth failed
    assert seen.goodput_rps == 0.5
    assert seen.output_tps == pytest.approx((1 + 3 + 3) / 4)
    assert (seen.mean_input_tokens, seen.mean_output_tokens) == (20, pytest.approx(7 / 3))
    assert seen.mean_concurrency == pytest.approx((0.1 + 0.3 + 0.7) / 4)
    assert (seen.itl_s.count, seen.itl_s.mean) == (4, pytest.approx(0.2))
    assert (seen.tpot_s.count, seen.tpot_s.max) == (2, pytest.approx(0.3))
    assert seen.lag_s.max == 0


@given(
    traces=st.lists(
        st.builds(
            _trace,
            st.floats(0, 100),
            st.floats(0, 1),
            error=st.sampled_from([None, "timeout", "http_429"]),
        ),
        min_size=1,
        max_size=8,
    ),
    keep=st.booleans(),
)
def test_what_is_written_is_read_back(traces: list[RequestTrace], keep: bool) -> None:
    """A result survives JSON, not-a-numbers included, with and without its traces."""
    before = _result(*sorted(traces, key=lambda t: t.scheduled_s), keep_traces=keep)
    text = to_json(before)
    after = from_json(text, "here")
    assert to_json(after) == text
    assert after.traces == before.traces
    assert {f.name for f in fields(before)} | {"schema"} - (set() if keep else {"traces"}) >= json.loads(text).keys()


def test_the_file_is_plain_json(tmp_path: Path) -> None:
    """Any JSON reader takes it: the schema comes first, and what could not be measured is null."""
    write_bench(tmp_path / "b.json", _result(_trace(0, error="timeout")))
    body = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert next(iter(body)) == "schema"
    assert body["schema"] == "flyball.bench/1"
    assert body["ttft_s"] == {"count": 0, "mean": None, "p50": None, "p90": None, "p95": None, "p99": None, "max": None}
    assert "traces" not in body
    assert math.isnan(read_bench(tmp_path / "b.json").ttft_s.p95)
    assert [p.name for p in tmp_path.iterdir()] == ["b.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    """What is at the path stays whole when the new result cannot be encoded, and no leftover lies beside it."""
    path = tmp_path / "b.json"
    write_bench(path, _result(_trace(0)))
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_bench(path, replace(_result(_trace(0)), model=object()))  # type: ignore[arg-type]
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["b.json"]


@pytest.mark.parametrize("use", [check_writable, lambda path: write_bench(path, _result(_trace(0)))])
def test_an_unwritable_place_is_named(tmp_path: Path, use: Any) -> None:
    """A missing folder, or a file where a folder is needed, is said to be so."""
    (tmp_path / "file").touch()
    for place in (tmp_path / "absent" / "b.json", tmp_path / "file" / "b.json", tmp_path):
        with pytest.raises(InvalidInput, match=r"cannot write .*; give"):
            use(place)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not a flyball.bench/1 file"),
        ("[]", "is not a flyball.bench/1 file"),
        ('{"schema": "flyball.bench/2"}', "is not a flyball.bench/1 file"),
        ('{"schema": "flyball.bench/1"}', "is damaged"),
        ('{"schema": "flyball.bench/1", "surprise": 1}', "is damaged"),
        ('{"schema": "flyball.bench/1", "ttft_s": {"p50": 1}}', "is damaged"),
    ],
)
def test_a_file_that_is_none_of_ours(tmp_path: Path, text: str, sentence: str) -> None:
    """A file that cannot be read as a result is refused by name."""
    path = tmp_path / "b.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidInput, match=sentence) as error:
        read_bench(path)
    assert str(path) in str(error.value)
    with pytest.raises(InvalidInput, match="cannot read the bench file"):
        read_bench(tmp_path / "absent.json")
