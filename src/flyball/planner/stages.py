"""Servers whose prefill and decode run on replicas of their own, planned as two servers in a row.

Each stage is a server like any other, so that a solver may give it its own accelerator and number of replicas: prefill
has the prompts and the promise of a first token, decode the answers, cached prompts and the promise of a gap
(`flyball.performance.disaggregation`). Losses and throughput are promised by both.
"""

from __future__ import annotations

from dataclasses import replace

from flyball.core.errors import InvalidInput
from flyball.core.fleet import FleetSpec, ServerSpec, ServiceClass, Targets

PREFILL, DECODE = "/prefill", "/decode"  # ends of the stages' names


def split_stages(spec: FleetSpec, names: frozenset[str]) -> FleetSpec:
    """The fleet with these servers, by name, in two stages."""
    if not names:
        return spec
    servers: list[ServerSpec] = []
    for server in spec.servers:
        servers += _stages(server) if server.name in names else [server]
    split = {s.service_class for s in spec.servers if s.name in names}
    classes = [part for c in spec.service_classes if c.name in split for part in _halves(c)]
    return replace(spec, servers=tuple(servers), service_classes=(*spec.service_classes, *classes))


def _stages(server: ServerSpec) -> list[ServerSpec]:
    demand = server.demand
    if demand.output_tokens <= 1 or not demand.input_tokens:
        raise InvalidInput(
            f"server {server.name} is disaggregated, with {demand.input_tokens:g} tokens in and "
            f"{demand.output_tokens:g} out; it takes a prompt, and answers of more than one token"
        )
    if server.current.accelerator:
        raise InvalidInput(f"server {server.name} is disaggregated and cannot keep its current placement; leave it out")
    return [
        replace(
            server, name=server.name + PREFILL, service_class=server.service_class + PREFILL,
            demand=replace(demand, output_tokens=0.0),
        ),
        replace(
            server, name=server.name + DECODE, service_class=server.service_class + DECODE,
            demand=replace(demand, output_tokens=demand.output_tokens - 1, prefix_hit=1.0),
        ),
    ]  # fmt: skip


def _halves(service: ServiceClass) -> list[ServiceClass]:
    def kept(targets: Targets, metric: str) -> Targets:
        if any(bound.metric == "e2e" for bound in targets.bounds):
            raise InvalidInput(
                f"class {service.name!r} bounds e2e, which no stage of a disaggregated server can promise by itself; "
                "bound ttft and itl"
            )
        bounds = tuple(b for b in targets.bounds if b.metric == metric)
        if metric == "ttft":
            return replace(targets, itl_s=None, output_tps=None, bounds=bounds)
        return replace(targets, ttft_s=None, bounds=bounds)

    return [
        replace(service, name=service.name + end, targets={m: kept(t, metric) for m, t in service.targets.items()})
        for end, metric in ((PREFILL, "ttft"), (DECODE, "itl"))
    ]
