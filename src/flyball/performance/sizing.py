"""How much load a replica can take within its targets, and how large its batch should be.

`size` finds for each replica the largest arrival rate that keeps every target; `optimal_batch` the smallest batch that
gives away almost no throughput (llm-inferno's OptimalConcurrency). Both work on thousands of replicas at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flyball.core.slo import Latency
from flyball.numerics.markov import Floats, Ints
from flyball.performance.queueing import Metrics, QueueModel, Queues, Replicas

SAFETY = 0.1  # share of the largest rate kept free where a queue must be stable but no latency bounds it
_TOLERANCE = 1e-6  # relative, in the target
_NARROW = 1e-9  # relative width at which a bracket around a jump is given up
_BLOCK = 1 << 15  # states a block of replicas may hold: what stays in the processor's cache
_GIVEN_AWAY = (
    0.02  # of the throughput at the batch ceiling, twice what the search may lose (paper of OptimalConcurrency)
)
_PROBES = 6

_HALVINGS = 14  # of the range of rates, for a bound that only sampling tells

Bools = NDArray[np.bool_]
Measure = tuple[Latency, float | None]  # a latency and its percentile; None: the mean


@dataclass(frozen=True, slots=True, eq=False)
class Goals:
    """Targets of C replicas, each an array [C]; infinity asks for nothing."""

    ttft_s: Floats
    itl_s: Floats
    stable: Bools  # a throughput is promised, so keep SAFETY free
    loss: Floats  # largest share of requests turned away
    bounds: tuple[tuple[Measure, Floats], ...] = ()  # further latencies, and their limits [C]

    @classmethod
    def of(
        cls,
        count: int,
        *,
        ttft_s: ArrayLike = np.inf,
        itl_s: ArrayLike = np.inf,
        stable: ArrayLike = False,
        loss: ArrayLike = np.inf,
        bounds: Mapping[Measure, ArrayLike] | None = None,
    ) -> Goals:
        """Numbers or arrays, brought to one length; bounds by what they limit: ("ttft", 99.0), ("e2e", None)."""

        def full(values: ArrayLike) -> Floats:
            return np.broadcast_to(np.asarray(values, dtype=np.float64), (count,))

        limits = tuple((measure, full(values)) for measure, values in (bounds or {}).items())
        promised = np.broadcast_to(np.asarray(stable, dtype=np.bool_), (count,))
        return cls(full(ttft_s), full(itl_s), promised, full(loss), limits)

    def take(self, rows: Ints) -> Goals:
        """Some of the goals."""
        bounds = tuple((measure, limits[rows]) for measure, limits in self.bounds)
        return Goals(self.ttft_s[rows], self.itl_s[rows], self.stable[rows], self.loss[rows], bounds)


@dataclass(frozen=True, slots=True, eq=False)
class Sized:
    """The largest rates within each target, and what a replica does at the smallest of them; NaN if infeasible."""

    rate_ttft_rps: Floats
    rate_itl_rps: Floats
    rate_stable_rps: Floats
    rate_rps: Floats
    metrics: Metrics
    idle_ttft_s: Floats  # at next to no load: what no number of replicas can better
    idle_itl_s: Floats

    @property
    def feasible(self) -> Bools:
        """[C] Whether some load keeps every target."""
        return np.isfinite(self.rate_rps)


def size(queues: Queues, goals: Goals) -> Sized:
    """The largest arrival rates that keep the goals.

    >>> from flyball.performance.queueing import queue_model
    >>> one = Replicas.of(alpha_s=.012, beta_s=5e-5, gamma_s=5e-7, input_tokens=128, output_tokens=512,
    ...                   max_batch=48, max_queue=128)
    >>> sized = size(queue_model("v3").prepare(one), Goals.of(1, ttft_s=.06, itl_s=.02))
    >>> print(f"{sized.rate_rps[0]:.5f} rps, TTFT {1e3 * sized.metrics.ttft_s[0]:.2f} ms")
    2.94946 rps, TTFT 60.00 ms
    """
    low, high = queues.min_rate_rps, queues.max_rate_rps
    targets = np.stack((goals.ttft_s, goals.itl_s), axis=1)
    ends = _seen(queues, np.stack((low, high), axis=1))  # [C, end, target]
    at_low, at_high = ends[:, 0], ends[:, 1]
    margin = np.where(np.isfinite(targets), targets, 0.0) * _TOLERANCE
    # The original takes a latency that falls with load (a batch of 1: a little) as a target to stay above.
    sign = np.where(queues.compat & np.isfinite(targets) & (at_low * (1 - _TOLERANCE) > at_high), -1.0, 1.0)
    at_low_signed, at_high_signed, wanted = at_low * sign, at_high * sign, targets * sign
    rates = np.where(at_low_signed <= wanted + margin, low[:, None], np.nan)
    rates = np.where(at_high_signed <= wanted + margin, high[:, None], rates)
    between = (at_low_signed < wanted) & (at_high_signed > wanted + margin)
    if queues.compat:  # and it looks at the lower end first, and stays where that just meets the target
        met = np.abs(at_low - np.where(np.isfinite(targets), targets, np.inf)) <= margin
        rates, between = np.where(met, low[:, None], rates), between & ~met
    rows, which = np.nonzero(between)
    if rows.size:
        targets, sign = targets[rows, which], sign[rows, which]
        distance = sign * (1 - targets / ends[rows, :, which].T)
        rates[rows, which] = _search(queues.take(rows), which, targets, sign, distance)
    stable = np.where(goals.stable, high * (1 - SAFETY), high)
    best = np.minimum(rates.min(axis=1), stable)
    best[~np.isfinite(at_low).all(axis=1)] = np.nan
    best = _within_loss(queues, goals.loss, best)
    for measure, limits in goals.bounds:
        best = _within_bound(queues, measure, limits, best)
    return Sized(rates[:, 0], rates[:, 1], stable, best, queues.analyze(best), at_low[:, 0], at_low[:, 1])


def _within_loss(queues: Queues, limits: Floats, best: Floats) -> Floats:
    """Rates lowered to where no more than a share is turned away."""
    return _lowered(queues, lambda some, rates: some.analyze(rates).loss, limits, best)


def _within_bound(queues: Queues, measure: Measure, limits: Floats, best: Floats) -> Floats:
    """Rates lowered to where a percentile, or the mean of E2E, is kept; NaN where no load keeps it."""
    from flyball.performance.percentiles import percentiles  # with SciPy, which planning by means does without

    metric, level = measure

    def seen(some: Queues, rates: Floats) -> Floats:
        if level is None:
            means = some.analyze(rates)
            return {"ttft": means.ttft_s, "e2e": means.response_s}.get(metric, means.itl_s)
        found = percentiles(some, rates, (level,))
        return {"ttft": found.ttft_s, "e2e": found.e2e_s}.get(metric, found.itl_s)[:, 0]

    return _lowered(queues, seen, limits, best)


def _lowered(queues: Queues, seen: Callable[[Queues, Floats], Floats], limits: Floats, best: Floats) -> Floats:
    """Rates lowered, by halving, to where what grows with load stays within its limits; NaN where it never does."""
    best = best.copy()
    rows = np.flatnonzero(np.isfinite(limits) & np.isfinite(best))
    if rows.size:
        rows = rows[seen(queues.take(rows), best[rows]) > limits[rows]]
    if not rows.size:
        return best
    some, most = queues.take(rows), limits[rows]
    low, high = some.min_rate_rps.copy(), best[rows]
    never = seen(some, low) > most
    for _ in range(_HALVINGS):
        middle = np.sqrt(low * high)
        over = seen(some, middle) > most
        low, high = np.where(over, low, middle), np.where(over, middle, high)
    best[rows] = np.where(never, np.nan, low)
    return best


def _seen(queues: Queues, rates: Floats) -> Floats:
    """TTFT and ITL at rates [C, R]: [C, R, 2]."""
    metrics = queues.analyze(rates)
    return np.stack((metrics.ttft_s, metrics.itl_s), axis=2)


def _search(queues: Queues, which: Ints, targets: Floats, sign: Floats, distance: Floats) -> Floats:
    """Rates [P] at which TTFT (which = 0) or ITL (1) just meets a target, one each of the prepared replicas.

    `distance` [2, P] is 1 - target / latency at both ends, below 0 at the lower one; waits grow like the inverse of
    what is left of the capacity, so this is nearly straight. Brackets shrink by the Illinois rule (secant steps, the
    end that stays twice counting half; Dowell and Jarratt, 1971), at times by half, to close in on a jump as well.
    """
    low, high = queues.min_rate_rps, queues.max_rate_rps
    below, above = distance
    found = low.copy()
    at = np.arange(len(low))  # where in `found` each replica still searched for stands
    stayed = np.zeros(len(low))  # +1 the upper end moved last, -1 the lower
    for turn in count(1):
        share = np.clip(below / (below - above), 0.001, 0.999) if turn % 8 else 0.5
        rate = low + share * (high - low)
        metrics = queues.analyze(rate)
        seen = sign * (1 - targets / np.where(which == 0, metrics.ttft_s, metrics.itl_s))
        over = seen > 0
        below = np.where(over, below * np.where(stayed > 0, 0.5, 1.0), seen)
        above = np.where(over, seen, above * np.where(stayed < 0, 0.5, 1.0))
        low, high, stayed = np.where(over, low, rate), np.where(over, rate, high), np.where(over, 1.0, -1.0)
        met = np.abs(seen) <= _TOLERANCE
        found[at] = np.where(met, rate, low)
        going = np.flatnonzero(~met & (high - low > _NARROW * high))
        if not going.size:
            break
        if going.size < len(at):
            queues, at, which, targets, sign = queues.take(going), at[going], which[going], targets[going], sign[going]
            low, high, below, above, stayed = (v[going] for v in (low, high, below, above, stayed))
    return found


@dataclass(frozen=True, slots=True, eq=False)
class BestBatch:
    """The answer of `optimal_batch`, each array [C]."""

    batch: Ints  # 1 where infeasible
    batch_itl: Ints  # largest batch whose ITL keeps its target, waiting apart
    batch_prefill: Ints
    anchor_rps: Floats  # throughput at the batch ceiling; 0 where infeasible
    sized: Sized  # at `batch`


def optimal_batch(model: QueueModel, replicas: Replicas, goals: Goals) -> BestBatch:
    """The smallest batch that yields at least 99 % of the throughput at the ceiling `max_batch`, in at most 8 sizings.

    A smaller batch makes tokens come faster and holds less memory. With the original's reading (`compat`) a target left
    unset counts as one that nothing keeps, so the search ends at batches of 1 to 3. Corrected: it is ignored, the
    ceiling is lowered to where the rate of service peaks, and without a TTFT target a queue must stay stable.
    """
    order = list(blocks(replicas))
    parts = [_optimal_block(model, replicas.take(rows), goals.take(rows)) for rows in order]
    place = np.argsort(np.concatenate(order))
    arrays = (f for f in BestBatch.__slots__ if f != "sized")
    return BestBatch(
        sized=_joined([part.sized for part in parts], place),
        **{f: np.concatenate([getattr(part, f) for part in parts])[place] for f in arrays},
    )


def _optimal_block(model: QueueModel, replicas: Replicas, goals: Goals) -> BestBatch:
    queues = model.prepare(replicas)
    ceiling = queues.best_batch  # the original's reading has it at max_batch
    if queues.compat:
        itl_s, prefill_s = (np.where(np.isfinite(v), v, 0.0) for v in (goals.itl_s, goals.ttft_s))
    else:
        itl_s, prefill_s = goals.itl_s, goals.ttft_s
        goals = dataclasses.replace(goals, stable=goals.stable | np.isinf(goals.ttft_s))

    def sized_at(rows: Ints, batch: Ints) -> Sized:
        return size(model.prepare(dataclasses.replace(replicas.take(rows), max_batch=batch)), goals.take(rows))

    def throughput(sized: Sized) -> Floats:
        return np.nan_to_num(sized.metrics.throughput_rps)

    by_itl, by_prefill = (np.minimum(b, ceiling) for b in queues.batch_within(itl_s=itl_s, prefill_s=prefill_s))
    every = np.arange(len(replicas))
    anchor = throughput(sized_at(every, ceiling))
    enough = (1 - _GIVEN_AWAY / 2) * anchor
    low = np.maximum(np.minimum(by_itl, by_prefill), 1)
    high = np.maximum(np.minimum(ceiling, np.maximum(3 * np.maximum(by_itl, by_prefill), low + 1)), low)
    for _ in range(_PROBES):
        rows = np.flatnonzero((low < high) & (anchor > 0))
        if not rows.size:
            break
        middle = (low[rows] + high[rows]) // 2
        good = throughput(sized_at(rows, middle)) >= enough[rows]
        high[rows] = np.where(good, middle, high[rows])
        low[rows] = np.where(good, low[rows], middle + 1)
    batch = np.where(anchor > 0, high, 1)
    answer = sized_at(every, batch)
    if not queues.compat and (short := throughput(answer) < (1 - _GIVEN_AWAY) * anchor).any():
        batch = np.where(short, ceiling, batch)  # the bracket missed it: keep the ceiling
        answer = sized_at(every, batch)
    return BestBatch(batch, by_itl, by_prefill, anchor, answer)


def blocks(replicas: Replicas) -> Iterator[Ints]:
    """Rows in blocks of like batch sizes, so that ragged chains pad little and a block fits the cache."""
    order = np.argsort(replicas.max_batch, kind="stable")
    first = 0
    while first < len(order):
        length = max(_BLOCK // int(replicas.max_batch[order[first]]), 1)
        while length > 1 and int(replicas.max_batch[order[min(first + length, len(order)) - 1]]) * length > 2 * _BLOCK:
            length //= 2
        yield order[first : first + length]
        first += length


def size_replicas(model: QueueModel, replicas: Replicas, goals: Goals) -> Sized:
    """`size` for any number of replicas, block by block."""
    order = list(blocks(replicas))
    parts = [size(model.prepare(replicas.take(rows)), goals.take(rows)) for rows in order]
    place = np.argsort(np.concatenate(order))
    return _joined(parts, place)


def analyze_replicas(model: QueueModel, replicas: Replicas, rates_rps: Floats) -> Metrics:
    """Metrics of any number of replicas, each at one arrival rate."""
    order = list(blocks(replicas))
    parts = [model.prepare(replicas.take(rows)).analyze(rates_rps[rows]) for rows in order]
    return _concatenated(parts, np.argsort(np.concatenate(order)))


def _concatenated(parts: list[Metrics], place: Ints) -> Metrics:
    return Metrics(*(np.concatenate([getattr(part, f) for part in parts])[place] for f in Metrics.__slots__))


def _joined(parts: list[Sized], place: Ints) -> Sized:
    arrays = (f for f in Sized.__slots__ if f != "metrics")
    return Sized(
        metrics=_concatenated([part.metrics for part in parts], place),
        **{f: np.concatenate([getattr(part, f) for part in parts])[place] for f in arrays},
    )
