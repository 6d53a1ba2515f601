"""Requests for the simulator as streams of arrays: a trace's rows or a process, never more than a part in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flyball.core.errors import InvalidInput
from flyball.core.workload import RequestSpec
from flyball.performance.simulator import Requests

CHUNK = 8192  # requests in memory at a time


def from_specs(specs: Iterable[RequestSpec], *, server: int = 0, chunk: int = CHUNK) -> Iterator[Requests]:
    """Requests in order of arrival, for one server."""
    rows = iter(specs)
    while part := list(islice(rows, chunk)):
        ids = [i for r in part for i in r.prefix_ids]
        yield Requests(
            arrival_s=np.array([r.arrival_s for r in part]),
            server=np.full(len(part), server, np.int32),
            input_tokens=np.array([r.input_tokens for r in part], np.int32),
            output_tokens=np.array([r.output_tokens for r in part], np.int32),
            prefix_tokens=np.array([r.prefix_tokens for r in part], np.int32),
            prefix_offsets=np.concatenate(([0], np.cumsum([len(r.prefix_ids) for r in part]))) if ids else None,
            prefix_ids=np.array(ids, np.int64) if ids else None,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Rates:
    """Arrivals per second over time, straight between points in order of time; as the last one after it."""

    times_s: NDArray[np.float64]
    rates_rps: NDArray[np.float64]

    @classmethod
    def of(cls, times_s: ArrayLike, rates_rps: ArrayLike) -> Rates:
        """From lists of equal length."""
        times, rates = np.asarray(times_s, float), np.asarray(rates_rps, float)
        if not (len(times) == len(rates) >= 1 and (np.diff(times) >= 0).all() and (rates >= 0).all()):
            raise InvalidInput(f"rates {rates} at {times} s: give as many rates of at least 0 as times, which ascend")
        return cls(times, rates)

    def at(self, time_s: ArrayLike) -> NDArray[np.float64]:
        """Requests per second at some times."""
        return np.asarray(np.interp(np.asarray(time_s, float), self.times_s, self.rates_rps), float)


def poisson_process(
    rates: Rates,
    lengths: Sequence[tuple[int, int]],
    *,
    duration_s: float,
    seed: int,
    server: int = 0,
    slice_s: float = 1.0,
) -> Iterator[Requests]:
    """Poisson arrivals whose rate follows a curve; lengths are those of (input, output) pairs, drawn at random.

    Within each slice of time the rate is taken for constant; arrivals, then lengths, come from the seed alone.
    """
    rng = np.random.default_rng(seed)
    pairs = np.array(lengths, np.int32)
    slices = int(np.ceil(duration_s / slice_s))
    step = 512  # slices drawn at once
    for first in range(0, slices, step):
        starts = np.arange(first, min(first + step, slices)) * slice_s
        widths = np.minimum(slice_s, duration_s - starts)
        counts = rng.poisson(rates.at(starts + widths / 2) * widths)
        arrival_s = np.sort(np.repeat(starts, counts) + rng.random(int(counts.sum())) * np.repeat(widths, counts))
        drawn = pairs[rng.integers(0, len(pairs), len(arrival_s))]
        if len(arrival_s):
            yield plain(arrival_s, drawn[:, 0], drawn[:, 1], server=server)


def plain(arrival_s: ArrayLike, input_tokens: ArrayLike, output_tokens: ArrayLike, *, server: int = 0) -> Requests:
    """Requests without prefixes to share, for one server."""
    arrivals = np.asarray(arrival_s, float)
    return Requests(
        arrival_s=arrivals,
        server=np.full(len(arrivals), server, np.int32),
        input_tokens=np.asarray(input_tokens, np.int32),
        output_tokens=np.asarray(output_tokens, np.int32),
        prefix_tokens=np.full(len(arrivals), 512, np.int32),
    )


def merged(streams: Sequence[Iterable[Requests]]) -> Iterator[Requests]:
    """Several streams as one in order of arrival; of equal times, the first stream's come first."""
    sources = [iter(stream) for stream in streams]
    parts = [next(source, None) for source in sources]
    while any(part is not None for part in parts):
        known_s = min(part.arrival_s[-1] for part in parts if part is not None)  # all up to here have been read
        heads: list[Requests] = []
        for index, part in enumerate(parts):
            if part is None:
                continue
            count = int(np.searchsorted(part.arrival_s, known_s, side="right"))
            heads.append(_cut(part, 0, count))
            parts[index] = _cut(part, count, len(part)) if count < len(part) else next(sources[index], None)
        yield _joined(heads)


def _cut(part: Requests, start: int, stop: int) -> Requests:
    rows = slice(start, stop)
    offsets, ids = part.prefix_offsets, part.prefix_ids
    if offsets is not None and ids is not None:
        ids = ids[offsets[start] : offsets[stop]]
        offsets = offsets[start : stop + 1] - offsets[start]
    return Requests(
        part.arrival_s[rows], part.server[rows], part.input_tokens[rows], part.output_tokens[rows],
        part.prefix_tokens[rows], offsets, ids,
    )  # fmt: skip


def _joined(parts: Sequence[Requests]) -> Requests:
    arrivals = np.concatenate([p.arrival_s for p in parts])
    order = np.argsort(arrivals, kind="stable")
    offsets = ids = None
    if any(p.prefix_ids is not None for p in parts):
        lists = [row for p in parts for row in _prefixes(p)]
        ordered = [lists[i] for i in order]
        offsets = np.concatenate(([0], np.cumsum([len(row) for row in ordered])))
        ids = np.concatenate(ordered)

    def column(name: str) -> NDArray[np.int32]:
        whole: NDArray[np.int32] = np.concatenate([getattr(p, name) for p in parts])[order]
        return whole

    return Requests(
        arrivals[order], column("server"), column("input_tokens"), column("output_tokens"), column("prefix_tokens"),
        offsets, ids,
    )  # fmt: skip


def _prefixes(part: Requests) -> list[NDArray[np.int64]]:
    if part.prefix_offsets is None or part.prefix_ids is None:
        return [np.zeros(0, np.int64)] * len(part)
    return np.split(part.prefix_ids, part.prefix_offsets[1:-1])
