"""From what each server wants to what the fleet can give: cards and a budget are shared, by priority."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flyball.core.fleet import LOWEST_PRIORITY, Allocation, FleetSpec, ServerSpec
from flyball.core.observation import Counts
from flyball.planner.caps import Ledger, Price, by_priority, ledger, prices
from flyball.planner.options import Option
from flyball.planner.problem import Candidate, Choice, Problem, transition_value
from flyball.planner.solvers import solver

_TIME_LIMIT_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What one server wants, and what would do as well: its options with the rate they must take."""

    wanted: Mapping[str, int]
    options: tuple[Option, ...] = ()
    rate_rps: float = 0.0


def assign(
    spec: FleetSpec, wishes: Mapping[str, Wish], budget_per_h: float | None
) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    """Counts for every server, and for those that get something else than they wanted, why.

    Where all wishes fit they are granted. Else an exact choice among every server's options is looked for; where there
    is none for all, servers get what is left in order of priority.
    """
    wanted = {name: dict(wish.wanted) for name, wish in wishes.items()}
    if _fits(spec, wanted, budget_per_h):
        return wanted, {}
    chosen = _exact(spec, wishes)
    if chosen is not None and _fits(spec, chosen, budget_per_h):
        return chosen, {
            name: f"moved to {_said(counts)}, because not every server fits where it is cheapest"
            for name, counts in chosen.items()
            if counts != wanted[name]
        }
    return _ration(spec, wishes, budget_per_h)


def _said(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} on {name}" for name, count in counts.items() if count) or "nothing"


def _fits(spec: FleetSpec, counts: Counts, budget_per_h: float | None) -> bool:
    book, price = ledger(spec, budget_per_h), prices(spec)
    for server, by_name in counts.items():
        for name, count in by_name.items():
            for _ in range(count):
                one = price.get((server, name))
                if one is None or book.blocker(one):
                    return False
                book.take(one, 1)
    return True


def _exact(spec: FleetSpec, wishes: Mapping[str, Wish]) -> dict[str, dict[str, int]] | None:
    """One accelerator for every server at least cost within the cards, or None if that is impossible."""
    rank = {c.name: c.priority for c in spec.service_classes}
    choices = []
    for server in spec.servers:
        wish = wishes.get(server.name)
        if wish is None:
            continue
        total = sum(wish.wanted.values())
        candidates = tuple(_candidate(server, o, wish, total) for o in wish.options) if total else ()
        if total and not candidates:
            return None
        if candidates:
            priority = rank.get(server.service_class, LOWEST_PRIORITY)
            ordered = tuple(sorted(candidates, key=lambda c: (c.value, c.allocation.accelerator)))
            choices.append(Choice(server=server, priority=priority, candidates=ordered))
    problem = Problem(choices=tuple(choices), capacity=spec.capacity)
    name = "unlimited" if spec.unlimited else "exact"
    solution = solver(name)(problem, time_limit_s=_TIME_LIMIT_S)
    found: dict[str, dict[str, int]] = {name: {} for name in wishes}
    for choice, candidate in zip(choices, solution.chosen, strict=True):
        if candidate is None:
            return None
        found[choice.server.name] = {candidate.allocation.accelerator: candidate.allocation.replicas}
    return found


def _candidate(server: ServerSpec, option: Option, wish: Wish, total: int) -> Candidate:
    wanted = wish.wanted.get(option.name, 0)
    count = wanted if wanted == total else max(option.replicas(wish.rate_rps), 1)
    allocation = Allocation(
        accelerator=option.name,
        replicas=count,
        cost_per_h=option.cost_per_h * count,
        max_batch=option.max_batch,
        ttft_s=option.ttft_s,
        itl_s=option.itl_s,
        capacity_rps=option.capacity_rps * count,
    )
    value = transition_value(server.current, allocation)
    return Candidate(allocation=allocation, type=option.accelerator.type, cards=option.cards * count, value=value)


def _ration(
    spec: FleetSpec, wishes: Mapping[str, Wish], budget_per_h: float | None
) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    """By priority: a first replica for everyone, then what each still lacks, on whichever of its options has room."""
    book, price = ledger(spec, budget_per_h), prices(spec)
    granted: dict[str, dict[str, int]] = {name: {} for name in wishes}
    reasons: dict[str, str] = {}
    for most in (1, None):
        for server in by_priority(spec):
            if server.name in wishes:
                blocker = _fill(server.name, wishes[server.name], granted[server.name], book, price, most)
                if blocker:
                    total = sum(wishes[server.name].wanted.values())
                    given = sum(granted[server.name].values())
                    reasons[server.name] = f"capacity is short: {given} of {total} replicas, as {blocker}"
    return granted, reasons


def _fill(
    server: str,
    wish: Wish,
    granted: dict[str, int],
    book: Ledger,
    price: Mapping[tuple[str, str], Price],
    most: int | None,
) -> str:
    """Grant one server what fits; returns what stood in the way."""
    blocker = ""
    lacking = sum(wish.wanted.values()) - sum(granted.values())
    if most is not None:
        lacking = min(lacking, most - sum(granted.values()))
    names = [*wish.wanted, *(o.name for o in wish.options if o.name not in wish.wanted)]
    for name in names:
        while lacking > 0 and (server, name) in price:
            found = book.blocker(price[server, name])
            if found:
                blocker = blocker or found
                break
            book.take(price[server, name], 1)
            granted[name] = granted.get(name, 0) + 1
            lacking -= 1
    return blocker if lacking > 0 else ""
