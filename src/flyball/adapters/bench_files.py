"""The result of one bench as a JSON file, schema `flyball.bench/1`; what cannot be measured is null."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from flyball import __version__
from flyball.core.errors import InvalidInput
from flyball.core.knobs import Value
from flyball.core.metrics import MetricsWindow, RequestTrace, Summary

SCHEMA = "flyball.bench/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """What was sent, what came back, under which configuration; seconds, tokens, requests per second.

    Lengths, latencies and throughput are of completed requests; attainment and goodput count all of them.
    """

    generation: str
    configuration: Mapping[str, Value]
    model: str
    url: str
    workload: str  # the workload's source
    seed: int  # of arrivals
    prompt_seed: int
    duration_s: float
    requests: int
    completed: int
    arrival_rps: float
    throughput_rps: float
    output_tps: float
    mean_input_tokens: float
    mean_output_tokens: float
    mean_concurrency: float  # requests in the server at a time, on average (Little's law over the window)
    ttft_s: Summary
    tpot_s: Summary
    itl_s: Summary
    e2e_s: Summary
    slo: tuple[str, ...]
    attainment: float
    goodput_rps: float
    errors: Mapping[str, int]
    lag_s: Summary
    client_bound: bool
    flyball_version: str = __version__
    traces: tuple[RequestTrace, ...] | None = field(default=None, repr=False)  # one a request, if they were kept

    @classmethod
    def of(
        cls,
        window: MetricsWindow,
        *,
        configuration: Mapping[str, Value],
        model: str,
        url: str,
        workload: str,
        slo: tuple[str, ...],
        seed: int,
        prompt_seed: int,
        client_bound: bool,
        keep_traces: bool = False,
    ) -> Self:
        """Sum up a window."""
        done = window.completed
        span_s = window.traces[-1].scheduled_s - window.traces[0].scheduled_s
        busy_s = sum(t.token_times_s[-1] - t.sent_s for t in window.traces if t.token_times_s)
        return cls(
            generation=window.generation,
            configuration=dict(configuration),
            model=model,
            url=url,
            workload=workload,
            seed=seed,
            prompt_seed=prompt_seed,
            duration_s=window.duration_s,
            requests=len(window.traces),
            completed=len(done),
            arrival_rps=(len(window.traces) - 1) / span_s if span_s else math.nan,
            throughput_rps=window.throughput_rps,
            output_tps=window.output_tps,
            mean_input_tokens=sum(t.input_tokens for t in done) / len(done) if done else math.nan,
            mean_output_tokens=sum(t.output_tokens for t in done) / len(done) if done else math.nan,
            mean_concurrency=busy_s / window.duration_s,
            ttft_s=window.summary("ttft"),
            tpot_s=window.summary("tpot"),
            itl_s=window.summary("itl"),
            e2e_s=window.summary("e2e"),
            slo=slo,
            attainment=window.attainment,
            goodput_rps=window.goodput_rps,
            errors=window.errors,
            lag_s=Summary.of([t.lag_s for t in window.traces]),
            client_bound=client_bound,
            traces=window.traces if keep_traces else None,
        )


def to_json(result: BenchResult) -> str:
    """The result as JSON text."""
    body = {"schema": SCHEMA} | asdict(result)
    indent = None  # with traces a number a line would be a very long file
    if result.traces is None:
        del body["traces"]
        indent = 1
    return json.dumps(_finite(body), indent=indent, allow_nan=False) + "\n"


def from_json(text: str, origin: str) -> BenchResult:
    """Read a result back; `origin` names it in an error."""
    try:
        body = json.loads(text)
        schema = body.pop("schema")
    except (ValueError, AttributeError, KeyError, TypeError):
        schema = None
    if schema != SCHEMA:
        raise InvalidInput(f"{origin} is not a {SCHEMA} file; give one that `flyball bench --out` wrote")
    try:
        return _result(body)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(
            f"{origin} is damaged ({type(error).__name__}: {error}); write it again with `flyball bench --out`"
        ) from None


def read_bench(path: Path) -> BenchResult:
    """Read a result file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(
            f"cannot read the bench file {path} ({error}); give one that `flyball bench` wrote"
        ) from None
    return from_json(text, str(path))


def write_bench(path: Path, result: BenchResult) -> None:
    """Write a result file: wholly, or not at all."""
    text = to_json(result)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _unwritable(path, error) from None


def check_writable(path: Path) -> None:
    """Raise now what writing would raise after the bench."""
    if path.is_dir():
        raise InvalidInput(f"cannot write {path}: it is a folder; give the name of a file in it")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> InvalidInput:
    reason = error.strerror or type(error).__name__
    return InvalidInput(f"cannot write {path} ({reason}); give a file in a folder that exists and may be written to")


def _finite(value: object) -> object:
    """The same with null for what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _result(body: dict[str, Any]) -> BenchResult:
    known = {f.name: f.type for f in fields(BenchResult)}
    values: dict[str, Any] = {}
    for name, value in body.items():
        match known[name]:
            case "Summary":
                numbers: dict[str, Any] = {key: math.nan if item is None else item for key, item in value.items()}
                values[name] = Summary(**numbers)
            case "float":
                values[name] = math.nan if value is None else float(value)
            case _:
                values[name] = value
    values["slo"] = tuple(values["slo"])
    if values.get("traces") is not None:
        values["traces"] = tuple(
            RequestTrace(**(trace | {"token_times_s": tuple(trace["token_times_s"])})) for trace in values["traces"]
        )
    return BenchResult(**values)
