"""An engine in virtual time behind the tuner's ports: a `Target` whose knobs set the simulator's law, and a `Load`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from flyball.core.errors import InvalidKnob
from flyball.core.knobs import Configuration, Knob, Space, Value, generation_of
from flyball.core.metrics import MetricsWindow, RequestTrace
from flyball.core.ports import LoadProgress
from flyball.core.slo import Slo
from flyball.core.workload import Workload
from flyball.performance.request_streams import from_specs
from flyball.performance.simulator import DONE, LOST, Law, new_core


class SimulatedEngine:
    """One replica; `law` says how fast it is and how much it holds, the knobs how it batches."""

    def __init__(self, law: Law, *, compiled: bool | None = None) -> None:
        self._law = law
        self._compiled = compiled
        self._space = Space((
            Knob(name="max_num_seqs", kind="int", default=law.max_batch, low=1, high=4096, log=True),
            Knob(name="max_num_batched_tokens", kind="int", default=law.max_step_tokens, low=1, high=65536, log=True),
            Knob(name="prefix_caching", kind="bool", default=law.prefix_caching),
        ))  # fmt: skip
        self._values: dict[str, Value] = self._space.defaults()

    def space(self) -> Space:
        """See `flyball.core.ports.Target`."""
        return self._space

    def configuration(self) -> Configuration:
        """See `flyball.core.ports.Target`."""
        return dict(self._values)

    def apply(self, values: Configuration) -> str:
        """See `flyball.core.ports.Target`."""
        after = self._values | self._space.check(values)
        if int(after["max_num_seqs"]) > int(after["max_num_batched_tokens"]):
            raise InvalidKnob(
                f"max_num_seqs is {after['max_num_seqs']}, more than max_num_batched_tokens "
                f"({after['max_num_batched_tokens']}); each sequence needs a token a step"
            )
        self._values = after
        return generation_of(after)

    def run(self, workload: Workload, slo: Slo, generation: str, progress: LoadProgress | None = None) -> MetricsWindow:
        """See `flyball.core.ports.Load`: the workload on an engine that has served nothing before."""
        core = new_core(1, "round_robin", record_times=True, compiled=self._compiled)
        core.add(0, self._law_in_force())
        for part in from_specs(workload.requests):
            core.offer(part)
        core.close()
        core.run(np.inf)
        core.books().check()
        records, times_s = core.take()
        counts = np.where(records["outcome"] == DONE, records["output"], 0)
        gaps = np.split(times_s, np.cumsum(counts)[:-1])
        traces = [
            RequestTrace(
                scheduled_s=float(r["arrival_s"]),
                sent_s=float(r["arrival_s"]),
                input_tokens=int(r["input"]),
                output_tokens=len(times),
                token_times_s=tuple(times.tolist()),
                error=None if r["outcome"] == DONE else ("lost" if r["outcome"] == LOST else "too_long"),
            )
            for r, times in zip(records, gaps, strict=True)
        ]
        if progress is not None:
            progress(len(traces), len(traces))
        traces.sort(key=lambda t: t.scheduled_s)
        last_s = max(float(times_s.max(initial=0.0)), traces[-1].scheduled_s)
        first_s = traces[0].scheduled_s
        return MetricsWindow(
            duration_s=max(last_s - first_s, 1e-9), generation=generation, traces=tuple(traces), slo=slo
        )

    def _law_in_force(self) -> Law:
        return replace(
            self._law,
            max_batch=int(self._values["max_num_seqs"]),
            max_step_tokens=int(self._values["max_num_batched_tokens"]),
            prefix_caching=bool(self._values["prefix_caching"]),
        )
