"""What `flyball plan` can show beside a plan: variants, a trade-off, a trace, an accelerator mix for request sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from flyball.core.errors import InvalidInput
from flyball.planner.plan import plan
from flyball.planner.whatif import moves, variant

if TYPE_CHECKING:
    from pathlib import Path

    from flyball.core.fleet import FleetPlan, FleetSpec, ServerSpec

Shown = tuple[Any, "Table | None", str]  # as JSON, as a table, as a picture

_MOST_POINTS = 2000  # of a line of a trace
_COMPARABLE = 8  # times the replicas of the best option, beyond which a line would flatten the others


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right")
    return table


def what_if(
    fleet: FleetSpec, variants: Sequence[str], *, solver: str | None, queue_model: str | None, time_limit_s: float
) -> Shown:
    """Each variant's plan beside that of the fleet as it is."""

    def planned(spec: FleetSpec) -> FleetPlan:
        return plan(spec, solver=solver, queue_model=queue_model, time_limit_s=time_limit_s)

    base = planned(fleet)
    rows: list[tuple[str, FleetPlan, list[str]]] = [("as it is", base, [])]
    rows += [(text, found, moves(base, found)) for text in variants for found in (planned(variant(fleet, text)),)]
    table = _table("what if", ("variant",), ("cost/h", "change", "replicas", "served", "gap"))
    table.add_column("what changes", overflow="fold")
    body = []
    for text, found, told in rows:
        replicas = sum(part.replicas for a in found.allocations.values() for part in (a, *a.also))
        change = found.cost_per_h - base.cost_per_h
        gap = "-" if found.gap is None else f"{found.gap:.2%}"
        table.add_row(
            text, f"{found.cost_per_h:,.2f}", f"{change:+,.2f}", str(replicas), str(len(found.allocations)), gap,
            "; ".join(told[:4]) + (f"; and {len(told) - 4} more" if len(told) > 4 else ""),
        )  # fmt: skip
        body.append(
            {"variant": text, "totalCost": found.cost_per_h, "change": change, "replicas": replicas, "gap": found.gap,
             "served": len(found.allocations), "unserved": dict(found.unserved), "moves": told}
        )  # fmt: skip
    from flyball.adapters.plan_picture import Line, picture

    costs = [found.cost_per_h for _, found, _ in rows]
    drawn = picture(
        [Line(name="cost/h", xs=list(range(len(costs))), ys=costs, stepped=True, marked=True)],
        title="cost per hour of the fleet as it is (0) and of each variant", across="variant", up="cost/h",
    )  # fmt: skip
    return {"variants": body}, table, drawn


def trade_off(fleet: FleetSpec, points: int, *, queue_model: str | None, time_limit_s: float) -> Shown:
    """Cost against the share of requests that are served within their targets."""
    from flyball.adapters.plan_picture import Line, picture
    from flyball.planner.pareto import pareto
    from flyball.planner.problem import build

    found = pareto(build(fleet, queue_model), points=points, time_limit_s=time_limit_s)
    table = _table("what attainment costs", (), ("budget/h", "cost/h", "attained", "at most", "replicas"))
    for p in found:
        table.add_row(
            f"{p.budget_per_h:,.2f}", f"{p.cost_per_h:,.2f}", f"{p.attainment:.2%}", f"{p.bound:.2%}", str(p.replicas)
        )
    body = [
        {"budget": p.budget_per_h, "cost": p.cost_per_h, "attainment": p.attainment, "bound": p.bound,
         "replicas": p.replicas} for p in found
    ]  # fmt: skip
    costs, shares = [p.cost_per_h for p in found], [100 * p.attainment for p in found]
    lines = [Line(name="best plan within a budget", xs=costs, ys=shares, stepped=True, marked=True)]
    drawn = picture(lines, title="Cost against attainment", across="cost per hour", up="% of requests within targets")
    return {"pareto": body}, table, drawn


def trace(fleet: FleetSpec, path: Path, server: str | None, window_s: float, *, queue_model: str | None) -> Shown:
    """The fewest accelerators for a trace, and what no plan can go below."""
    from flyball.adapters.plan_picture import Line, picture
    from flyball.adapters.traces import read_trace, trace_path
    from flyball.planner.trace_sizing import size_for_trace

    file = path if path.exists() else trace_path(str(path))
    one = _server(fleet, server)
    found = size_for_trace(fleet, one, read_trace(file), window_s=window_s, queue_model=queue_model)
    title = f"{one.name} under {file.name}, {len(found.rates_rps)} windows of {window_s:g} s"
    columns = ("replicas", "cards", "cost/h", "mean cards", "card hours", "cost")
    table = _table(title, ("accelerator",), columns)
    for o in found.options:
        table.add_row(
            o.accelerator, str(o.replicas), str(o.cards), f"{o.cost_per_h:,.2f}", f"{o.mean_cards:.2f}",
            f"{o.card_hours:,.2f}", f"{o.cost:,.2f}",
        )  # fmt: skip
    table.add_section()
    hours = f"{found.bound_card_hours:,.2f}"
    table.add_row("no plan below", "", str(found.least_cards), "", "", hours, "", style="bold")
    body = {
        "server": one.name,
        "windowS": window_s,
        "lowerBound": {"cards": found.least_cards, "cardHours": found.bound_card_hours},
        "options": [
            {"accelerator": o.accelerator, "replicas": o.replicas, "cards": o.cards, "cost": o.cost_per_h,
             "meanCards": o.mean_cards, "cardHours": o.card_hours, "costFollowing": o.cost} for o in found.options
        ],
        "unable": found.unable,
    }  # fmt: skip
    step = max(len(found.rates_rps) // _MOST_POINTS, 1)
    times = [i * window_s / 60 for i in range(len(found.rates_rps))][::step]
    lines = [Line(name="requests/s", xs=times, ys=found.rates_rps[::step], stepped=True, dashed=True)]
    lines += [
        Line(name=f"replicas on {o.accelerator}", xs=times, ys=o.replicas_by_window[::step], stepped=True)
        for o in found.options[:3]
        if o.replicas <= _COMPARABLE * found.options[0].replicas
    ]
    return body, table, picture(lines, title=title, across="minutes", up="replicas, requests/s")


def _server(fleet: FleetSpec, name: str | None) -> ServerSpec:
    names = ", ".join(s.name for s in fleet.servers)
    if name is None and len(fleet.servers) == 1:
        return fleet.servers[0]
    found = next((s for s in fleet.servers if s.name == name), None)
    if found is None:
        given = f"the server {name!r} is not in the spec" if name else "a trace is of one server, and the spec has more"
        raise InvalidInput(f"{given}; give --server with one of {names}")
    return found


def buckets(fields: Any, *, divide: bool, time_limit_s: float) -> Shown:  # noqa: ANN401  # Fields; imported late
    """Accelerators for requests of many sizes (Melange's problem)."""
    from dataclasses import replace

    from flyball.adapters.bucket_files import bucket_solution, buckets_from
    from flyball.planner.buckets import plan_buckets

    problem = buckets_from(fields)
    problem = replace(problem, slices=None) if divide else problem
    found = plan_buckets(problem, time_limit_s=time_limit_s)
    how = "loads divided at will" if problem.slices is None else f"{problem.slices} slices a bucket"
    table = _table(f"request sizes over accelerators ({how})", ("accelerator",), ("count", "cost/h", "used"))
    for (name, count), price in zip(found.counts.items(), problem.cost_per_h.tolist(), strict=True):
        table.add_row(name, str(count), f"{count * price:,.3f}", f"{found.utilization[name]:.0%}")
    table.add_section()
    total = f"at most {found.gap:.2%} above the optimum"
    table.add_row(f"total, {total}", str(sum(found.counts.values())), f"{found.cost_per_h:,.3f}", "", style="bold")
    for (i, o), reason in found.unserved.items():
        table.add_row(f"bucket [{i}][{o}] is not served: {reason}", "", "", "")
    return bucket_solution(problem, found), table, ""


def show(shown: Shown, *, as_json: bool, picture: Path | None) -> None:
    """Print it, and write its picture."""
    import json

    body, table, drawn = shown
    if picture is not None and drawn:
        picture.write_text(drawn, encoding="utf-8")
    if as_json:
        print(json.dumps(body, indent=2))
        return
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    console.print(table)
    if picture is not None and drawn:
        console.print(f"wrote {picture}", highlight=False)
