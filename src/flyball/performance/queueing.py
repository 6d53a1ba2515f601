"""What a queue model is: replicas and a load in, latencies out. Models are chosen by name.

A model prepares C replicas at once (`QueueModel`), and the result (`Queues`) is asked about any number of loads. All is
arrays, since sizing tries thousands of candidates. A third party adds a model through the entry point group
`flyball.queue_models`: a name, and an object with the one method of `QueueModel`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, fields
from importlib.metadata import entry_points
from typing import Protocol, Self, TypeVar, cast, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

from flyball.core.errors import InvalidInput
from flyball.numerics.markov import Floats, Ints, ServiceRates

_GROUP = "flyball.queue_models"
_BUILT_IN = {
    "v3": "flyball.performance.queue_v3:V3",
    "v3-compat": "flyball.performance.queue_v3:V3_COMPAT",
    "v3-engine": "flyball.performance.queue_engine:V3_ENGINE",
    "v1": "flyball.performance.queue_legacy:V1",
    "v2": "flyball.performance.queue_legacy:V2",
    "mm1k": "flyball.performance.queue_legacy:MM1K",
    "linear": "flyball.performance.queue_legacy:LINEAR",
}
MOST_AT_ONCE = 1 << 16  # largest batch: each has a state in the chain
DEFAULT_STEP_TOKENS = 8192.0  # tokens computed in one step where nothing else is said

_Rows = TypeVar("_Rows")


def take_rows(arrays: _Rows, rows: Ints) -> _Rows:
    """The chosen rows of a dataclass whose fields are all arrays."""
    return type(arrays)(**{f.name: getattr(arrays, f.name)[rows] for f in fields(arrays)})  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, eq=False)
class Replicas:
    """C replicas under their loads' lengths, each field an array [C]; build it with `Replicas.of`."""

    alpha_s: Floats
    beta_s: Floats
    gamma_s: Floats
    input_tokens: Floats  # mean of a request
    output_tokens: Floats
    max_batch: Ints  # most requests in service
    max_queue: Ints  # most that wait
    max_step_tokens: Floats  # most tokens computed in a step
    delta_s: Floats  # a fourth parameter, of laws that have one (v1)
    prefix_hit: Floats  # share of a prompt whose keys and values are found in the cache
    input_cv: Floats  # coefficient of variation of lengths; NaN: not stated (equal prompts, exponential service)
    output_cv: Floats

    @classmethod
    def of(
        cls,
        *,
        alpha_s: ArrayLike,
        beta_s: ArrayLike,
        gamma_s: ArrayLike,
        input_tokens: ArrayLike,
        output_tokens: ArrayLike,
        max_batch: ArrayLike,
        max_queue: ArrayLike,
        max_step_tokens: ArrayLike = 0.0,
        delta_s: ArrayLike = 0.0,
        prefix_hit: ArrayLike = 0.0,
        input_cv: ArrayLike = np.nan,
        output_cv: ArrayLike = np.nan,
    ) -> Self:
        """Numbers or arrays, brought to one length; a step limit of 0 means the default."""
        numbers = (
            alpha_s,
            beta_s,
            gamma_s,
            input_tokens,
            output_tokens,
            max_batch,
            max_queue,
            max_step_tokens,
            delta_s,
            prefix_hit,
            input_cv,
            output_cv,
        )
        a, b, g, n, m, batch, queue, step, delta, hit, cv_in, cv_out = np.broadcast_arrays(
            *(np.atleast_1d(np.asarray(v, float)) for v in numbers)
        )
        step = np.where(step > 0, step, DEFAULT_STEP_TOKENS)
        for name, array, low in (
            ("alpha_s", a, 0), ("beta_s", b, 0), ("gamma_s", g, 0), ("input_tokens", n, 0), ("output_tokens", m, 0),
            ("input_tokens + output_tokens", n + m, 1e-9), ("alpha_s + beta_s + gamma_s", a + b + g, 1e-300),
            ("max_batch", batch, 1), ("max_queue", queue, 0), ("max_step_tokens", step, 1),
            ("delta_s", delta, 0), ("prefix_hit", hit, 0), ("prompt share that must be computed", 1 - hit, 0),
            ("input_cv", np.where(np.isnan(cv_in), 0.0, cv_in), 0),
            ("output_cv", np.where(np.isnan(cv_out), 0.0, cv_out), 0),
        ):  # fmt: skip
            bad = ~(np.isfinite(array) & (array >= low))
            if bad.any():
                raise InvalidInput(f"a replica's {name} is {array[bad][0]:g}; give a finite number of at least {low:g}")
        if (batch > MOST_AT_ONCE).any():
            raise InvalidInput(f"a replica's max_batch is {batch.max():g}; give at most {MOST_AT_ONCE}")
        return cls(a, b, g, n, m, batch.astype(np.int64), queue.astype(np.int64), step, delta, hit, cv_in, cv_out)

    def __len__(self) -> int:
        return len(self.alpha_s)

    def take(self, rows: Ints) -> Replicas:
        """Some of the replicas."""
        return take_rows(self, rows)


@dataclass(frozen=True, slots=True, eq=False)
class Metrics:
    """Stationary means of replicas at their loads; arrays of one shape, NaN where the model cannot say."""

    throughput_rps: Floats  # requests that are served, not offered
    ttft_s: Floats  # arrival to first token, waiting included
    itl_s: Floats  # gap between tokens
    wait_s: Floats  # for a place in the batch
    prefill_s: Floats
    response_s: Floats  # arrival to last token
    in_service: Floats  # requests in the batch
    utilization: Floats  # share of the batch in use, 0 to 1
    loss: Floats  # share of requests turned away


class Queues(Protocol):
    """C replicas prepared by a model."""

    @property
    def compat(self) -> bool:
        """Whether sizing shall reproduce the defects recorded of the original (docs/theory/queueing.md)."""
        ...

    @property
    def min_rate_rps(self) -> Floats:
        """[C] The smallest load that sizing considers."""
        ...

    @property
    def max_rate_rps(self) -> Floats:
        """[C] The largest load that sizing considers, just under the capacity."""
        ...

    @property
    def capacity_rps(self) -> Floats:
        """[C] The largest rate of service at any batch."""
        ...

    @property
    def best_batch(self) -> Ints:
        """[C] The batch at which the rate of service is largest."""
        ...

    def analyze(self, rates_rps: Floats) -> Metrics:
        """Metrics at arrival rates [C] or [C, R], 0 to infinity; overload is an answer, never an error."""
        ...

    def batch_within(self, *, itl_s: Floats, prefill_s: Floats) -> tuple[Ints, Ints]:
        """[C] each: the largest batch whose ITL, and whose prefill time, stays within a limit; at least 1."""
        ...

    def take(self, rows: Ints) -> Queues:
        """Some of the replicas."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Anatomy:
    """A request's time in service, part by part, for every batch b = 1..B; arrays [C, B] or [C]."""

    shared_s: Floats  # of a prefill: what the others' work makes it take
    own_s: Floats  # of a prefill: what grows with one's own prompt
    gap_s: Floats  # of a decode step
    decodes: Floats  # [C] decode steps, on average
    first_decoded: bool  # the first decode step emits the first token, not the prefill
    input_cv: Floats  # [C] variation of lengths, nowhere NaN
    output_cv: Floats
    service: ServiceRates


@runtime_checkable
class Dissectable(Protocol):
    """Queues that know more than means: what percentiles are computed from (`flyball.performance.percentiles`)."""

    def anatomy(self) -> Anatomy:
        """The parts of a request's time."""
        ...


class QueueModel(Protocol):
    """A law of how one replica behaves."""

    def prepare(self, replicas: Replicas) -> Queues:
        """Compute all that does not depend on the arrival rate."""
        ...


def queue_model(name: str) -> QueueModel:
    """The model of this name, ours or a plug-in's."""
    target = _BUILT_IN.get(name)
    if target is not None:
        module, attribute = target.split(":")
        return cast("QueueModel", getattr(importlib.import_module(module), attribute))
    found = {point.name: point for point in entry_points(group=_GROUP)}
    if name not in found:
        known = ", ".join((*_BUILT_IN, *found))
        raise InvalidInput(f"unknown queue model {name!r}; use one of {known}, or install a package that provides it")
    return cast("QueueModel", found[name].load())
