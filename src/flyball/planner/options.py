"""What one replica of a server can take on each accelerator: the currency that the fleet's loop counts in.

The queue model gives means, a promise may be made to each request: then the means are held so far under the limits
that the given share of requests keeps them. The shares in between are settled where the plan is rehearsed
(`flyball.planner.rehearsal`) and by what is measured (`Correction` in `flyball.planner.loop`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from flyball.core.fleet import Accelerator, FleetSpec, LatencyProfile, ServerSpec, Targets
from flyball.performance.queueing import Metrics, Replicas, queue_model
from flyball.performance.sizing import Goals, Sized, size
from flyball.planner.problem import BATCH_CEILING

DEFAULT_INPUT_TOKENS, DEFAULT_OUTPUT_TOKENS = 512.0, 128.0  # of a server that has said nothing and seen nothing
_ALONE = 1 / 6  # of a replica, given away to chance
_STEPS_PER_DOUBLING = 16  # lengths are rounded so: a capacity is worked out once for loads within 4 %


@dataclass(frozen=True, slots=True, kw_only=True)
class Margins:
    """How far below its limit a mean is held, as a share of the limit; 1 promises the mean itself."""

    ttft: float = 1.0
    itl: float = 1.0

    @classmethod
    def for_share(cls, share: float | None) -> Margins:
        """For a promise to this share of requests; None: to their mean.

        A request's mean gap is a mean already; requests differ by which prefills they met, some five hundredths of the
        limit for each e-fold of the share left out (simulated: benchmarks/fleet_control.py's law and lengths). Times to
        first token spread more: half the limit is held.
        """
        if share is None:
            return cls()
        return cls(ttft=0.5, itl=1.0 / (1.0 + 0.05 * math.log(1.0 / (1.0 - share))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A server on an accelerator: what one replica takes, costs and holds."""

    accelerator: Accelerator
    profile: LatencyProfile
    capacity_rps: float  # within the promise
    mean_capacity_rps: float  # with the means just at the limits
    saturation_rps: float  # the most it can serve at all
    concurrency: float  # requests in its batch at `capacity_rps`
    ttft_s: float  # means at `capacity_rps`
    itl_s: float
    max_batch: int
    binding: str  # what limits `capacity_rps`: ttft, itl or saturation

    @property
    def name(self) -> str:
        """The accelerator's."""
        return self.accelerator.name

    @property
    def cost_per_h(self) -> float:
        """Of one replica."""
        return self.accelerator.cost_per_h * self.profile.accelerators

    @property
    def cards(self) -> int:
        """Of the accelerator's type, for one replica."""
        return self.accelerator.units * self.profile.accelerators

    def takes_rps(self, replicas: int) -> float:
        """What some replicas together take within the promise: with more to choose from, chance meets a request less.

        The first counts for five sixths, each further one for a whole (simulated, least loaded of 1 to 6).
        """
        return max(replicas - _ALONE, 0.0) * self.capacity_rps

    def replicas(self, rate_rps: float) -> int:
        """The fewest that take a rate within the promise."""
        return math.ceil(rate_rps / self.capacity_rps + _ALONE - 1e-9) if rate_rps > 0 else 0


@dataclass(frozen=True, slots=True)
class Sizer:
    """Sizes replicas and remembers the answers; the same question always has the same answer."""

    spec: FleetSpec
    share: float | None = 0.95  # of requests that shall see what was promised; None: their mean
    answers: dict[tuple[object, ...], tuple[Option, ...] | str] = field(default_factory=dict)

    def options(
        self, server: ServerSpec, input_tokens: float, output_tokens: float, profiles: tuple[LatencyProfile, ...]
    ) -> tuple[Option, ...] | str:
        """Every accelerator that can keep the promise, cheapest per request first; or why there is none."""
        lengths = _rounded(input_tokens, DEFAULT_INPUT_TOKENS), _rounded(output_tokens, DEFAULT_OUTPUT_TOKENS)
        key = (server.name, *lengths, profiles)
        if key not in self.answers:
            self.answers[key] = _options(self.spec, server, *lengths, profiles, self.share)
        return self.answers[key]


def _rounded(tokens: float, default: float) -> float:
    """To the nearest sixteenth of a doubling, so that small changes of the mean ask nothing new."""
    if math.isnan(tokens):
        return default
    if tokens <= 0:
        return 0.0
    return math.exp2(round(math.log2(tokens) * _STEPS_PER_DOUBLING) / _STEPS_PER_DOUBLING)


def _options(
    spec: FleetSpec,
    server: ServerSpec,
    input_tokens: float,
    output_tokens: float,
    profiles: tuple[LatencyProfile, ...],
    share: float | None,
) -> tuple[Option, ...] | str:
    service = next((c for c in spec.service_classes if c.name == server.service_class), None)
    if service is None:
        return f"its service class {server.service_class!r} is not defined; define it or correct the name"
    targets = service.targets.get(server.model)
    if targets is None:
        return f"class {service.name!r} has no targets for model {server.model!r}; add them"
    accelerators = {a.name: a for a in spec.accelerators}
    usable = [p for p in profiles if p.model == server.model and p.known and p.accelerator in accelerators]
    if server.keep_accelerator and server.current.accelerator:
        usable = [p for p in usable if p.accelerator == server.current.accelerator]
    if not usable:
        return f"model {server.model!r} has no latency profile on any accelerator it may use; measure one (flyball fit)"
    found = [
        option
        for p in usable
        if (option := _option(accelerators[p.accelerator], p, server, targets, input_tokens, output_tokens, share))
    ]
    if not found:
        limits = f"TTFT {_ms(targets.ttft_s)} and ITL {_ms(targets.itl_s)}"
        return f"no accelerator keeps {limits} for model {server.model!r}, even idle; relax them or add a faster one"
    return tuple(sorted(found, key=lambda o: (o.cost_per_h / o.capacity_rps, o.cost_per_h, o.name)))


def _ms(limit_s: float | None) -> str:
    return "unbounded" if limit_s is None else f"{limit_s * 1e3:g} ms"


def _option(
    accelerator: Accelerator,
    profile: LatencyProfile,
    server: ServerSpec,
    targets: Targets,
    input_tokens: float,
    output_tokens: float,
    share: float | None,
) -> Option | None:
    batch = server.max_batch or profile.batch_limit(output_tokens) or BATCH_CEILING
    replicas = Replicas.of(
        alpha_s=profile.alpha_s, beta_s=profile.beta_s, gamma_s=profile.gamma_s, delta_s=profile.delta_s,
        input_tokens=input_tokens, output_tokens=output_tokens if input_tokens else max(output_tokens, 1.0),
        max_batch=batch, max_queue=server.max_queue or batch, max_step_tokens=profile.max_step_tokens,
    )  # fmt: skip
    queues = queue_model(profile.queue_model).prepare(replicas)

    def sized(margins: Margins) -> Sized:
        ttft_s, itl_s = (limit or math.inf for limit in (targets.ttft_s, targets.itl_s))
        unbounded = math.isinf(ttft_s) or targets.output_tps is not None
        return size(queues, Goals.of(1, ttft_s=ttft_s * margins.ttft, itl_s=itl_s * margins.itl, stable=unbounded))

    mean, held = sized(Margins()), sized(Margins.for_share(share))
    if not mean.feasible[0]:
        return None
    best = held if held.feasible[0] else mean  # idle it keeps the mean alone: the least load it can be given
    rate = float(best.rate_rps[0]) if held.feasible[0] else float(queues.min_rate_rps[0])
    seen: Metrics = queues.analyze(np.array([rate]))
    return Option(
        accelerator=accelerator,
        profile=profile,
        capacity_rps=rate,
        mean_capacity_rps=float(mean.rate_rps[0]),
        saturation_rps=float(queues.capacity_rps[0]),
        concurrency=float(seen.in_service[0]),
        ttft_s=float(seen.ttft_s[0]),
        itl_s=float(seen.itl_s[0]),
        max_batch=batch,
        binding=_binding(best, targets),
    )


def _binding(sized: Sized, targets: Targets) -> str:
    rates: Mapping[str, float] = {
        "TTFT": float(sized.rate_ttft_rps[0]) if targets.ttft_s else math.inf,
        "ITL": float(sized.rate_itl_rps[0]) if targets.itl_s else math.inf,
        "saturation": float(sized.rate_stable_rps[0]),
    }
    return min(rates, key=lambda name: rates[name])
