"""The simulator's core in C++, built when first used; see `flyball.performance.simulator.Core`."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flyball.core.native import load_library
from flyball.performance.simulator import (
    COUNTERS,
    RECORD,
    ROUTERS,
    SERVER_COUNTERS,
    Books,
    Counters,
    Law,
    Records,
    Requests,
    Router,
)

_SOURCE = Path(__file__).with_name("simulator.cpp")
_FLAGS = ("-O3", "-ffp-contract=off")  # the same sums on every processor
_MOST_RECORDS = 65_536  # that a run keeps before it hands them over
_NEEDS_INPUT, _HAS_OUTPUT = 1, 2


class _Law(ctypes.Structure):
    _fields_ = [(n, ctypes.c_double) for n in ("alpha", "beta", "gamma")] + [
        (n, ctypes.c_int64)
        for n in ("max_batch", "step_tokens", "blocks", "block_tokens", "prefix_caching", "request_level")
    ]


@cache
def _library() -> ctypes.CDLL:
    library = load_library(_SOURCE, flags=_FLAGS)
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    for name, result, *arguments in (
        ("new", pointer, integer, integer, integer),
        ("free", None, pointer),
        ("add", integer, pointer, integer, ctypes.POINTER(_Law)),
        ("drain", None, pointer, integer),
        ("remove", None, pointer, integer),
        ("fail", None, pointer, integer),
        ("offer", None, pointer, integer, *[pointer] * 7),
        ("close", None, pointer),
        ("run", integer, pointer, real, integer),
        ("sync", None, pointer),
        ("counters", None, pointer, integer, pointer),
        ("server_seen", None, pointer, integer, pointer),
        ("records", integer, pointer, pointer, pointer, pointer),
        ("forget_records", None, pointer),
        ("books", integer, pointer, pointer, pointer, pointer),
    ):
        function = getattr(library, f"fs_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def _address(array: NDArray[Any] | None) -> int | None:
    return None if array is None else array.ctypes.data


class CompiledCore:
    """See the module."""

    def __init__(self, servers: int, router: Router, record_times: bool) -> None:
        self._library = _library()
        self._sim = self._library.fs_new(servers, ROUTERS.index(router), record_times)
        self._taken: list[tuple[Records, NDArray[np.float64]]] = []

    def __del__(self) -> None:
        if hasattr(self, "_sim"):
            self._library.fs_free(self._sim)

    def add(self, server: int, law: Law) -> int:
        """See Core."""
        made = _Law(
            law.alpha_s, law.beta_s, law.gamma_s, law.max_batch, law.max_step_tokens, law.blocks, law.block_tokens,
            law.prefix_caching, law.detail == "requests",
        )  # fmt: skip
        return int(self._library.fs_add(self._sim, server, ctypes.byref(made)))

    def drain(self, slot: int) -> None:
        """See Core."""
        self._library.fs_drain(self._sim, slot)

    def remove(self, slot: int) -> None:
        """See Core."""
        self._library.fs_remove(self._sim, slot)

    def fail(self, slot: int) -> None:
        """See Core."""
        self._library.fs_fail(self._sim, slot)

    def offer(self, requests: Requests) -> None:
        """See Core."""
        arrays = (
            np.ascontiguousarray(requests.arrival_s, np.float64),
            *(
                np.ascontiguousarray(a, np.int32)
                for a in (requests.server, requests.input_tokens, requests.output_tokens)
            ),
            *(
                None if a is None else np.ascontiguousarray(a, np.int64)
                for a in (requests.prefix_offsets, requests.prefix_ids)
            ),
            np.ascontiguousarray(requests.prefix_tokens, np.int32),
        )
        self._library.fs_offer(self._sim, len(requests), *map(_address, arrays))

    def close(self) -> None:
        """See Core."""
        self._library.fs_close(self._sim)

    def run(self, until_s: float) -> bool:
        """See Core."""
        while (status := self._library.fs_run(self._sim, until_s, _MOST_RECORDS)) == _HAS_OUTPUT:
            self._collect()
        if status != _NEEDS_INPUT:
            self._library.fs_sync(self._sim)
        return bool(status == _NEEDS_INPUT)

    def counters(self, slot: int) -> Counters:
        """See Core."""
        to = np.zeros((), COUNTERS)
        self._library.fs_counters(self._sim, slot, to.ctypes.data)
        return to

    def server(self, index: int) -> Counters:
        """See Core."""
        to = np.zeros((), SERVER_COUNTERS)
        self._library.fs_server_seen(self._sim, index, to.ctypes.data)
        return to

    def take(self) -> tuple[Records, NDArray[np.float64]]:
        """See Core."""
        self._collect()
        parts, self._taken = self._taken, []
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def _collect(self) -> None:
        records, times, count = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int64()
        made = self._library.fs_records(self._sim, *map(ctypes.byref, (records, count, times)))
        self._taken.append((
            np.frombuffer(ctypes.string_at(records, made * RECORD.itemsize), RECORD),
            np.frombuffer(ctypes.string_at(times, count.value * 8), np.float64),
        ))  # fmt: skip
        self._library.fs_forget_records(self._sim)

    def books(self) -> Books:
        """See Core."""
        now, area, residence = ctypes.c_double(), ctypes.c_double(), ctypes.c_double()
        conserved = self._library.fs_books(self._sim, *map(ctypes.byref, (now, area, residence)))
        return Books(now.value, area.value, residence.value, bool(conserved))
