"""A small honest engine for the tuner's tests: continuous batching in virtual time, Target and Load in one.

Each step serves up to max_num_seqs running requests, one token each, and fills the rest of max_num_batched_tokens with
prompt tokens of those admitted, first come first served. A step takes

    base_s + token_s · (tokens in the step) + seq_s · (sequences in the step)²

so that few sequences queue, many sequences slow each other, and large budgets delay the running ones: the optimum lies
inside. `noise` multiplies each step's time by a lognormal number, `crash` makes a region of the space fail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from flyball.core.errors import EngineFailed, InvalidKnob
from flyball.core.knobs import Configuration, Knob, Space, Value, generation_of
from flyball.core.metrics import MetricsWindow, RequestTrace
from flyball.core.ports import LoadProgress
from flyball.core.slo import Slo
from flyball.core.workload import RequestSpec, Workload

KNOBS = Space((
    Knob(name="max_num_seqs", kind="int", default=64, low=1, high=64, log=True),
    Knob(name="max_num_batched_tokens", kind="int", default=2048, low=1, high=2048, log=True),
    Knob(name="prefix_caching", kind="bool", default=True),
))  # fmt: skip
CONSTRAINTS = ("max_num_seqs <= max_num_batched_tokens",)


def never(_: Configuration) -> bool:
    """No configuration does."""
    return False


@dataclass(kw_only=True)
class SimulatedEngine:
    """See the module."""

    base_s: float = 0.004
    token_s: float = 0.00005
    seq_s: float = 0.0001
    noise: float = 0.0
    seed: int = 0
    crash: Callable[[Configuration], bool] = never
    values: dict[str, Value] = field(default_factory=KNOBS.defaults)
    windows: list[Configuration] = field(default_factory=list)  # what was measured, in order

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)

    def space(self) -> Space:
        """Three knobs, of which the last does nothing."""
        return KNOBS

    def configuration(self) -> Configuration:
        """The values in force."""
        return dict(self.values)

    def apply(self, values: Configuration) -> str:
        """All or none."""
        after = self.values | KNOBS.check(values)
        if after["max_num_seqs"] > after["max_num_batched_tokens"]:  # type: ignore[operator]
            raise InvalidKnob("max_num_seqs is over max_num_batched_tokens")
        if self.crash(after):
            raise EngineFailed("out of memory")
        self.values = after
        return generation_of(self.values)

    def run(self, workload: Workload, slo: Slo, generation: str, progress: LoadProgress | None = None) -> MetricsWindow:
        """Replay in virtual time."""
        self.windows.append(dict(self.values))
        traces = self._replay(list(workload.requests))
        if progress is not None:
            progress(len(traces), len(traces))
        end_s = max(t.token_times_s[-1] for t in traces)
        return MetricsWindow(duration_s=end_s, generation=generation, traces=tuple(traces), slo=slo)

    def _replay(self, waiting: list[RequestSpec]) -> list[RequestTrace]:
        seqs, budget = int(self.values["max_num_seqs"]), int(self.values["max_num_batched_tokens"])
        running: list[tuple[RequestSpec, list[int], list[float]]] = []  # request, [prompt tokens left], token times
        done: list[RequestTrace] = []
        now_s = 0.0
        while waiting or running:
            if not running and waiting[0].arrival_s > now_s:
                now_s = waiting[0].arrival_s
            while waiting and len(running) < seqs and waiting[0].arrival_s <= now_s:
                running.append((waiting[0], [waiting[0].input_tokens], []))
                waiting = waiting[1:]
            tokens, produced = 0, []
            for request, left, times in sorted(running, key=lambda r: r[1][0] > 0):  # decodes first
                share = min(left[0] or 1, budget - tokens)
                if share <= 0:
                    continue
                tokens += share
                left[0] = max(0, left[0] - share)
                if left[0] == 0:
                    produced.append((request, times))
            step_s = self.base_s + self.token_s * tokens + self.seq_s * len(running) ** 2
            now_s += step_s * (float(self._rng.lognormal(0, self.noise)) if self.noise else 1.0)
            for _, times in produced:
                times.append(now_s)
            for request, _, times in [r for r in running if len(r[2]) == r[0].output_tokens]:
                done.append(
                    RequestTrace(scheduled_s=request.arrival_s, sent_s=request.arrival_s,
                                 input_tokens=request.input_tokens, output_tokens=request.output_tokens,
                                 token_times_s=tuple(times))
                )  # fmt: skip
            running = [r for r in running if len(r[2]) < r[0].output_tokens]
        return done


def poisson(rate_rps: float = 16.0, count: int = 120, seed: int = 0, inputs: int = 300, outputs: int = 30) -> Workload:
    """Poisson arrivals of geometric-ish lengths."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate_rps, count))
    requests = tuple(
        RequestSpec(arrival_s=float(t), input_tokens=int(i), output_tokens=int(o))
        for t, i, o in zip(
            arrivals - arrivals[0], rng.integers(inputs // 2, inputs * 2, count), rng.integers(5, outputs * 2, count),
            strict=True,
        )
    )  # fmt: skip
    return Workload(requests=requests, source=f"poisson {rate_rps:g} requests/s, {count} requests, seed {seed}")
