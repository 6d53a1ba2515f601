"""Replicas of engines in virtual time, step by step: the words, and the choice between the compiled and the plain core.

A step of a replica computes, in order of admission, the next tokens of every running request within its token budget
(chunked prefill), then admits who waits, first come first served, while batch, budget and KV blocks have room. It takes

    alpha + beta * tokens computed + gamma * tokens of KV cache read   (each request reads its own, new ones included)

seconds. The prompt's last chunk gives the first token, every later step one more. Where blocks run out, the request
admitted last is preempted: it loses its blocks and is computed again from its beginning. Full parts of prompts stay in
a cache until their blocks are needed, least recently used first.

At one instant arrivals come before the ends of steps, so a step begins with all who have come by then. With
`detail="requests"` a request's latencies follow, once and for all, from whom it finds in service: several times faster,
exact in neither.

`simulator_reference.py` does this naively and serves where no compiler is; `simulator.cpp` does the same to 1e-9.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from flyball.core.errors import InvalidInput
from flyball.core.fleet import LatencyProfile
from flyball.core.native import NativeUnavailable
from flyball.performance.queueing import DEFAULT_STEP_TOKENS

Router = Literal["round_robin", "least_loaded", "prefix_affine"]
ROUTERS: tuple[Router, ...] = ("round_robin", "least_loaded", "prefix_affine")
DONE, LOST, REFUSED = 0, 1, 2  # how a request ends: served; with its replica; longer than any cache

BUCKETS = 160  # of latencies: bucket b ends at 1 ms * 1.1 ** b
RECORD = np.dtype(
    [("id", "i8"), ("arrival_s", "f8"), ("first_s", "f8"), ("last_s", "f8")]
    + [(n, "i4") for n in ("server", "replica", "input", "output", "cached", "preemptions", "outcome", "pad")]
)
COUNTERS = np.dtype(  # of a replica: four gauges, then sums since it began
    [(n, "i8") for n in ("running", "waiting", "blocks_used", "blocks")]
    + [(n, "i8") for n in ("arrivals", "completed", "lost", "generated", "prompt", "hits", "preemptions")]
    + [(n, "i8") for n in ("firsts", "gaps", "steps")]
    + [(n, "f8") for n in ("ttft_sum_s", "gap_sum_s", "busy_s", "emptied_s")]
    + [("ttft_hist", "i8", BUCKETS), ("gap_hist", "i8", BUCKETS)]
)
SERVER_COUNTERS = np.dtype([(n, "i8") for n in ("arrivals", "completed", "lost", "queued", "input", "output")])

Records = NDArray[np.void]
Counters = NDArray[np.void]  # without dimensions


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """How one replica behaves."""

    alpha_s: float
    beta_s: float
    gamma_s: float
    max_batch: int = 256
    max_step_tokens: int = int(DEFAULT_STEP_TOKENS)
    kv_tokens: int = 524_288
    block_tokens: int = 16
    prefix_caching: bool = False
    detail: Literal["steps", "requests"] = "steps"

    def __post_init__(self) -> None:
        times = (self.alpha_s, self.beta_s, self.gamma_s)
        if not (all(math.isfinite(t) and t >= 0 for t in times) and sum(times) > 0):
            raise InvalidInput(f"alpha, beta, gamma are {times} s; give finite numbers of at least 0, not all 0")
        if not 1 <= self.max_batch <= self.max_step_tokens:
            raise InvalidInput(
                f"max_batch is {self.max_batch} and max_step_tokens {self.max_step_tokens}; give at least one sequence "
                "and, a step, a token for each"
            )
        if not 1 <= self.block_tokens <= self.kv_tokens:
            raise InvalidInput(
                f"kv_tokens is {self.kv_tokens} and block_tokens {self.block_tokens}; give room for at least one block"
            )

    @property
    def blocks(self) -> int:
        """Whole blocks in the cache."""
        return self.kv_tokens // self.block_tokens

    @classmethod
    def of(cls, profile: LatencyProfile, *, kv_tokens: int = 524_288) -> Law:
        """The law that a measured profile states; what it leaves open is as an engine's defaults have it."""
        return cls(
            alpha_s=profile.alpha_s,
            beta_s=profile.beta_s,
            gamma_s=profile.gamma_s,
            max_batch=profile.max_batch or 256,
            max_step_tokens=max(profile.max_step_tokens or int(DEFAULT_STEP_TOKENS), profile.max_batch or 256),
            kv_tokens=kv_tokens,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Requests:
    """Some requests in order of arrival, each field an array [n]; `prefix_ids` follow one another, cut by offsets."""

    arrival_s: NDArray[np.float64]
    server: NDArray[np.int32]
    input_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    prefix_tokens: NDArray[np.int32]  # that each id stands for
    prefix_offsets: NDArray[np.int64] | None = None  # [n + 1]
    prefix_ids: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.arrival_s)


@dataclass(frozen=True, slots=True)
class Books:
    """What must be equal: requests present, integrated over time, and the sum of their residences (Little's law)."""

    now_s: float
    area: float
    residence_s: float
    blocks_conserved: bool  # each block is free, held by a request, or in the cache

    def check(self) -> None:
        """Assert both."""
        assert self.blocks_conserved, "blocks were lost or made"
        tolerance = 1e-6 * max(1.0, self.residence_s)
        assert abs(self.area - self.residence_s) <= tolerance, (
            f"{self.area} requests x s, residences {self.residence_s}"
        )


class Core(Protocol):
    """Replicas and the requests at them. Servers are numbered from 0; a replica is known by the slot it is given."""

    def add(self, server: int, law: Law) -> int:
        """A replica that takes requests from now on; its slot, which may be that of one removed."""
        ...

    def drain(self, slot: int) -> None:
        """Give it no new request."""
        ...

    def remove(self, slot: int) -> None:
        """Forget a replica that serves nobody."""
        ...

    def fail(self, slot: int) -> None:
        """It ends now: requests without a token go back to the gateway, the others are lost."""
        ...

    def offer(self, requests: Requests) -> None:
        """Requests that will arrive, after all offered before."""
        ...

    def close(self) -> None:
        """No more will be offered."""
        ...

    def run(self, until_s: float) -> bool:
        """Go on until a time (infinity: the last request's end); True if requests must be offered first."""
        ...

    def counters(self, slot: int) -> Counters:
        """COUNTERS of a replica, to the last step that has ended."""
        ...

    def server(self, index: int) -> Counters:
        """SERVER_COUNTERS; `queued` are those that no replica has taken."""
        ...

    def take(self) -> tuple[Records, NDArray[np.float64]]:
        """RECORDs of requests that ended since the last call, in order; and their token times, where recorded."""
        ...

    def books(self) -> Books:
        """For assertions."""
        ...


def new_core(servers: int, router: Router, *, record_times: bool = False, compiled: bool | None = None) -> Core:
    """A core without replicas; compiled where a compiler is, or as told (then raises NativeUnavailable without one)."""
    if router not in ROUTERS:
        raise InvalidInput(f"unknown router {router!r}; use one of {', '.join(ROUTERS)}")
    from flyball.performance.simulator_compiled import CompiledCore
    from flyball.performance.simulator_reference import ReferenceCore

    if compiled is not False:
        try:
            return CompiledCore(servers, router, record_times)
        except NativeUnavailable:
            if compiled:
                raise
    return ReferenceCore(servers, router, record_times)
