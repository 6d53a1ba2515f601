"""`flyball control`: the fleet's loop outside a cluster; states or Prometheus in, plans out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from flyball.adapters.fleet_export import FleetMetrics
    from flyball.core.fleet import FleetSpec
    from flyball.planner.cycle import Turn
    from flyball.planner.loop import FleetLoop, LoopMemory


def run(
    spec: Annotated[Path, typer.Argument(help="The fleet: our YAML, or llm-inferno's SystemData.")],
    states: Annotated[
        Path | None, typer.Option(help="Read the fleet's states from this file, one JSON object a line.")
    ] = None,
    prometheus: Annotated[
        str | None, typer.Option(help="Read them from the Prometheus server at this address.")
    ] = None,
    engine: Annotated[
        Literal["flyball", "vllm", "sglang"], typer.Option(help="Whose names the metrics in Prometheus have.")
    ] = "flyball",
    label: Annotated[str, typer.Option(help="Label of the metrics that holds the server's name.")] = "server",
    controller: Annotated[
        str, typer.Option(help="Analyzer, or several joined by +: any up counts, down only if all say so.")
    ] = "slo",
    forecast: Annotated[
        str, typer.Option(help="naive, ewma, holt, seasonal or portfolio (the least wrong of them lately).")
    ] = "portfolio",
    period: Annotated[float, typer.Option(help="Seconds between two decisions.", min=1)] = 15.0,
    start_up: Annotated[
        float, typer.Option(help="Seconds a replica takes to start, until one was seen.", min=1)
    ] = 120.0,
    budget: Annotated[
        float | None, typer.Option(help="Most cost per hour, of all replicas at any instant.", min=0)
    ] = None,
    rehearse: Annotated[
        bool, typer.Option(help="Try each change in the simulator, on the recent load, before it is decided.")
    ] = True,
    calibrate: Annotated[bool, typer.Option(help="Correct the spec's latency profiles by what replicas show.")] = True,
    calibrations: Annotated[
        Path | None, typer.Option(help="File in which what is learnt of latencies is kept over restarts.")
    ] = None,
    turns: Annotated[int, typer.Option(help="Decisions to take from Prometheus; 0: until interrupted.", min=0)] = 0,
    metrics_port: Annotated[
        int | None, typer.Option(help="Serve the decisions as metrics (wva_* and flyball_*) on this port.", min=0)
    ] = None,
    output: Annotated[Literal["text", "json"], typer.Option("--format", help="json: one object a decision.")] = "text",
) -> None:
    """Decide replicas of every server, and say why; nothing is changed anywhere (a dry run)."""
    from flyball.cli import require

    require("plan", "scipy")
    from flyball.adapters.fleet_files import read_fleet
    from flyball.core.errors import InvalidInput
    from flyball.planner.loop import LoopSettings
    from flyball.planner.loop import controller as controller_named
    from flyball.planner.rehearsal import RehearsedLoop

    if (states is None) == (prometheus is None):
        raise InvalidInput("give where the fleet's state is read: either --states FILE or --prometheus URL")
    fleet = read_fleet(spec)
    settings = LoopSettings(period_s=period, forecast=forecast, start_up_s=start_up, budget_per_h=budget)
    loop = controller_named(controller, fleet, settings)
    if rehearse:
        loop = RehearsedLoop(fleet, loop.settings)
    if calibrate:
        loop = _calibrated(loop, calibrations)
    elif calibrations is not None:
        raise InvalidInput(
            "--calibrations was given with --no-calibrate, where nothing is learnt; leave one of them out"
        )
    if states is not None:
        told = _from_states(loop, states, calibrations)
    else:
        require("cluster", "httpx", "prometheus_client")
        assert prometheus is not None
        told = _from_prometheus(loop, fleet, prometheus, engine, label, turns, _metrics(metrics_port), calibrations)
    for one in told:
        typer.echo(json.dumps(_as_json(one)) if output == "json" else _as_text(one))


def _calibrated(loop: FleetLoop, file: Path | None) -> FleetLoop:
    """The loop, learning from where an earlier run left off."""
    from flyball.adapters.calibration_files import read_calibrations
    from flyball.planner.calibrated_loop import CalibratedLoop

    kind, settings = type(loop), loop.settings
    return CalibratedLoop(lambda spec: kind(spec, settings), loop.spec, read_calibrations(file) if file else ())


def _keep(memory: LoopMemory, file: Path | None) -> None:
    if file is not None:
        from flyball.adapters.calibration_files import write_calibrations
        from flyball.planner.calibrated_loop import calibrations

        write_calibrations(file, calibrations(memory))


def _from_states(loop: FleetLoop, path: Path, kept: Path | None) -> Iterator[Turn]:
    from flyball.adapters.state_files import read_states
    from flyball.planner.cycle import Turn

    memory = loop.start()
    for state in read_states(path):
        decision, memory = loop.decide(state, memory)
        _keep(memory, kept)
        yield Turn(state=state, decision=decision)


def _from_prometheus(
    loop: FleetLoop,
    fleet: FleetSpec,
    url: str,
    engine: str,
    label: str,
    turns: int,
    metrics: FleetMetrics | None,
    kept: Path | None,
) -> Iterator[Turn]:
    from threading import Event

    from flyball.adapters.prometheus import PrometheusClient, PrometheusSource, ServerQuery, gateway_queries
    from flyball.planner.cycle import turn

    queries = {
        s.name: ServerQuery(
            engine=engine, matchers={label: s.name}, accelerator=s.current.accelerator, **gateway_queries(s.name)
        )
        for s in fleet.servers
    }
    memory, count = loop.start(), 0
    with PrometheusClient(url) as client:
        source = PrometheusSource(client, queries)
        while True:
            told, memory = turn(source, loop, None, memory)
            _keep(memory, kept)
            if metrics is not None:
                metrics.record(told)
            yield told
            count += 1
            if count == turns:
                return
            Event().wait(loop.period_s)


def _metrics(port: int | None) -> FleetMetrics | None:
    if port is None:
        return None
    from prometheus_client import start_http_server

    from flyball.adapters.fleet_export import FleetMetrics

    metrics = FleetMetrics()
    start_http_server(port, addr="127.0.0.1", registry=metrics.registry)
    return metrics


def _as_json(told: Turn) -> dict[str, Any]:
    if told.decision is None or told.state is None:
        return {"held": told.blind}
    servers = {}
    for name, explained in told.decision.explanations.items():
        servers[name] = {
            "replicas": dict(told.decision.replicas.get(name, {})),
            "held": explained.held,
            "cost_per_h": explained.cost_per_h if math.isfinite(explained.cost_per_h) else None,
            "binding": explained.binding,
            "reasons": list(told.decision.reasons.get(name, ())),
            "alternatives": [
                {"replicas": dict(a.replicas), "cost_per_h": a.cost_per_h, "why_not": a.why_not}
                for a in explained.alternatives
            ],
        }
    return {"now_s": told.state.now_s, "servers": servers}


def _as_text(told: Turn) -> str:
    if told.decision is None or told.state is None:
        return told.blind
    lines = [f"at {told.state.now_s:.0f} s"]
    for name, explained in told.decision.explanations.items():
        counts = ", ".join(f"{n} on {a}" for a, n in told.decision.replicas.get(name, {}).items()) or "as it is"
        lines.append(f"  {name}: {counts} ({explained.cost_per_h:g} an hour), by {explained.binding}")
        lines += [f"    {reason}" for reason in told.decision.reasons.get(name, ())]
        lines += [
            f"    or {', '.join(f'{n} on {x}' for x, n in a.replicas.items())} ({a.cost_per_h:g} an hour): {a.why_not}"
            for a in explained.alternatives
        ]
    return "\n".join(lines)
