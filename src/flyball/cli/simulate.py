"""`flyball simulate`: a controller by name on a load, in virtual time: promises kept, cost, GPU-hours, a time-line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flyball.cli.load_options import Duration, Rate, SloBounds, Speed, Trace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from flyball.adapters.simulated import SimulatedWorld
    from flyball.adapters.simulated_report import FleetReport
    from flyball.core.fleet import FleetSpec, LatencyProfile
    from flyball.core.slo import Slo
    from flyball.performance.simulator import Requests
    from flyball.planner.loop import FleetLoop

_SERVER, _ACCELERATOR = "server", "GPU"


def run(
    trace: Trace = "azure-conv",
    controller: Annotated[
        str,
        typer.Option(
            help="flyball; a rule of the field: hpa, keda, kpa, saturation-v1, saturation-v2, throughput, skyserve, "
            "inferno; several joined by +; or fixed:N."
        ),
    ] = "flyball",
    slo: SloBounds = None,
    profile: Annotated[
        Path | None, typer.Option(help="A measured profile from `flyball fit`; default: 9 ms, .03 ms, 6e-5 ms.")
    ] = None,
    kv_tokens: Annotated[int, typer.Option(help="Tokens that a replica's KV cache holds.", min=16)] = 524_288,
    max_batch: Annotated[int, typer.Option(help="Most sequences in a step, where the profile states none.")] = 256,
    prefix_caching: Annotated[bool, typer.Option(help="Share equal beginnings of prompts.")] = True,
    cold_start: Annotated[float, typer.Option(help="Seconds until a new replica is ready.", min=0)] = 60.0,
    start: Annotated[int, typer.Option(help="Replicas that are ready at the beginning.", min=0)] = 1,
    router: Annotated[
        Literal["round_robin", "least_loaded", "prefix_affine"], typer.Option(help="Who gets a request.")
    ] = "least_loaded",
    rate: Rate = None,
    speed: Speed = 1.0,
    duration: Duration = None,
    price: Annotated[float, typer.Option(help="Of a replica an hour.", min=0)] = 1.0,
    mean_life: Annotated[float | None, typer.Option(help="Mean seconds until a replica fails; default: never.")] = None,
    detail: Annotated[
        Literal["steps", "requests"], typer.Option(help="requests: several times faster, nearly as exact.")
    ] = "steps",
    seed: Annotated[int, typer.Option(help="Settles arrivals (with --rate) and failures.", min=0)] = 0,
    picture: Annotated[Path | None, typer.Option(help="Write the time-line as an SVG file.")] = None,
    output: Annotated[
        Literal["table", "json"], typer.Option("--format", help="json: one object, latencies in seconds.")
    ] = "table",
) -> None:
    """Run a controller on a load in virtual time, and say what it kept and what it cost."""
    import json
    import math
    from dataclasses import replace

    from rich.console import Console

    from flyball.cli import require

    require("plan", "scipy")

    from flyball.adapters.simulated import SimulatedFleet, SimulatedServer, SimulatedWorld, govern
    from flyball.core.fleet import Accelerator
    from flyball.core.slo import Slo, SloBound
    from flyball.performance.simulator import Law

    promised = Slo.from_bounds(SloBound.parse(text) for text in slo or ("p95_ttft<200ms", "mean_itl<15ms"))
    measured = _profile(profile, max_batch)
    loop, count = _controller(controller, measured, promised, cold_start, price)
    law = replace(Law.of(measured, kv_tokens=kv_tokens), prefix_caching=prefix_caching, detail=detail)
    world = SimulatedWorld(
        servers=(
            SimulatedServer(
                name=_SERVER,
                laws={_ACCELERATOR: law},
                slo=promised,
                start={_ACCELERATOR: start if count is None else count},
            ),
        ),
        accelerators=(Accelerator(name=_ACCELERATOR, type=_ACCELERATOR, cost_per_h=price),),
        cold_start_s=cold_start,
        router=router,
        mean_life_s=mean_life or math.inf,
        scrape_s=min(5.0, loop.period_s) if loop else 5.0,
    )
    fleet = SimulatedFleet(world, _load(trace, rate, speed, duration, seed), seed=seed)
    govern(fleet, loop, until_s=duration or math.inf)
    report = fleet.finish()
    if picture is not None:
        _draw(report, picture, f"{controller} on {trace}, {cold_start:g} s to start a replica")
    if output == "json":
        typer.echo(json.dumps(_as_json(report, controller, trace)))
    else:
        Console().print(_table(report, f"{controller} on {trace}: {report.duration_s / 60:.1f} min", world))


def _profile(path: Path | None, max_batch: int) -> LatencyProfile:
    from dataclasses import replace

    from flyball.adapters.profile_files import read_profiles
    from flyball.core.errors import InvalidInput
    from flyball.core.fleet import LatencyProfile

    if path is None:
        return LatencyProfile(
            model="model",
            accelerator=_ACCELERATOR,
            alpha_s=9e-3,
            beta_s=3e-5,
            gamma_s=6e-8,
            max_batch=max_batch,
            queue_model="v3-engine",
        )
    found = read_profiles(path)
    if len(found) != 1:
        raise InvalidInput(f"{path} holds {len(found)} profiles; give a file with the one of the replicas to simulate")
    return replace(found[0], accelerator=_ACCELERATOR, max_batch=found[0].max_batch or max_batch)


def _controller(
    name: str, profile: LatencyProfile, slo: Slo, cold_start_s: float, price: float
) -> tuple[FleetLoop | None, int | None]:
    """The loop, or the fixed count in place of one."""
    from flyball.core.errors import InvalidInput
    from flyball.planner.loop import LoopSettings, controller

    if name.startswith("fixed:"):
        number = name.removeprefix("fixed:")
        if not number.isdecimal():
            raise InvalidInput(f"{number!r} is not a number of replicas; write fixed:2")
        return None, int(number)
    spec = _spec(profile, slo, price)
    settings = LoopSettings(start_up_s=cold_start_s or 1.0)
    return controller("slo" if name == "flyball" else name, spec, settings), None


def _spec(profile: LatencyProfile, slo: Slo, price: float) -> FleetSpec:
    from flyball.core.fleet import Accelerator, FleetSpec, ServerSpec, ServiceClass, Targets

    targets = Targets(ttft_s=slo.ttft_s, itl_s=slo.tpot_s)
    return FleetSpec(
        accelerators=(Accelerator(name=_ACCELERATOR, type=_ACCELERATOR, cost_per_h=price),),
        profiles=(profile,),
        service_classes=(ServiceClass(name="class", targets={profile.model: targets}),),
        servers=(ServerSpec(name=_SERVER, service_class="class", model=profile.model, min_replicas=1),),
        unlimited=True,
    )


def _load(trace: str, rate_rps: float | None, speed: float, duration_s: float | None, seed: int) -> Iterator[Requests]:
    """The trace streamed at its own timing, or Poisson arrivals with its lengths."""
    from dataclasses import replace
    from itertools import takewhile

    from flyball.adapters.traces import read_trace, stream_trace, trace_path
    from flyball.core.errors import InvalidInput
    from flyball.performance.request_streams import Rates, from_specs, poisson_process

    path = trace_path(trace)
    if rate_rps is not None:
        if duration_s is None:
            raise InvalidInput("Poisson arrivals (--rate) have no end of their own; give --duration")
        lengths = [(r.input_tokens, r.output_tokens) for r in read_trace(path)]
        return poisson_process(Rates.of([0.0], [rate_rps]), lengths, duration_s=duration_s, seed=seed)
    if not speed > 0:
        raise InvalidInput(f"a trace cannot be replayed at speed {speed:g}; give a factor above 0, such as 2")
    rows = (replace(r, arrival_s=r.arrival_s / speed) for r in stream_trace(path))
    if duration_s is not None:
        rows = (r for r in takewhile(lambda r: r.arrival_s <= duration_s, rows))
    return from_specs(rows)


def _draw(report: FleetReport, path: Path, title: str) -> None:
    from flyball.adapters.simulated_picture import picture

    path.write_text(picture(report.servers[0], title), encoding="utf-8")


def _as_json(report: FleetReport, controller: str, trace: str) -> dict[str, object]:
    server = report.servers[0]
    latencies = {
        f"p{q}_{name}_s": sketch.percentile_s(q) for name, sketch in server.latencies.items() for q in (50, 95, 99)
    }
    return {
        "controller": controller, "trace": trace, "duration_s": report.duration_s, "requests": server.arrivals,
        "lost": server.lost, "attainment": report.attainment, "gpu_hours": report.gpu_hours, "cost": report.cost,
        "actions": report.actions, **latencies,
    }  # fmt: skip


def _table(report: FleetReport, title: str, world: SimulatedWorld) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    server = report.servers[0]
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    hours = report.duration_s / 3600
    rows = (
        ("requests", f"{server.arrivals:,}"),
        ("SLO attainment", f"{report.attainment:.2%}"),
        ("lost", f"{server.lost:,}"),
        ("GPU-hours", f"{report.gpu_hours:.3f}"),
        ("mean replicas", f"{report.gpu_hours / hours:.2f}" if hours else "-"),
        ("cost", f"{report.cost:,.2f}"),
        ("scale actions", str(report.actions)),
        *(
            (f"{name.upper()} p50 / p95 / p99", " / ".join(f"{1e3 * s.percentile_s(q):,.0f} ms" for q in (50, 95, 99)))
            for name, s in server.latencies.items()
        ),
        ("router", world.router),
    )
    for row in rows:
        table.add_row(*row)
    return table
