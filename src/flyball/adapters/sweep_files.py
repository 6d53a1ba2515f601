"""Sweeps that others measured, as operating points to fit: llm-inferno's data sets, and GuideLLM's reports.

Six forms: model-trainer's JSON (`data`); of GuideLLM its JSON (`benchmarks`), its HTML, its CSV with one heading row
(until 0.3) or three (from 0.4 on), and rows of the former as a JSON list. All count in milliseconds, tokens, requests
per second. Of GuideLLM's strategies `throughput` is left out: it sends all at once, which is no rate. Like
model-trainer, TTFT is the median and the rest are means. An HTML report tells lengths for all of its strategies
together, and not their names: the second of a sweep is `throughput`.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flyball.adapters.fields import Fields
from flyball.core.errors import InvalidInput
from flyball.performance.fit import OperatingPoint
from flyball.performance.queueing import DEFAULT_STEP_TOKENS

_MS = 1e-3
_THROUGHPUT = "throughput"
_COLUMNS = {  # of GuideLLM's CSV
    "rate": "Successful Requests per second mean",
    "input": "Successful Prompt token count mean",
    "output": "Successful Output token count mean",
    "ttft": "Successful Time to first token ms median",
    "itl": "Successful Inter token latency ms mean",
}
_HEADINGS = {  # of its CSV with three heading rows -> that with one
    ("Benchmark", "Strategy", ""): "Name",
    ("Server Throughput", "Successful Requests/Sec", "Mean"): _COLUMNS["rate"],
    ("Token Metrics", "Successful Input Tokens", "Mean"): _COLUMNS["input"],
    ("Token Metrics", "Successful Output Tokens", "Mean"): _COLUMNS["output"],
    ("Time to First Token", "Successful ms", "Median"): _COLUMNS["ttft"],
    ("Inter Token Latency", "Successful ms", "Mean"): _COLUMNS["itl"],
}


def is_sweep(path: Path) -> bool:
    """Whether a file has one of these forms."""
    if path.suffix.lower() in {".csv", ".html", ".htm"}:
        return True
    try:
        body = _load(path)
    except InvalidInput:
        return False
    return isinstance(body, list) or (isinstance(body, dict) and ("benchmarks" in body or "data" in body))


def read_sweep(path: Path, *, max_batch: int) -> list[OperatingPoint]:
    """The points of a sweep; `max_batch` is the server's limit where the file does not tell."""
    form = path.suffix.lower()
    if form in {".html", ".htm"}:
        return _found(_html(_text(path), str(path), max_batch), str(path))
    return sweep_points(_csv(path) if form == ".csv" else _load(path), str(path), max_batch=max_batch)


def sweep_points(body: object, path: str, *, max_batch: int) -> list[OperatingPoint]:
    """The points in what a sweep's JSON says, or a CSV's rows; `path` stands for it in complaints."""
    if isinstance(body, list):
        points = _rows(body, path, max_batch)
    elif isinstance(body, dict) and "benchmarks" in body:
        points = _guidellm(Fields(body, path), max_batch)
    else:
        points = _data_set(Fields(body, path), max_batch)
    return _found(points, path)


def _found(points: Iterator[OperatingPoint], path: str) -> list[OperatingPoint]:
    found = list(points)
    if not found:
        raise InvalidInput(f"{path} has no point at a rate; give a sweep with constant rates")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror or error}; give a file that exists") from None
    except UnicodeDecodeError:
        raise InvalidInput(f"{path} is not a text file; give a report in UTF-8") from None


def _load(path: Path) -> object:
    text = _text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path} is not valid JSON ({error}); correct or complete it") from None


def _csv(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV file, with numbers where a cell of a column we use is one."""
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            table = list(csv.reader(lines))
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror or error}; give a file that exists") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidInput(f"{path} is not valid CSV ({error}); give GuideLLM's report in UTF-8") from None
    rows = _named_rows(table)
    for row in rows:
        for column in _COLUMNS.values():
            try:
                row[column] = float(row[column])
            except (KeyError, TypeError, ValueError):
                raise InvalidInput(f"{path} has a row without a number in column {column!r}; correct it") from None
    return rows


def _named_rows(table: list[list[str]]) -> list[dict[str, Any]]:
    """Rows by column, as the form with one heading row names them."""
    if len(table) < 2:
        return []
    if "Run Info" not in table[0]:
        return [dict(zip(table[0], row, strict=False)) for row in table[1:]]
    headings = [_HEADINGS.get(parts, "") for parts in zip(*table[:3], strict=False)]
    return [{name: cell for name, cell in zip(headings, row, strict=False) if name} for row in table[3:]]


def _html(text: str, path: str, max_batch: int) -> Iterator[OperatingPoint]:
    """The numbers that a report's script holds."""
    details = Fields(_assigned(text, "window.workloadDetails", path), f"{path}: window.workloadDetails")

    def mean(of: str) -> float:
        return details.inside(of).inside("tokenDistributions").inside("statistics").number("mean", None)

    lengths = {"input": mean("prompts"), "output": mean("generations")}
    for index, body in enumerate(_list(_assigned(text, "window.benchmarks", path), path)):
        f = Fields(body, f"{path}: window.benchmarks[{index}]")
        if index != 1:
            seen = {"ttft": f.inside("ttft").number("median", None), "itl": f.inside("itl").number("mean", None)}
            yield _point({"rate": f.number("requestsPerSecond", None), **lengths, **seen}, max_batch)


def _assigned(text: str, name: str, path: str) -> object:
    """The JSON that a script gives a name to."""
    found = re.search(re.escape(name) + r"\s*=\s*", text)
    if found is None:
        raise InvalidInput(f"{path} has no {name}; give the HTML report of a GuideLLM sweep")
    try:
        value: object = json.JSONDecoder().raw_decode(text, found.end())[0]
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}: {name} is not valid JSON ({error}); give a whole report") from None
    return value


def _list(value: object, path: str) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidInput(f"{path}: window.benchmarks is no list; give the HTML report of a GuideLLM sweep")
    return value


def _rows(rows: list[Any], path: str, max_batch: int) -> Iterator[OperatingPoint]:
    for index, row in enumerate(rows):
        f = Fields(row, f"{path}[{index}]")
        if f.text("Name") != _THROUGHPUT:
            values = {name: f.number(column, None) for name, column in _COLUMNS.items()}
            yield _point(values, max_batch)


def _guidellm(f: Fields, max_batch: int) -> Iterator[OperatingPoint]:
    for benchmark in f.each("benchmarks"):
        if benchmark.inside("args").inside("strategy").text("type_") == _THROUGHPUT:
            continue
        metrics = benchmark.inside("metrics")

        def seen(name: str, of: str = "mean", metrics: Fields = metrics) -> float:
            return metrics.inside(name).inside("successful").number(of, None)

        values = {
            "rate": seen("requests_per_second"),
            "input": seen("prompt_token_count"),
            "output": seen("output_token_count"),
            "ttft": seen("time_to_first_token_ms", "median"),
            "itl": seen("inter_token_latency_ms"),
        }
        yield _point(values, max_batch)


def _data_set(f: Fields, max_batch: int) -> Iterator[OperatingPoint]:
    for row in f.each("data"):
        values = {
            "rate": row.number("requestRate", None),
            "input": row.number("inputTokens", None),
            "output": row.number("outputTokens", None),
            "ttft": row.number("avgTTFTTime") or row.number("avgWaitTime") + row.number("avgPrefillTime"),
            "itl": row.number("avgITLTime", None),
        }
        yield _point(values, row.whole("maxBatchSize") or max_batch, row.whole("maxNumTokens"))


def _point(values: dict[str, float], max_batch: int, step_tokens: int = 0) -> OperatingPoint:
    return OperatingPoint(
        arrival_rps=values["rate"],
        input_tokens=values["input"],
        output_tokens=values["output"],
        max_batch=max_batch,
        max_queue=max_batch,  # as model-trainer takes it
        max_step_tokens=step_tokens or DEFAULT_STEP_TOKENS,
        ttft_s=values["ttft"] * _MS,
        itl_s=values["itl"] * _MS,
    )
