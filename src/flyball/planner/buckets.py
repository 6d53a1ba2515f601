"""Which accelerators for one model's requests of many sizes: the problem of Melange (Griggs and others, 2024).

Requests fall into buckets by their tokens in and out. An accelerator takes so many requests/s of a bucket within the
promised latency, 0 where it cannot keep it; its time is shared among buckets. A bucket's load is either cut into
slices, each of which goes to one accelerator, or divided by a router at will, which costs never more.

symbol  meaning
n_a     accelerators a that are rented, a whole number of at most m_a
x_ba    slices of bucket b (or its share) that go to a; S slices a bucket (or 1)
l_ba    share of one accelerator a's time that a slice of b takes: rate_b / (S * throughput_ab)

min Σ c_a n_a, with Σ_a x_ba = S for every b and Σ_b l_ba x_ba <= n_a for every a; x whole, or not. Slices of a bucket
are counted, not told apart, so they make no symmetric solutions; and since dividing bounds slicing, its cost is found
first, and often shows at once that the slices are optimal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from flyball.core.errors import Infeasible, InvalidInput
from flyball.numerics.markov import Floats, Ints
from flyball.planner.solvers.program import Budget, IntegerProgram, Optimum, OutOfTime

_GAP = 1e-6
_ROUNDING = 1e-9

Cell = tuple[int, int]  # of the table of buckets: tokens in, tokens out


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Buckets:
    """The load of each bucket, and what accelerators take of it."""

    accelerators: tuple[str, ...]
    cost_per_h: Floats  # [A]
    throughput_rps: Floats  # [A, I, O]; 0: not within the promised latency
    rate_rps: Floats  # [I, O]
    slices: int | None  # each bucket's load is cut into; None: it may be divided at will
    most: Mapping[str, int] | None = None  # accelerators there are; None, or not named: as many as wanted

    def __post_init__(self) -> None:
        shape = (len(self.accelerators), *self.rate_rps.shape)
        if self.throughput_rps.shape != shape or self.cost_per_h.shape != shape[:1]:
            raise InvalidInput(
                f"the buckets are {self.rate_rps.shape} and throughputs {self.throughput_rps.shape} for "
                f"{shape[0]} accelerators; give every accelerator one throughput a bucket"
            )
        for name in ("cost_per_h", "throughput_rps", "rate_rps"):
            array = getattr(self, name)
            if not (np.isfinite(array) & (array >= 0)).all():
                raise InvalidInput(f"a bucket problem's {name} has a value that is not a number of at least 0")
        if self.slices is not None and not 1 <= self.slices <= 1000:
            raise InvalidInput(f"slices is {self.slices}; give a whole number from 1 to 1000, or divide at will")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BucketPlan:
    """Accelerators to rent, and where each bucket's requests go."""

    counts: Mapping[str, int]
    cost_per_h: float
    bound: float  # no plan for the same buckets costs less
    share: Floats  # [A, I, O] of each bucket's load; 0 in buckets that are not served
    utilization: Mapping[str, float]  # of the accelerators' time
    unserved: Mapping[Cell, str]  # bucket -> reason

    @property
    def gap(self) -> float:
        """How far the cost may be above the least one, relative to it."""
        return max(self.cost_per_h - self.bound, 0.0) / max(self.cost_per_h, 1e-9)


def plan_buckets(problem: Buckets, *, time_limit_s: float = 60.0) -> BucketPlan:
    """The least cost within the time limit; a bucket that nothing can serve is named, and the rest is planned.

    >>> slow_fast = Buckets(
    ...     accelerators=("slow", "fast"), cost_per_h=np.array([1.0, 3.0]), slices=None,
    ...     throughput_rps=np.array([[[2.0, 0.0]], [[8.0, 4.0]]]), rate_rps=np.array([[13.0, 2.0]]))
    >>> dict(plan_buckets(slow_fast).counts)
    {'slow': 1, 'fast': 2}
    """
    loaded = problem.rate_rps > 0
    able = loaded & (problem.throughput_rps > 0).any(axis=0)
    unserved = {(int(i), int(o)): _reason(problem, int(i), int(o)) for i, o in np.argwhere(loaded & ~able)}
    columns = _Columns.of(problem, np.argwhere(able))
    budget = Budget(time_limit_s)
    try:
        best = columns.program(problem, budget).minimise(columns.cost(problem))
    except OutOfTime:
        raise Infeasible("no plan was found within the time limit; allow more time") from None
    if best is None:
        raise Infeasible(
            "the accelerators there are cannot take the load of all buckets; allow more of them, or lower the load"
        )
    return _plan(problem, columns, best, unserved)


def _reason(problem: Buckets, i: int, o: int) -> str:
    names = ", ".join(problem.accelerators)
    return (
        f"{problem.rate_rps[i, o]:.4g} requests/s come, and no accelerator ({names}) takes any within the promised "
        "latency; relax it, or add a faster accelerator"
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Columns:
    """Ways to serve a bucket, one column each; then one column an accelerator."""

    cells: Ints  # [B, 2]
    bucket: Ints  # of each way
    accelerator: Ints
    load: Floats  # l of the whole bucket

    @classmethod
    def of(cls, problem: Buckets, cells: Ints) -> _Columns:
        throughput = problem.throughput_rps[:, cells[:, 0], cells[:, 1]]  # [A, B]
        bucket, accelerator = np.nonzero(throughput.T > 0)
        rate = problem.rate_rps[cells[:, 0], cells[:, 1]]
        return cls(cells, bucket, accelerator, rate[bucket] / throughput[accelerator, bucket])

    def cost(self, problem: Buckets) -> Floats:
        return np.concatenate((np.zeros(len(self.bucket)), problem.cost_per_h))

    def program(self, problem: Buckets, budget: Budget) -> IntegerProgram:
        """Rows: each bucket's slices; each accelerator's time; for slices, a cost no less than that of dividing."""
        ways, cells, kinds = len(self.bucket), len(self.cells), len(problem.accelerators)
        slices = problem.slices or 1
        way, rented = np.arange(ways), ways + np.arange(kinds)
        at = np.concatenate((self.bucket, cells + self.accelerator, cells + np.arange(kinds)))
        across = np.concatenate((way, way, rented))
        entries = np.concatenate((np.ones(ways), self.load / slices, -np.ones(kinds)))
        most = [float((problem.most or {}).get(name, math.inf)) for name in problem.accelerators]
        program = IntegerProgram(
            rows=csr_array((entries, (at, across)), shape=(cells + kinds, ways + kinds)),
            low=np.concatenate((np.full(cells, float(slices)), np.full(kinds, -np.inf))),
            high=np.concatenate((np.full(cells, float(slices)), np.zeros(kinds))),
            least=np.zeros(ways + kinds),
            most=np.concatenate((np.full(ways, float(slices)), most)),
            budget=budget,
            gap=_GAP,
            divisible=np.concatenate((np.ones(ways, dtype=np.bool_), np.zeros(kinds, dtype=np.bool_))),
        )
        if problem.slices is None:
            return program
        divided = program.minimise(self.cost(problem))
        sliced = program.whole()
        return sliced if divided is None else sliced.with_row(self.cost(problem), divided.bound * (1 - _ROUNDING))


def _plan(problem: Buckets, columns: _Columns, best: Optimum, unserved: Mapping[Cell, str]) -> BucketPlan:
    ways = len(columns.bucket)
    part = np.clip(best.amounts[:ways] / (problem.slices or 1), 0.0, 1.0)
    counts = best.amounts[ways:].astype(np.int64)
    share = np.zeros(problem.throughput_rps.shape)
    cell = columns.cells[columns.bucket]
    share[columns.accelerator, cell[:, 0], cell[:, 1]] = part
    used = np.bincount(columns.accelerator, weights=columns.load * part, minlength=len(counts))
    return BucketPlan(
        counts=dict(zip(problem.accelerators, counts.tolist(), strict=True)),
        cost_per_h=float(problem.cost_per_h @ counts),
        bound=best.bound,
        share=share,
        utilization={
            name: float(u / n) if n else 0.0 for name, u, n in zip(problem.accelerators, used, counts, strict=True)
        },
        unserved=unserved,
    )
