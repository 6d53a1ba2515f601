"""What the latency law expects of configurations that were not tried yet: the prior mean of the surrogates.

The law is fitted to a study's finished trials and asked what traffic like theirs would see under every limit of batch
and step. Other knobs are nothing to it. It need not be right: each surrogate learns how far its expectation is to be
trusted (`numerics.gaussian_process`, w), and a law that explains nothing gets little weight.

throughput   of the queue model, at the study's mean load
attainment   product over the promises' limits of the share of requests, or gaps, that stay within them
goodput      throughput · attainment
latencies    percentiles of TTFT, ITL and E2E (`performance.percentiles`), at most a window's length; TPOT taken as ITL

Above `BUSY` of the capacity no stationary queue is asked for: what arrives beyond it waits, and after a share q of a
window of D seconds the wait has grown by q · D · (1 - BUSY · capacity / arrivals).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flyball.core.errors import InvalidInput
from flyball.core.knobs import Configuration
from flyball.core.slo import Slo, SloBound
from flyball.numerics.markov import Floats
from flyball.performance.fit import OPEN_QUEUE, OperatingPoint, fit
from flyball.performance.percentiles import Percentiles, percentiles
from flyball.performance.queueing import DEFAULT_STEP_TOKENS, Replicas, queue_model
from flyball.tuner.bayes import Prediction
from flyball.tuner.law import BATCH_KNOBS, LAW, STEP_KNOBS, limit, operating_point
from flyball.tuner.objective import MARGIN_CAP, Objective
from flyball.tuner.space import Lattice

LEAST = 5  # operating points from which a law of three parameters says more than they do
ENOUGH = 1e-3  # of the fit: a prior mean needs no more digits
LEVELS = (*range(5, 100, 5), 99)  # percentiles between which shares of requests are read
BUSY = 0.95
MOST = 20  # levels of each of the two knobs that are computed; between them the nearest stands in

_Limits = tuple[int, float]  # most requests in a batch, most tokens in a step


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """Predictions for a study; see the module."""

    objective: Prediction
    margins: tuple[Prediction, ...]  # of each promise, in their order


def expectation(
    lattice: Lattice,
    objective: Objective,
    bounds: Sequence[SloBound],
    seen: Sequence[tuple[Configuration, Mapping[str, float]]],
) -> Expectation | None:
    """From finished trials, each with its figures; None while too few can be used, or where the law knows no knob."""
    read = [(operating_point({**lattice.base, **values}, figures), figures) for values, figures in seen]
    points = [point for point, _ in read if isinstance(point, OperatingPoint)]
    limits = _limits(lattice)
    if len(points) < LEAST or len(limits) < 2:
        return None
    try:
        law = fit(points, queue_model(LAW), tolerance=ENOUGH)
    except InvalidInput:
        return None  # windows that no law fits expect nothing
    rate_rps, inputs, outputs = np.mean([(p.arrival_rps, p.input_tokens, p.output_tokens) for p in points], axis=0)
    queues = queue_model(LAW).prepare(
        Replicas.of(
            alpha_s=law.alpha_s, beta_s=law.beta_s, gamma_s=law.gamma_s, input_tokens=inputs, output_tokens=outputs,
            max_batch=[batch for batch, _ in limits], max_step_tokens=[step for _, step in limits],
            max_queue=OPEN_QUEUE,
        )
    )  # fmt: skip
    rates = np.full(len(limits), rate_rps)
    longest_s = float(np.mean([figures["duration_s"] for _, figures in read if "duration_s" in figures]))
    wanted = [bound.percentile for bound in (*bounds, *_statistic(objective)) if bound.percentile is not None]
    levels = sorted({*map(float, LEVELS), *wanted})
    held = np.minimum(rates, BUSY * queues.capacity_rps)
    backlog_s = longest_s * (1 - held / rates)
    view = _View(
        seen=_with_backlog(percentiles(queues, held, levels), backlog_s, levels),
        levels=levels,
        longest_s=longest_s,
        outputs=float(outputs),
        throughput_rps=queues.analyze(rates).throughput_rps,
    )
    nearest = _nearest(limits)

    def told(column: Floats) -> Prediction:
        return lambda values: float(column[nearest(_limits_of({**lattice.base, **lattice.fixed, **values}))])

    return Expectation(
        objective=told(view.objective(objective, Slo.from_bounds(bounds))),
        margins=tuple(told(np.minimum(view.statistic(b) / b.limit_s - 1, MARGIN_CAP)) for b in bounds),
    )


def _with_backlog(seen: Percentiles, backlog_s: Floats, levels: Sequence[float]) -> Percentiles:
    """The same after waits that grow evenly from 0 to `backlog_s` [C]."""
    waits = backlog_s[:, None] * np.array(levels) / 100
    return replace(
        seen,
        ttft_s=seen.ttft_s + waits,
        e2e_s=seen.e2e_s + waits,
        mean_ttft_s=seen.mean_ttft_s + backlog_s / 2,
        mean_e2e_s=seen.mean_e2e_s + backlog_s / 2,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _View:
    """What requests see under each pair of limits; arrays [C]."""

    seen: Percentiles
    levels: Sequence[float]
    longest_s: float
    outputs: float
    throughput_rps: Floats

    def objective(self, objective: Objective, slo: Slo) -> Floats:
        if latency := _statistic(objective):
            return self.statistic(latency[0])
        if objective.metric == "throughput":
            return self.throughput_rps
        if objective.metric == "output_tps":
            return self.throughput_rps * self.outputs
        kept = np.ones(len(self.throughput_rps))
        for metric, limit_s in (("ttft", slo.ttft_s), ("itl", slo.itl_s or slo.tpot_s), ("e2e", slo.e2e_s)):
            if limit_s is not None:
                kept = kept * self._within(metric, limit_s)
        return kept if objective.metric == "attainment" else self.throughput_rps * kept

    def statistic(self, bound: SloBound) -> Floats:
        name = "itl" if bound.metric == "tpot" else bound.metric
        if bound.percentile is None:
            values: Floats = getattr(self.seen, f"mean_{name}_s")
        else:
            values = getattr(self.seen, f"{name}_s")[:, list(self.levels).index(bound.percentile)]
        return np.minimum(values, self.longest_s)

    def _within(self, metric: str, limit_s: float) -> Floats:
        rows: Floats = getattr(self.seen, f"{metric}_s")
        grid = [0.0, *self.levels, 100.0]
        shares = [np.interp(limit_s, [0.0, *row, 2 * row[-1] + 1e-9], grid) / 100 for row in rows.tolist()]
        return np.array(shares)


def _statistic(objective: Objective) -> list[SloBound]:
    """The latency statistic that is the objective, if it is one."""
    try:
        return [SloBound.parse(f"{objective.metric}<1s")]
    except InvalidInput:
        return []


def _limits(lattice: Lattice) -> list[_Limits]:
    """The pairs that the lattice holds, some of each knob's levels standing for the rest."""
    axes = {axis.knob.name: axis.levels for axis in lattice.axes}
    rest = {**lattice.base, **lattice.fixed}
    whole = {name: list(levels) for name, levels in axes.items() if name in (*BATCH_KNOBS, *STEP_KNOBS)}
    pairs = set()
    for batch in _some(whole, BATCH_KNOBS):
        for step in _some(whole, STEP_KNOBS):
            pairs.add(_limits_of({**rest, **batch, **step}))
    return sorted(pair for pair in pairs if pair[0] > 0)


def _some(levels: Mapping[str, Sequence[object]], names: Sequence[str]) -> list[Configuration]:
    name = next((name for name in names if name in levels), None)
    if name is None:
        return [{}]
    of = levels[name]
    chosen = sorted({round(i) for i in np.linspace(0, len(of) - 1, min(len(of), MOST))})
    return [{name: of[i]} for i in chosen]


def _limits_of(values: Configuration) -> _Limits:
    return limit(values, BATCH_KNOBS) or 0, float(limit(values, STEP_KNOBS) or DEFAULT_STEP_TOKENS)


def _nearest(limits: Sequence[_Limits]) -> Callable[[_Limits], int]:
    """The number of the pair nearest to another, by ratio."""
    known = {pair: row for row, pair in enumerate(limits)}
    logs = np.log(np.array(limits))

    def row(pair: _Limits) -> int:
        if pair not in known:
            away = np.abs(logs - np.array([math.log(max(pair[0], 1)), math.log(pair[1])])).sum(axis=1)
            known[pair] = int(np.argmin(away))
        return known[pair]

    return row
