"""Traces are read exactly, cut and scaled as asked, and a bad line is named."""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyball.adapters.traces import BUNDLED, Lengths, poisson, read_trace, recorded, trace_path
from flyball.core.errors import InvalidInput
from flyball.core.workload import RequestSpec

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""


def _write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def _triples(requests: tuple[RequestSpec, ...]) -> list[tuple[float, int, int]]:
    return [(round(r.arrival_s, 6), r.input_tokens, r.output_tokens) for r in requests]


READABLE = {
    "azure.csv": AZURE,
    "azure-crlf.csv": AZURE.replace("\n", "\r\n"),
    "azure-2024.csv": AZURE.replace("90,", "90+00:00,"),
    "azure.csv.gz": AZURE,
    "own.csv": "arrival_s,input_tokens,output_tokens\n10.5,374,44\n14.814579,396,109\n\n",
    "own-unsorted.csv": "arrival_s,input_tokens,output_tokens\n14.814579,396,109\n10.5,374,44\n",
    "own-floats.csv": "output_tokens,input_tokens,arrival_s,note\n44.0,374.0,10.5,x\n109,396,14.814579,y\n",
    "own.jsonl": '{"arrival_s": 10.5, "input_tokens": 374, "output_tokens": 44}\n\n'
    '{"arrival_s": 14.814579, "input_tokens": 396, "output_tokens": 109}\n',
    "mooncake.jsonl.gz": '{"timestamp": 10500, "input_length": 374, "output_length": 44, "hash_ids": [0]}\n'
    '{"timestamp": 14814.579, "input_length": 396, "output_length": 109, "hash_ids": [0, 3]}\n',
}


@pytest.mark.parametrize("name", READABLE)
def test_every_format_reads_alike(tmp_path: Path, name: str) -> None:
    """The same two requests come out of every format, in order, the first at 0 s."""
    assert _triples(read_trace(_write(tmp_path, name, READABLE[name]))) == [(0.0, 374, 44), (4.314579, 396, 109)]


def test_prefix_ids_are_kept(tmp_path: Path) -> None:
    """Shared prefixes of a Mooncake trace, or of our own in either form, arrive as ids of 512 tokens each."""
    own = "arrival_s,input_tokens,output_tokens,prefix_ids\n0,600,1,7 8\n"
    for name, text in (("m.jsonl.gz", READABLE["mooncake.jsonl.gz"]), ("own.csv", own)):
        last = read_trace(_write(tmp_path, name, text))[-1]
        assert (last.prefix_ids, last.prefix_tokens) == ((0, 3) if name.startswith("m") else (7, 8), 512)


@pytest.mark.parametrize(
    ("name", "rows", "tokens"), [("azure-conv", 2000, (2209565, 529807)), ("azure-code", 1000, (2122354, 27621))]
)
def test_bundled_traces_are_whole(name: str, rows: int, tokens: tuple[int, int]) -> None:
    """The slices that ship with the package hold every token of the original's first rows (summed there with awk)."""
    requests = read_trace(trace_path(name))
    assert len(requests) == rows
    assert (sum(r.input_tokens for r in requests), sum(r.output_tokens for r in requests)) == tokens
    attribution = (trace_path(name).parent / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert BUNDLED[name] in attribution
    assert "CC-BY 4.0" in attribution


HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
TIME = "2023-11-16 18:15:46.6805900"
BAD = {
    "letters": (HEADER + f"{TIME},12,5\n{TIME},twelve,5\n", "line 3: ContextTokens is 'twelve', but a whole number"),
    "nothing asked": (HEADER + f"{TIME},12,0\n", "line 2: GeneratedTokens is '0', but a whole number of at least 1"),
    "half a token": (HEADER + f"{TIME},12.5,1\n", "line 2: ContextTokens is '12.5', but a whole number"),
    "not a number": (HEADER + f"{TIME},nan,1\n", "line 2: ContextTokens is 'nan', but a whole number"),
    "endless": (HEADER + f"{TIME},inf,1\n", "line 2: ContextTokens is 'inf', but a whole number"),
    "no time": (HEADER + "yesterday,12,5\n", "line 2: TIMESTAMP is 'yesterday', but a time like 2023-11-16"),
    "a column short": (HEADER + f"{TIME},12\n", "line 2: found 2 columns where the header has 3"),
    "other columns": ("when,in,out\n1,2,3\n", "line 1: found the columns when,in,out; needed are TIMESTAMP,"),
    "only a header": (HEADER, "holds no request"),
    "empty": ("", "holds no request"),
    "endless time": ("arrival_s,input_tokens,output_tokens\ninf,1,1\n", "arrival_s is 'inf', but a number of seconds"),
    "bad ids": ("arrival_s,input_tokens,output_tokens,prefix_ids\n0,1,1,4 x\n", "prefix_ids is [4, 'x'], but a list"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_csv_line_is_named(tmp_path: Path, case: str) -> None:
    """File, line, what was found and what is needed: one sentence, whatever is wrong."""
    text, sentence = BAD[case]
    path = _write(tmp_path, "trace.csv", text)
    with pytest.raises(InvalidInput) as error:
        read_trace(path)
    assert sentence in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


BAD_JSON = {
    "torn": ('{"timestamp": 0, "input_le', 'line 1: found \'{"timestamp": 0, "input_le\', but a JSON object is needed'),
    "a list": ("[1, 2]", "line 1: found '[1, 2]', but a JSON object"),
    "a later gap": (
        '{"timestamp": 0, "input_length": 1, "output_length": 1}\n{"timestamp": 0, "input_length": 1}',
        "line 2: output_length is None, but a whole number",
    ),
    "true": ('{"timestamp": 0, "input_length": true, "output_length": 1}', "input_length is True, but a whole number"),
    "ids": (
        '{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [1.5]}',
        "line 1: hash_ids is [1.5], but a list of whole numbers",
    ),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_a_bad_json_line_is_named(tmp_path: Path, case: str) -> None:
    """The same holds for JSONL."""
    text, sentence = BAD_JSON[case]
    with pytest.raises(InvalidInput) as error:
        read_trace(_write(tmp_path, "trace.jsonl", text))
    assert sentence in str(error.value)


def test_what_is_no_trace_file(tmp_path: Path) -> None:
    """A file that is absent, a folder, no text, or torn in its compression is said to be so."""
    with pytest.raises(InvalidInput, match=r"there is no trace file .*absent.csv; give .* or azure-conv or azure-code"):
        read_trace(tmp_path / "absent.csv")
    with pytest.raises(InvalidInput, match="cannot read the trace"):
        read_trace(tmp_path)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInput, match="in UTF-8"):
        read_trace(tmp_path / "binary.csv")
    (tmp_path / "torn.csv.gz").write_bytes(gzip.compress(AZURE.encode())[:-12])
    with pytest.raises(InvalidInput, match="cannot read the trace"):
        read_trace(tmp_path / "torn.csv.gz")


ROWS = tuple(RequestSpec(arrival_s=i * 2.0, input_tokens=100 * (i + 1), output_tokens=10 * (i + 1)) for i in range(10))


def test_replay_takes_its_slice_at_its_speed() -> None:
    """Rows, timing and what was done to them come out as asked, and the source says it."""
    load = recorded(
        ROWS, name="t", start=2, count=5, speed=4, lengths=Lengths(scale=0.5, max_input=200, max_output=1000)
    )
    assert _triples(load.requests) == [(0.0, 150, 15), (0.5, 200, 20), (1.0, 200, 25), (1.5, 200, 30), (2.0, 200, 35)]
    assert (
        load.source
        == "t[2:7] replayed at 4x speed, lengths x0.5, input cut to 200 (3 of 5), output cut to 1000 (0 of 5)"
    )


def test_duration_counts_sending_time() -> None:
    """A duration ends the slice after the speed-up, not in the trace's own time."""
    assert len(recorded(ROWS, name="t", duration_s=3.0, speed=2.0).requests) == 4
    assert (
        recorded(ROWS, name="t", duration_s=3.0, speed=2.0).source == "t[0:4] replayed at 2x speed, lengths as recorded"
    )


@given(scale=st.floats(0.001, 10), limit=st.integers(1, 500), tokens=st.integers(1, 10_000))
def test_lengths_stay_within_limits(scale: float, limit: int, tokens: int) -> None:
    """However a request is resized, at least one token stays and no limit is passed."""
    request = RequestSpec(arrival_s=0, input_tokens=tokens, output_tokens=tokens)
    sized = Lengths(scale=scale, max_input=limit, max_output=limit).apply(request)
    for length in (sized.input_tokens, sized.output_tokens):
        assert 1 <= length <= limit
        assert length == limit or abs(length - tokens * scale) <= 1


def test_scaling_keeps_prefixes_shared() -> None:
    """When lengths shrink, so does what one prefix id stands for, or requests would share more than they did."""
    request = RequestSpec(arrival_s=0, input_tokens=2048, output_tokens=8, prefix_ids=(1, 2))
    assert Lengths(scale=0.25).apply(request).prefix_tokens == 128


def test_poisson_arrivals_are_poisson() -> None:
    """Gaps have mean and spread of an exponential distribution within five standard errors, and follow the seed."""
    loads = [poisson(ROWS, name="t", rate_rps=4.0, seed=seed, count=4000) for seed in (3, 3, 4)]
    assert loads[0] == loads[1]
    assert loads[0].requests != loads[2].requests
    gaps = np.diff([0.0] + [r.arrival_s for r in loads[0].requests])
    assert gaps.mean() == pytest.approx(0.25, abs=5 * 0.25 / math.sqrt(4000))
    assert gaps.std() == pytest.approx(0.25, abs=5 * 0.25 * math.sqrt(2 / 4000))


def test_poisson_lengths_come_from_the_trace() -> None:
    """Lengths follow the trace's rows from the start row on, and begin again where the rows end."""
    load = poisson(ROWS, name="t", rate_rps=1.0, seed=0, start=8, count=4, lengths=Lengths(max_input=950))
    assert [r.input_tokens for r in load.requests] == [900, 950, 900, 950]
    assert load.source == "Poisson at 1/s, seed 0, 4 requests of t from row 8, input cut to 950 (2 of 4)"


@given(rate=st.floats(0.5, 50), duration_s=st.floats(5, 20), seed=st.integers(0, 100))
def test_poisson_keeps_to_its_duration(rate: float, duration_s: float, seed: int) -> None:
    """No request arrives after the end, and a count ends the load sooner."""
    load = poisson(ROWS, name="t", rate_rps=rate, seed=seed, duration_s=duration_s)
    assert load.duration_s <= duration_s
    short = poisson(ROWS, name="t", rate_rps=rate, seed=seed, duration_s=duration_s, count=1)
    assert short.requests == load.requests[:1]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: recorded(ROWS, name="t", speed=0), "cannot be replayed at speed 0"),
        (lambda: recorded(ROWS, name="t", speed=math.nan), "cannot be replayed at speed nan"),
        (lambda: recorded(ROWS, name="t", start=10), "t has 10 rows, so none from row 10"),
        (lambda: recorded(ROWS, name="t", start=-1), "none from row -1"),
        (lambda: recorded(ROWS, name="t", count=0), "cannot send 0 requests"),
        (lambda: recorded(ROWS, name="t", duration_s=-1), "cannot send for -1 s"),
        (lambda: poisson(ROWS, name="t", rate_rps=-2, seed=0, count=1), "cannot arrive at -2 a second"),
        (lambda: poisson(ROWS, name="t", rate_rps=2, seed=0), "give a number of requests or a duration"),
        (lambda: poisson(ROWS, name="t", rate_rps=1e-9, seed=0, duration_s=1), "no request arrives within 1 s"),
        (lambda: Lengths(scale=0), "cannot be scaled by 0"),
        (lambda: Lengths(max_output=0), "max_output is 0"),
    ],
)
def test_an_impossible_load_is_refused(make: Callable[[], object], sentence: str) -> None:
    """What cannot be sent is refused in one sentence before anything is."""
    with pytest.raises(InvalidInput) as error:
        make()
    assert sentence in str(error.value)
