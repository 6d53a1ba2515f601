"""Load from real traffic: traces read, cut and brought to a model's size; generated arrivals with a trace's lengths.

A trace is CSV (with a header) or JSONL, gzipped if its name ends in .gz, with the columns of one of these:

    Azure Public Dataset   TIMESTAMP, ContextTokens, GeneratedTokens           (TIMESTAMP: date and time)
    our own                arrival_s, input_tokens, output_tokens[, prefix_ids] (seconds)
    Mooncake               timestamp, input_length, output_length[, hash_ids]   (milliseconds; an id is 512 tokens)

Rows are put in order of arrival and the first arrives at 0 s. What is done to a trace is written into the workload's
`source`, so that a result says which load it was measured under.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import resources
from itertools import cycle, islice
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from flyball.adapters.arrivals import POISSON, Arrivals
from flyball.core.errors import InvalidInput
from flyball.core.workload import RequestSpec, Workload

BUNDLED: Mapping[str, str] = {"azure-conv": "azure_conv_slice.csv", "azure-code": "azure_code_slice.csv"}


def _datetime_s(value: object) -> float:
    moment = datetime.fromisoformat(str(value))
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _seconds(value: object) -> float:
    return float(str(value))


def _milliseconds(value: object) -> float:
    return float(str(value)) / 1e3


class _Columns(NamedTuple):
    """The names one format gives to what we read."""

    time: str
    input_tokens: str
    output_tokens: str
    prefix_ids: str
    to_seconds: Callable[[object], float]
    time_form: str  # what a time must look like, for a person

    @property
    def needed(self) -> tuple[str, str, str]:
        return self.time, self.input_tokens, self.output_tokens


_FORMATS = (
    _Columns("TIMESTAMP", "ContextTokens", "GeneratedTokens", "", _datetime_s, "a time like 2023-11-16 18:15:46.680"),
    _Columns("arrival_s", "input_tokens", "output_tokens", "prefix_ids", _seconds, "a number of seconds"),
    _Columns("timestamp", "input_length", "output_length", "hash_ids", _milliseconds, "a number of milliseconds"),
)


class _BadField(ValueError):
    """What is wrong with one row; the reader adds file and line."""


def trace_path(name: str) -> Path:
    """The file behind a name: a bundled trace (`azure-conv`, `azure-code`), or a path."""
    if name in BUNDLED:
        return Path(str(resources.files("flyball") / "data" / BUNDLED[name]))
    return Path(name)


def read_trace(path: Path) -> tuple[RequestSpec, ...]:
    """Every request of a trace file in order of arrival, the first at 0 s; the first bad line raises InvalidInput."""
    rows = sorted(((time_s, spec) for _, time_s, spec in _rows(path)), key=lambda row: row[0])
    if not rows:
        raise _empty(path)
    origin_s = rows[0][0]
    return tuple(replace(spec, arrival_s=time_s - origin_s) for time_s, spec in rows)


def stream_trace(path: Path) -> Iterator[RequestSpec]:
    """The same one by one, in no more memory than a request takes; rows must be in order of arrival already."""
    origin_s = last_s = math.nan
    for line, time_s, spec in _rows(path):
        if math.isnan(origin_s):
            origin_s = last_s = time_s
        if time_s < last_s:
            raise InvalidInput(f"{path}, line {line}: it arrives before the row above it; sort the trace by time")
        last_s = time_s
        yield replace(spec, arrival_s=time_s - origin_s)
    if math.isnan(origin_s):
        raise _empty(path)


def _empty(path: Path) -> InvalidInput:
    return InvalidInput(f"the trace {path} holds no request; it needs a header and at least one row")


def _rows(path: Path) -> Iterator[tuple[int, float, RequestSpec]]:
    """Line, time and request of each row, as they stand."""
    try:
        with _open(path) as file:
            records = _json_records(file, path) if ".jsonl" in path.suffixes else _csv_records(file, path)
            columns: _Columns | None = None
            for line, record in records:
                columns = columns or _columns(record, path, line)
                try:
                    yield line, *_row(record, columns)
                except _BadField as error:
                    raise InvalidInput(f"{path}, line {line}: {error}; correct or remove the line") from None
    except FileNotFoundError:
        names = " or ".join(BUNDLED)
        raise InvalidInput(f"there is no trace file {path}; give a CSV or JSONL file, or {names}") from None
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise InvalidInput(f"cannot read the trace {path} ({error}); give a CSV or JSONL file in UTF-8") from None


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8-sig", newline="")


def _csv_records(file: IO[str], path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    reader = csv.reader(file)
    header = [name.strip() for name in next(reader, [])]
    if header:  # checked here, so that a file with a wrong header and no rows is named too
        _columns(dict.fromkeys(header), path, 1)
    for cells in reader:
        if not cells:
            continue
        if len(cells) != len(header):
            raise InvalidInput(
                f"{path}, line {reader.line_num}: found {len(cells)} columns where the header has {len(header)}; "
                "correct or remove the line"
            )
        yield reader.line_num, dict(zip(header, cells, strict=True))


def _json_records(file: IO[str], path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise InvalidInput(
                f"{path}, line {number}: found {line.strip()[:60]!r}, but a JSON object is needed; "
                "correct or remove the line"
            )
        yield number, record


def _columns(record: Mapping[str, object], path: Path, line: int) -> _Columns:
    for columns in _FORMATS:
        if all(name in record for name in columns.needed):
            return columns
    wanted = " or ".join(",".join(columns.needed) for columns in _FORMATS)
    raise InvalidInput(f"{path}, line {line}: found the columns {','.join(record)}; needed are {wanted}")


def _row(record: Mapping[str, object], columns: _Columns) -> tuple[float, RequestSpec]:
    time = record.get(columns.time)
    try:
        time_s = columns.to_seconds(time)
    except ValueError:
        time_s = math.nan
    if not math.isfinite(time_s):
        raise _BadField(f"{columns.time} is {time!r}, but {columns.time_form} is needed")
    spec = RequestSpec(
        arrival_s=0.0,  # set once the earliest row is known
        input_tokens=_tokens(record, columns.input_tokens),
        output_tokens=_tokens(record, columns.output_tokens),
        prefix_ids=_prefix_ids(record, columns.prefix_ids),
    )
    return time_s, spec


def _tokens(record: Mapping[str, object], name: str) -> int:
    value = record.get(name)
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if not (number >= 1 and number.is_integer()):
        raise _BadField(f"{name} is {value!r}, but a whole number of at least 1 is needed")
    return int(number)


def _prefix_ids(record: Mapping[str, object], name: str) -> tuple[int, ...]:
    value = record.get(name, [])
    if isinstance(value, str):  # in CSV: ids with spaces between
        value = [int(word) if word.isdecimal() else word for word in value.split()]
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise _BadField(f"{name} is {value!r}, but a list of whole numbers of at least 0 is needed")
    return tuple(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How a trace's lengths are brought to a model's size: scaled first, then clipped; at least one token stays."""

    scale: float = 1.0
    max_input: int | None = None
    max_output: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise InvalidInput(f"lengths cannot be scaled by {self.scale:g}; give a factor above 0, such as 0.25")
        for name, limit in (("max_input", self.max_input), ("max_output", self.max_output)):
            if limit is not None and limit < 1:
                raise InvalidInput(f"{name} is {limit}; a request needs at least 1 token in and 1 out")

    def apply(self, request: RequestSpec) -> RequestSpec:
        """The request at its new size; its prefix ids stand for scaled numbers of tokens."""
        return replace(
            request,
            input_tokens=_resized(request.input_tokens, self.scale, self.max_input),
            output_tokens=_resized(request.output_tokens, self.scale, self.max_output),
            prefix_tokens=_resized(request.prefix_tokens, self.scale, None),
        )

    def describe(self, requests: Sequence[RequestSpec]) -> str:
        """What was done to these requests, before it is done: `lengths x0.25, input cut to 512 (3 of 200)`."""
        parts = [f"lengths x{self.scale:g}"] if self.scale != 1 else []
        for name, limit, lengths in (
            ("input", self.max_input, [r.input_tokens for r in requests]),
            ("output", self.max_output, [r.output_tokens for r in requests]),
        ):
            if limit is not None:
                cut = sum(_resized(length, self.scale, None) > limit for length in lengths)
                parts.append(f"{name} cut to {limit} ({cut} of {len(lengths)})")
        return ", ".join(parts) or "lengths as recorded"


def _resized(tokens: int, scale: float, limit: int | None) -> int:
    scaled = max(1, round(tokens * scale))
    return scaled if limit is None else min(scaled, limit)


def recorded(
    requests: Sequence[RequestSpec],
    *,
    name: str,
    start: int = 0,
    count: int | None = None,
    duration_s: float | None = None,
    speed: float = 1.0,
    lengths: Lengths = Lengths(),
) -> Workload:
    """A slice of a trace with its own timing: `count` rows from row `start`, sent `speed` times as fast.

    `duration_s` ends the slice by sending time, after the speed-up.
    """
    if not (math.isfinite(speed) and speed > 0):
        raise InvalidInput(f"a trace cannot be replayed at speed {speed:g}; give a factor above 0, such as 2")
    _check_limits(count, duration_s)
    rows = _slice(requests, name, start, count)
    origin_s = rows[0].arrival_s
    timed = [replace(r, arrival_s=(r.arrival_s - origin_s) / speed) for r in rows]
    if duration_s is not None:
        timed = [r for r in timed if r.arrival_s <= duration_s]
    source = f"{name}[{start}:{start + len(timed)}] replayed at {speed:g}x speed, {lengths.describe(timed)}"
    return Workload(requests=tuple(map(lengths.apply, timed)), source=source)


def generated(
    requests: Iterable[RequestSpec],
    *,
    name: str,
    rate_rps: float,
    seed: int,
    arrivals: Arrivals = POISSON,
    start: int = 0,
    count: int | None = None,
    duration_s: float | None = None,
    lengths: Lengths = Lengths(),
) -> Workload:
    """Arrivals of a process at a mean rate; lengths are those of the requests from row `start` on, over again.

    Ends after `count` requests or `duration_s` seconds, whichever comes first; one of the two is needed.
    """
    if not (math.isfinite(rate_rps) and rate_rps > 0):
        raise InvalidInput(f"requests cannot arrive at {rate_rps:g} a second; give a rate above 0")
    _check_limits(count, duration_s)
    title = str(arrivals).capitalize()
    if count is None and duration_s is None:
        raise InvalidInput(f"{title} arrivals have no end of their own; give a number of requests or a duration")
    arrivals_s = arrivals.times_s(rate_rps, np.random.default_rng(seed), count, duration_s)
    if not arrivals_s:
        raise InvalidInput(f"no request arrives within {duration_s:g} s at {rate_rps:g}/s; give more of either")
    rows = list(islice(cycle(_slice(tuple(requests), name, start, None)), len(arrivals_s)))
    source = f"{title} at {rate_rps:g}/s, seed {seed}, {len(rows)} requests of {name} from row {start}, "
    timed = (replace(lengths.apply(r), arrival_s=t) for r, t in zip(rows, arrivals_s, strict=True))
    return Workload(requests=tuple(timed), source=source + lengths.describe(rows))


def poisson(
    requests: Iterable[RequestSpec],
    *,
    name: str,
    rate_rps: float,
    seed: int,
    start: int = 0,
    count: int | None = None,
    duration_s: float | None = None,
    lengths: Lengths = Lengths(),
) -> Workload:
    """Poisson arrivals: `generated` with the process that many independent users make."""
    return generated(
        requests, name=name, rate_rps=rate_rps, seed=seed, start=start, count=count, duration_s=duration_s,
        lengths=lengths,
    )  # fmt: skip


def _check_limits(count: int | None, duration_s: float | None) -> None:
    if count is not None and count < 1:
        raise InvalidInput(f"cannot send {count} requests; give at least 1")
    if duration_s is not None and not (math.isfinite(duration_s) and duration_s > 0):
        raise InvalidInput(f"cannot send for {duration_s:g} s; give a duration above 0")


def _slice(requests: Sequence[RequestSpec], name: str, start: int, count: int | None) -> Sequence[RequestSpec]:
    if not 0 <= start < len(requests):
        raise InvalidInput(f"{name} has {len(requests)} rows, so none from row {start}; start between 0 and its end")
    return requests[start : None if count is None else start + count]
