"""Caps that hold at every instant: cards of each type, and cost per hour, of all that runs, starts or drains.

What a decision asks for is there only later, and what it gives up goes only later. Between two decisions a server may
therefore hold, on one accelerator, those that drain, and the most of: those that start or run now, those asked for
before, those asked for now. That most is what is counted, so no order of events exceeds a cap; what does not fit now is
granted once others are gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flyball.core.fleet import LOWEST_PRIORITY, FleetSpec, ServerSpec
from flyball.core.observation import Counts, ServerView

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What one replica of a server takes on an accelerator."""

    type: str
    cards: int
    cost_per_h: float


@dataclass(slots=True, kw_only=True)
class Ledger:
    """Cards and money still free; `take` and `fits` speak of replicas."""

    cards: dict[str, int] | None  # by type; None: as many as one likes
    cost_per_h: float | None
    used_cost_per_h: float = 0.0
    used_cards: dict[str, int] = field(default_factory=dict)

    def take(self, price: Price, replicas: int) -> None:
        """Count replicas in, whether they fit or not: what is there is there."""
        self.used_cards[price.type] = self.used_cards.get(price.type, 0) + price.cards * replicas
        self.used_cost_per_h += price.cost_per_h * replicas

    def blocker(self, price: Price) -> str:
        """What one more replica would exceed; "" if it fits."""
        if self.cards is not None:
            held, most = self.used_cards.get(price.type, 0), self.cards.get(price.type, 0)
            if held + price.cards > most:
                return f"{held} of {most} {price.type} are in use"
        if self.cost_per_h is not None and (
            self.used_cost_per_h + price.cost_per_h > self.cost_per_h * (1 + _ROUNDING) + _ROUNDING
        ):
            return f"{self.used_cost_per_h:g} of the budget of {self.cost_per_h:g} an hour are in use"
        return ""


def prices(spec: FleetSpec) -> Mapping[tuple[str, str], Price]:
    """By server and accelerator."""
    accelerators = {a.name: a for a in spec.accelerators}
    found = {}
    for server in spec.servers:
        for p in spec.profiles:
            a = accelerators.get(p.accelerator)
            if p.model == server.model and a is not None:
                found[server.name, a.name] = Price(
                    type=a.type, cards=a.units * p.accelerators, cost_per_h=a.cost_per_h * p.accelerators
                )
    return found


def ledger(spec: FleetSpec, budget_per_h: float | None) -> Ledger:
    """The caps of a fleet, nothing taken yet."""
    return Ledger(cards=None if spec.unlimited else dict(spec.capacity), cost_per_h=budget_per_h)


def by_priority(spec: FleetSpec) -> tuple[ServerSpec, ...]:
    """Servers, those to be served first in front."""
    rank = {c.name: c.priority for c in spec.service_classes}
    return tuple(sorted(spec.servers, key=lambda s: (rank.get(s.service_class, LOWEST_PRIORITY), s.name)))


def within_caps(
    spec: FleetSpec,
    wanted: Counts,
    asked: Counts,
    views: Mapping[str, ServerView],
    budget_per_h: float | None,
) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    """The counts that can be asked for now, and for each server held back, why.

    `asked` is what was asked for last. First every server without a replica gets one, then all the rest, by priority.
    A replica on an accelerator of unknown price and size is never added (fail closed).
    """
    price = prices(spec)
    held = {
        (server, name): max(_active(views.get(server), name), asked.get(server, {}).get(name, 0))
        for server in {*wanted, *asked, *views}
        for name in {*wanted.get(server, {}), *asked.get(server, {}), *_names(views.get(server))}
    }
    book = ledger(spec, budget_per_h)
    for key, count in held.items():
        if key in price:
            book.take(price[key], count + _draining(views.get(key[0]), key[1]))
    allowed = {
        server: {name: min(count, held.get((server, name), 0)) for name, count in counts.items()}
        for server, counts in wanted.items()
    }
    reasons: dict[str, str] = {}
    for most in (1, None):  # a first replica for everyone before a second for anyone
        for server in by_priority(spec):
            _grant(server.name, wanted, held, allowed, price, book, reasons, most)
    return allowed, reasons


def _grant(
    server: str,
    wanted: Counts,
    held: Mapping[tuple[str, str], int],
    allowed: dict[str, dict[str, int]],
    price: Mapping[tuple[str, str], Price],
    book: Ledger,
    reasons: dict[str, str],
    most: int | None,
) -> None:
    """Add a server's missing replicas one by one while they fit; with `most` set, up to that many in all."""
    for name, count in wanted.get(server, {}).items():
        while allowed[server][name] < count:
            if most is not None and sum(allowed[server].values()) >= most:
                return
            if allowed[server][name] < held.get((server, name), 0):  # there already, and counted
                allowed[server][name] += 1
                continue
            one = price.get((server, name))
            blocker = f"the size and price of {name} are not known" if one is None else book.blocker(one)
            if blocker or one is None:
                reasons[server] = blocker
                break
            book.take(one, 1)
            allowed[server][name] += 1


def _names(view: ServerView | None) -> Sequence[str]:
    return () if view is None else [r.accelerator for r in view.replicas]


def _active(view: ServerView | None, name: str) -> int:
    return 0 if view is None else sum(r.accelerator == name and r.phase != "draining" for r in view.replicas)


def _draining(view: ServerView | None, name: str) -> int:
    return 0 if view is None else sum(r.accelerator == name and r.phase == "draining" for r in view.replicas)
