"""Logs of llm-inferno's control loop: one JSON record a cycle, with what was seen, believed, and decided.

Rates are per minute, times in milliseconds, costs in cents per hour. A record states the cost of what runs, so a price
follows from it; accelerators that no server of the cycle uses have none, and are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flyball.adapters.fields import Fields, parse_json
from flyball.adapters.fleet_files import DEFAULT_MAX_QUEUE
from flyball.core.errors import InvalidInput
from flyball.core.fleet import (
    Accelerator,
    Demand,
    FleetSpec,
    LatencyProfile,
    Placement,
    ServerSpec,
    ServiceClass,
    Targets,
)

_MS = 1e-3
_PER_MINUTE = 1 / 60
_BATCH = 256  # where a record names none: llm-inferno's default


@dataclass(frozen=True, slots=True, kw_only=True)
class Cycle:
    """One cycle: the fleet as a spec, and what the original had decided for each server."""

    at: str
    spec: FleetSpec
    theirs: Mapping[str, Placement]
    batches: Mapping[str, int]


def read_cycles(path: Path) -> tuple[Cycle, ...]:
    """Every cycle of a log, in order."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(
            f"cannot read the cycle log {path} ({error}); give a file of one JSON record a line"
        ) from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path.name}:{number}"
            found.append(_cycle(Fields(parse_json(line, where), where)))
    if not found:
        raise InvalidInput(f"the cycle log {path} has no record; give a file of one JSON record a line")
    return tuple(found)


def _cycle(f: Fields) -> Cycle:
    servers = tuple(f.each("servers"))
    prices: dict[str, float] = {}
    for s in servers:
        if replicas := s.whole("replicas"):
            prices[s.text("accelerator")] = s.number("cost") / replicas
    profiles = tuple(
        LatencyProfile(
            model=p.text("model", None),
            accelerator=p.text("acc", None),
            alpha_s=p.number("alpha") * _MS,
            beta_s=p.number("beta") * _MS,
            gamma_s=p.number("gamma") * _MS,
            max_batch=_BATCH,
        )
        for p in f.each("internals")
        if p.text("acc") in prices
    )
    return Cycle(
        at=f.text("ts"),
        spec=FleetSpec(
            accelerators=tuple(Accelerator(name=n, type=n, cost_per_h=c) for n, c in sorted(prices.items())),
            profiles=profiles,
            service_classes=_classes(servers),
            servers=tuple(_server(s) for s in servers),
            capacity={c.text("type", None): c.whole("allocated") + c.whole("available") for c in f.each("capacity")},
            unlimited=not f.items("capacity"),
        ),
        theirs={s.text("name", None): _placement(s) for s in servers},
        batches={s.text("name", None): s.whole("maxBatch") or _BATCH for s in servers},
    )


def _classes(servers: tuple[Fields, ...]) -> tuple[ServiceClass, ...]:
    targets: dict[str, dict[str, Targets]] = {}
    for s in servers:
        promised = Targets(ttft_s=s.number("sloTtft") * _MS or None, itl_s=s.number("sloItl") * _MS or None)
        targets.setdefault(s.text("class"), {})[s.text("model")] = promised
    return tuple(ServiceClass(name=name, targets=by_model) for name, by_model in targets.items())


def _server(s: Fields) -> ServerSpec:
    return ServerSpec(
        name=s.text("name", None),
        service_class=s.text("class"),
        model=s.text("model"),
        demand=Demand(
            arrival_rps=s.number("rpm") * _PER_MINUTE,
            input_tokens=s.number("avgInTok"),
            output_tokens=s.number("avgOutTok"),
        ),
        max_queue=DEFAULT_MAX_QUEUE,
        current=_placement(s),
    )


def _placement(s: Fields) -> Placement:
    return Placement(accelerator=s.text("accelerator"), replicas=s.whole("replicas"), cost_per_h=s.number("cost"))
