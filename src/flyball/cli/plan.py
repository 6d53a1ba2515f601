"""`flyball plan`: which accelerators, how many replicas and which batch keep the promises of a fleet at least cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from flyball.adapters.fields import Fields
    from flyball.core.fleet import FleetPlan, FleetSpec

_PROGRAMS = ("exact", "heterogeneous", "approximate")  # solvers that need HiGHS


def run(
    spec: Annotated[
        Path | None,
        typer.Argument(
            help="llm-inferno's SystemData JSON, a folder of its *-data.json files, our YAML, or Melange's JSON."
        ),
    ] = None,
    output: Annotated[
        Literal["table", "json"], typer.Option("--format", help="json: an AllocationSolution with its totalCost.")
    ] = "table",
    max_queue: Annotated[
        int | None, typer.Option(help="Requests that may wait at a replica, in place of the spec's numbers.", min=0)
    ] = None,
    unlimited: Annotated[
        bool | None,
        typer.Option("--unlimited/--limited", help="Ignore or keep the capacity; default: as the spec says."),
    ] = None,
    profile: Annotated[
        list[Path] | None, typer.Option(help="Measured profiles from `flyball fit`, in place of the spec's.")
    ] = None,
    confidence: Annotated[
        float | None,
        typer.Option(help="Size against the slowest law that measured profiles allow with this confidence, as 0.9."),
    ] = None,
    solver: Annotated[
        str | None,
        typer.Option(
            help="exact, heterogeneous, approximate, greedy or unlimited; default: as the spec says, or else exact."
        ),
    ] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds that the solver may take.", min=0)] = 60.0,
    queue_model: Annotated[
        str | None,
        typer.Option(
            help="Queue model for every server: v3, v3-engine, v3-compat, v2, v1, mm1k, linear; default: the profile's."
        ),
    ] = None,
    what_if: Annotated[
        list[str] | None,
        typer.Option(
            help="A variant to plan beside: load=2, slo:CLASS=0.5, cost:NAME=0.8, capacity:TYPE=16, budget=99."
        ),
    ] = None,
    pareto: Annotated[
        int | None,
        typer.Option(help="Show the least cost of serving more and more requests, at so many points.", min=2),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Show the fewest accelerators for this trace of one server, and a lower bound.")
    ] = None,
    server: Annotated[str | None, typer.Option(help="The server that the trace is of.")] = None,
    window: Annotated[float, typer.Option(help="Seconds of a window of the trace.", min=1)] = 60.0,
    divide: Annotated[
        bool, typer.Option("--divide", help="Of Melange's JSON: let a router divide each bucket's load at will.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Write what --what-if, --pareto or --trace shows to this SVG file.")
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of our YAML, and end.")] = False,
) -> None:
    """Plan a fleet: accelerator, replicas, batch, cost and expected latencies of every server."""
    import json

    from flyball.adapters.fleet_schema import SCHEMA
    from flyball.cli import plan_views, require
    from flyball.core.errors import InvalidInput
    from flyball.planner.confidence import cautious

    if schema:
        typer.echo(json.dumps(SCHEMA, indent=2))
        return
    if spec is None:
        raise InvalidInput("no spec was given; name a file or folder, such as examples/fleet.yaml")
    asked = (bool(what_if), pareto is not None, trace is not None)
    if sum(asked) > 1 or (picture is not None and not any(asked)):
        raise InvalidInput("give one of --what-if, --pareto and --trace at a time; --picture needs one of them")
    as_json = output == "json"
    fields = None if spec.is_dir() else _buckets(spec)
    if fields is not None:
        require("plan", "highspy", "scipy")
        shown = plan_views.buckets(fields, divide=divide, time_limit_s=time_limit)
        plan_views.show(shown, as_json=as_json, picture=None)
        return
    fleet = _fleet(spec, profile or (), max_queue, unlimited)
    if confidence is not None:
        fleet = cautious(fleet, confidence)
    if pareto is not None or solver in _PROGRAMS or (solver is None and not fleet.unlimited and trace is None):
        require("plan", "highspy", "scipy")
    if what_if:
        shown = plan_views.what_if(fleet, what_if, solver=solver, queue_model=queue_model, time_limit_s=time_limit)
    elif pareto is not None:
        shown = plan_views.trade_off(fleet, pareto, queue_model=queue_model, time_limit_s=time_limit)
    elif trace is not None:
        shown = plan_views.trace(fleet, trace, server, window, queue_model=queue_model)
    else:
        _show_plan(fleet, solver, queue_model, time_limit, as_json=as_json)
        return
    plan_views.show(shown, as_json=as_json, picture=picture)


def _buckets(spec: Path) -> Fields | None:
    """The problem of request sizes in a file, if it is one."""
    from flyball.adapters.bucket_files import is_buckets
    from flyball.adapters.fields import read_fields

    fields = read_fields(spec)
    return fields if is_buckets(fields) else None


def _fleet(spec: Path, profiles: Sequence[Path], max_queue: int | None, unlimited: bool | None) -> FleetSpec:
    """The fleet in a file with what the options change."""
    from dataclasses import replace

    from flyball.adapters.fleet_files import read_fleet
    from flyball.adapters.profile_files import read_profiles

    fleet = read_fleet(spec)
    for path in profiles:
        for fitted in read_profiles(path):
            fleet = fleet.with_profile(fitted)
    if max_queue is not None:
        fleet = replace(fleet, servers=tuple(replace(s, max_queue=max_queue) for s in fleet.servers))
    if unlimited is not None:
        fleet = replace(fleet, unlimited=unlimited)
    return fleet


def _show_plan(
    fleet: FleetSpec, solver: str | None, queue_model: str | None, time_limit_s: float, *, as_json: bool
) -> None:
    import json

    from rich.console import Console

    from flyball.adapters.fleet_files import allocation_solution
    from flyball.planner.plan import plan

    result = plan(fleet, queue_model=queue_model, solver=solver, time_limit_s=time_limit_s)
    if as_json:
        typer.echo(json.dumps(allocation_solution(fleet, result), indent=2))
        return
    console = Console()
    if not console.is_terminal:  # nobody's window to fit: let a pipe have whole names
        console = Console(width=160)
    console.print(_table(fleet, result))
    for server, reason in result.unserved.items():
        console.print(f"[bold]{server}[/bold] is not served: {reason}", highlight=False)


def _table(fleet: FleetSpec, result: FleetPlan) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    gap = "" if result.gap is None else f", at most {result.gap:.2%} above the optimum"
    title = f"{len(result.allocations)} of {len(fleet.servers)} servers planned ({result.solver}{gap})"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    for name in ("server", "accelerator"):
        table.add_column(name, overflow="fold")
    for name in ("replicas", "batch", "cost/h", "TTFT ms", "ITL ms", "used", "lost"):
        table.add_column(name, justify="right")
    for server, whole in result.allocations.items():
        for a in (whole, *whole.also):
            name = server if a.slo_met else f"{server} (targets missed)"
            table.add_row(
                name, a.accelerator or "-", str(a.replicas), str(a.max_batch), f"{a.cost_per_h:,.2f}",
                f"{a.ttft_s * 1e3:,.1f}", f"{a.itl_s * 1e3:,.1f}", f"{a.utilization:.0%}", f"{a.loss:.2%}",
            )  # fmt: skip
    table.add_section()
    total = sum(part.replicas for a in result.allocations.values() for part in (a, *a.also))
    table.add_row("total", "", str(total), "", f"{result.cost_per_h:,.2f}", "", "", "", "", style="bold")
    return table
