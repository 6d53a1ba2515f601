"""`flyball plan`: which accelerators, how many replicas and which batch keep the promises of a fleet at least cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from flyball.core.fleet import FleetPlan, FleetSpec


def run(
    spec: Annotated[
        Path, typer.Argument(help="llm-inferno's SystemData JSON, a folder of its *-data.json files, or our YAML.")
    ],
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
    solver: Annotated[
        str | None,
        typer.Option(help="exact, heterogeneous, greedy or unlimited; default: as the spec says, or else exact."),
    ] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds that the solver may take.", min=0)] = 60.0,
    queue_model: Annotated[
        str | None,
        typer.Option(
            help="Queue model for every server: v3, v3-engine, v3-compat, v2, v1, mm1k, linear; default: the profile's."
        ),
    ] = None,
) -> None:
    """Plan a fleet: accelerator, replicas, batch, cost and expected latencies of every server."""
    import json
    from dataclasses import replace

    from rich.console import Console

    from flyball.adapters.fleet_files import allocation_solution, read_fleet
    from flyball.adapters.profile_files import read_profiles
    from flyball.cli import require
    from flyball.planner.plan import plan

    fleet = read_fleet(spec)
    for path in profile or ():
        for fitted in read_profiles(path):
            fleet = fleet.with_profile(fitted)
    if max_queue is not None:
        fleet = replace(fleet, servers=tuple(replace(s, max_queue=max_queue) for s in fleet.servers))
    if unlimited is not None:
        fleet = replace(fleet, unlimited=unlimited)
    if solver in {"exact", "heterogeneous"} or (solver is None and not fleet.unlimited):
        require("plan", "highspy", "scipy")
    result = plan(fleet, queue_model=queue_model, solver=solver, time_limit_s=time_limit)
    if output == "json":
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
