"""The fleet's loop, pure in the middle: observe, calibrate, forecast, size, assign, damp, act.

One decision is a function of what is seen of the whole fleet and a memory, so that a run can be replayed and every
count explained. What cannot be told is held: a server whose metrics are missing keeps its last plan and says so, and
none of its troubles touches another. Times are counted in the loop's own seconds, which grow by what passed between two
looks but never backwards and never by more than a few periods: a clock that jumps ages nothing.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flyball.core.errors import InvalidInput
from flyball.core.fleet import FleetSpec, LatencyProfile, ServerSpec
from flyball.core.observation import Decision, FleetState, ServerView
from flyball.planner.analyzers import Advice, Analyzer, Seen, analyzer, combine
from flyball.planner.assign import Wish, assign
from flyball.planner.caps import within_caps
from flyball.planner.damping import NO_DAMPING, Damped, Damping, damp
from flyball.planner.demand import Arrivals, arrivals, inside
from flyball.planner.forecast import Forecaster, Outlook, Sample, forecaster
from flyball.planner.options import Option, Sizer

_MOST_PERIODS = 3.0  # that a look can age the loop by
_LENGTHS_KEPT = 10_000.0  # requests that the mean lengths are over, older ones fading
_LENGTHS_STATED = 20.0  # requests that lengths stated in the spec count for
_UNKNOWN_LENGTHS = (math.nan, math.nan, 0.0)  # tokens in, out, and how many requests' mean this is
_UNKNOWN = Damped(up_at_s=0.0)  # what was before the loop began may have been a move up just then
_STUCK_AFTER = 4.0  # start-up times that a replica may take before it counts as stuck


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """How a fleet is governed; what a server may hold at least is its spec's `min_replicas`."""

    analyzers: tuple[str, ...] = ("slo",)
    period_s: float = 15.0
    forecast: str = "portfolio"
    season_s: float = 0.0  # length of the load's season; 0: found in the load itself
    share: float | None = 0.95  # of requests that shall see what was promised; None: their mean
    damping: Damping | None = None  # None: as fits the time that a replica takes to start
    start_up_s: float = 120.0  # of a replica, until one was seen to start
    warm_buffer: int = 0  # replicas more than needed, wherever any is needed
    max_replicas: int = 0  # of one server; 0: no limit but the fleet's
    budget_per_h: float | None = None  # for all that runs, starts or drains
    retention_s: float = 600.0  # without a request, before a server goes to zero (where its min_replicas is 0)

    def __post_init__(self) -> None:
        for name in ("period_s", "start_up_s", "retention_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InvalidInput(f"{name} is {value}; give a number of seconds above 0")
        if self.share is not None and not 0 < self.share < 1:
            raise InvalidInput(f"share is {self.share}; give the part of requests to be kept, between 0 and 1")
        if self.budget_per_h is not None and not self.budget_per_h >= 0:
            raise InvalidInput(f"budget_per_h is {self.budget_per_h}; give a number of at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """Another way to run a server, and why it was not chosen."""

    replicas: Mapping[str, int]
    cost_per_h: float
    why_not: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """One server's decision taken apart."""

    binding: str  # what the count follows from: ITL, TTFT, saturation, a cap, a damping rule, missing metrics, ...
    cost_per_h: float = math.nan
    alternatives: tuple[Alternative, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    held: bool = False  # nothing could be told: the last plan stands


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetDecision(Decision):
    """Replicas wanted, why, and what else there was."""

    explanations: Mapping[str, Explanation] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ServerMemory:
    """What is remembered of one server."""

    outlook: Outlook
    analyzers: Mapping[str, Any]
    damped: Mapping[str, Damped] = field(default_factory=dict)  # by accelerator
    asked: Mapping[str, int] | None = None  # replicas asked for last
    inside: float | None = None  # requests that had come and not ended, at the last look
    lengths: tuple[float, float, float] = _UNKNOWN_LENGTHS
    idle_s: float = 0.0  # seen to have nothing to do
    starting: Mapping[str, float] = field(default_factory=dict)  # replica -> age when last seen starting
    start_up_s: float | None = None  # measured


@dataclass(frozen=True, slots=True)
class LoopMemory:
    """What is carried from one decision to the next."""

    seen_s: float | None = None  # the state's own time at the last look
    now_s: float = 0.0  # the loop's
    servers: Mapping[str, ServerMemory] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Plan:
    """One server on its way through a decision."""

    memory: ServerMemory
    current: Mapping[str, int]
    reasons: tuple[str, ...]
    wish: Wish | None = None  # None: hold
    advice: Advice | None = None
    options: tuple[Option, ...] = ()


class FleetLoop:
    """A controller (`core.observation.Controller`) for one fleet; it holds no state but answers already worked out."""

    def __init__(self, spec: FleetSpec, settings: LoopSettings | None = None) -> None:
        self.spec = spec
        self.settings = settings or LoopSettings()
        self._analyzers: dict[str, Analyzer] = {name: analyzer(name) for name in self.settings.analyzers}
        self._forecaster: Forecaster = forecaster(self.settings.forecast, season_s=self.settings.season_s)
        self._sizer = Sizer(spec, self.settings.share)

    @property
    def period_s(self) -> float:
        """Time between two decisions."""
        return self.settings.period_s

    def start(self) -> LoopMemory:
        """Nothing seen."""
        return LoopMemory()

    def decide(self, state: FleetState, memory: LoopMemory) -> tuple[FleetDecision, LoopMemory]:
        """Replicas for every server of the spec, with reasons."""
        elapsed_s, odd = self._elapsed(state, memory)
        now_s = memory.now_s + elapsed_s
        plans = {
            server.name: self._look(server, state, memory.servers.get(server.name), now_s, elapsed_s, odd)
            for server in self.spec.servers
        }
        wishes = {name: p.wish for name, p in plans.items() if p.wish is not None}
        given, short = assign(self.spec, wishes, self.settings.budget_per_h)
        damped = {name: self._damp(plans[name], given[name], now_s) for name in wishes}
        wanted = {name: counts for name, (counts, _, _) in damped.items()}
        asked = {name: p.current for name, p in plans.items()}
        views = {name: view for name, view in state.servers.items() if name in plans}
        allowed, capped = within_caps(self.spec, wanted, asked, views, self.settings.budget_per_h)
        allowed = {
            name: _make_room(counts, wanted[name], plans[name].current, name in capped)
            for name, counts in allowed.items()
        }
        decided: dict[str, Mapping[str, int]] = {}
        reasons: dict[str, tuple[str, ...]] = {}
        explanations: dict[str, Explanation] = {}
        servers: dict[str, ServerMemory] = {}
        for name, p in plans.items():
            counts = allowed[name] if p.wish is not None else dict(p.current) or None
            _, rules, slowed = damped.get(name, ({}, p.memory.damped, ""))
            said = (*p.reasons, short.get(name, ""), slowed, f"held back: {capped[name]}" if name in capped else "")
            reasons[name] = tuple(reason for reason in said if reason)
            explanations[name] = self._explain(p, counts, short.get(name), slowed, capped.get(name))
            if counts is not None:
                decided[name] = counts
            servers[name] = replace(p.memory, damped=rules, asked=counts)
        decision = FleetDecision(replicas=decided, reasons=reasons, explanations=explanations)
        return decision, LoopMemory(state.now_s, now_s, servers)

    def refused(self, before: LoopMemory, after: LoopMemory, servers: Container[str]) -> LoopMemory:
        """The memory after a decision that the cluster refused for some servers: nothing was asked of them."""
        undone = {
            name: replace(one, asked=old.asked, damped=old.damped)
            for name, one in after.servers.items()
            if name in servers and (old := before.servers.get(name))
        }
        first = {
            name: replace(one, asked=None, damped={})
            for name, one in after.servers.items()
            if name in servers and name not in before.servers
        }
        return replace(after, servers={**after.servers, **undone, **first})

    def _elapsed(self, state: FleetState, memory: LoopMemory) -> tuple[float, str]:
        """By how much the loop ages, and what is odd about the state's time."""
        if memory.seen_s is None:
            return 0.0, ""
        passed_s = state.now_s - memory.seen_s
        if not passed_s > 0:
            return 0.0, f"the metrics' time went from {memory.seen_s:.0f} to {state.now_s:.0f} s: they are stale"
        most_s = _MOST_PERIODS * max(self.period_s, state.window_s)
        if passed_s > most_s:
            return self.period_s, f"the clock jumped by {passed_s:.0f} s"
        return passed_s, ""

    def _look(
        self,
        server: ServerSpec,
        state: FleetState,
        memory: ServerMemory | None,
        now_s: float,
        elapsed_s: float,
        odd: str,
    ) -> _Plan:
        """Observe, forecast and size one server."""
        memory = memory or self._first(server)
        view = state.servers.get(server.name)
        current = _current(server, view, memory)
        if view is None:
            return _held(memory, current, "no metrics of it were found")
        came = arrivals(view, window_s=state.window_s, inside_before=memory.inside)
        memory = replace(memory, inside=inside(view))
        if odd or came is None:
            silent = sum(not r.reported for r in view.replicas)
            why = odd or f"the arrivals cannot be told, as {silent} of {len(view.replicas)} replicas are silent"
            return _held(replace(memory, idle_s=0.0), current, why)
        memory = self._learn(memory, view, came, state.window_s, now_s, elapsed_s)
        options = self._sizer.options(server, *memory.lengths[:2], self._profiles())
        if isinstance(options, str):
            return _held(memory, current, options)
        seen = self._seen(server, view, state.window_s, now_s, current, options, came, memory)
        advices, memories = {}, {}
        for name, one in self._analyzers.items():
            advices[name], memories[name] = one.advise(seen, memory.analyzers.get(name, one.start()))
        memory = replace(memory, analyzers=memories)
        advice = combine(advices, current)
        if advice.wanted is None:
            return _held(memory, current, advice.reason)
        wanted, limits = self._limited(server, seen, advice.wanted, memory)
        rate_rps = advice.figures.get("demand_rps", seen.level_rps)
        wish = Wish(wanted=wanted, options=options, rate_rps=rate_rps)
        reasons = (advice.reason, *limits)
        return _Plan(memory, current, reasons, wish, advice, options)

    def _first(self, server: ServerSpec) -> ServerMemory:
        """Of a server not seen before: what its spec states of its requests is believed a little."""
        demand = server.demand
        stated = demand.input_tokens + demand.output_tokens > 0
        return ServerMemory(
            self._forecaster.start(),
            {name: one.start() for name, one in self._analyzers.items()},
            lengths=(demand.input_tokens, demand.output_tokens, _LENGTHS_STATED) if stated else _UNKNOWN_LENGTHS,
        )

    def _profiles(self) -> tuple[LatencyProfile, ...]:
        return self.spec.profiles

    def _learn(
        self, memory: ServerMemory, view: ServerView, came: Arrivals, window_s: float, now_s: float, elapsed_s: float
    ) -> ServerMemory:
        """Lengths, rate, idleness and start-up time from a look that can be believed."""
        memory = _measured_start_up(memory, view)
        horizon_s = (memory.start_up_s or self.settings.start_up_s) + self.period_s
        sample = Sample(now_s, came.rate_rps, window_s)
        nothing = came.rate_rps == 0 and inside(view) == 0 and all(r.reported for r in view.replicas)
        return replace(
            memory,
            outlook=self._forecaster.update(memory.outlook, sample, horizon_s),
            lengths=_lengths(memory.lengths, view),
            idle_s=memory.idle_s + elapsed_s if nothing else 0.0,
        )

    def _seen(
        self,
        server: ServerSpec,
        view: ServerView,
        window_s: float,
        now_s: float,
        current: Mapping[str, int],
        options: tuple[Option, ...],
        came: Arrivals,
        memory: ServerMemory,
    ) -> Seen:
        start_up_s = memory.start_up_s or self.settings.start_up_s
        stuck = {
            r.accelerator for r in view.replicas if r.phase == "starting" and r.age_s > _STUCK_AFTER * start_up_s + 60.0
        }
        usable = tuple(o for o in options if o.name not in stuck) or options
        return Seen(
            view=view,
            server=server,
            now_s=now_s,
            window_s=window_s,
            current=current,
            options=usable,
            rate_rps=came.rate_rps,
            level_rps=self._forecaster.level(memory.outlook),
            ahead=self._forecaster.ahead(memory.outlook, start_up_s + self.period_s),
            peak_rps=self._forecaster.peak(memory.outlook, start_up_s + self.period_s),
            start_up_s=start_up_s,
        )

    def _limited(
        self, server: ServerSpec, seen: Seen, wanted: Mapping[str, int], memory: ServerMemory
    ) -> tuple[dict[str, int], tuple[str, ...]]:
        """What is wanted within what a server may hold at least and at most, zero included."""
        settings, view = self.settings, seen.view
        total = sum(wanted.values())
        least = server.min_replicas
        said: list[str] = []
        busy = seen.rate_rps > 0 or inside(view) > 0
        if not least and busy and not total:
            least = 1
            if not seen.replicas:
                said.append("woken from zero on the cheapest accelerator that can keep the promise")
        elif not least and not busy:
            least = int(memory.idle_s < settings.retention_s and seen.replicas > 0)
            total = total if least else 0
            said.append(f"idle for {memory.idle_s:.0f} s; after {settings.retention_s:g} s it goes to zero")
        silent = sum(not r.reported for r in view.ready)
        if silent and total < seen.replicas:
            least = max(least, seen.replicas)
            said.append(f"{silent} replicas are silent: nothing is taken away")
        if settings.warm_buffer and total:
            total += settings.warm_buffer
        if total < least:
            said.append(f"at least {least} are kept")
        total = max(total, least)
        if settings.max_replicas and total > settings.max_replicas:
            said.append(f"at most {settings.max_replicas} are allowed")
            total = settings.max_replicas
        return _brought_to(seen, wanted, total), tuple(said)

    def _damp(
        self, p: _Plan, wanted: Mapping[str, int], now_s: float
    ) -> tuple[dict[str, int], Mapping[str, Damped], str]:
        """Each accelerator's count by the damping rules; none is given up before those it moves to are ready."""
        rules, counts, said = dict(p.memory.damped), {}, []
        limits = self.settings.damping or Damping.following(p.memory.start_up_s or self.settings.start_up_s)
        moving = bool(p.memory.starting) and sum(n > 0 for n in p.current.values()) > 1
        for name in sorted({*wanted, *p.current}):
            want, have = wanted.get(name, 0), p.current.get(name, 0)
            counts[name], rules[name], why = damp(want, have, now_s, rules.get(name, _UNKNOWN), limits)
            if moving and counts[name] < have:
                counts[name], why = have, "what it moves to is not ready"
            if why:
                said.append(f"{name} stays at {counts[name]} of {want}: {why}")
        return counts, rules, "; ".join(said)

    def _explain(
        self, p: _Plan, counts: Mapping[str, int] | None, short: str | None, slowed: str, capped: str | None
    ) -> Explanation:
        price = {o.name: o.cost_per_h for o in p.options}
        cost = math.fsum(price.get(a, math.nan) * n for a, n in (counts or {}).items() if n)
        if p.wish is None or p.advice is None:
            return Explanation(binding=p.reasons[-1] if p.reasons else "", cost_per_h=cost, held=True)
        binding = capped or short or slowed or p.advice.binding or "the least it may hold"
        others = [_alternative(o, p.wish.rate_rps, counts or {}, cost) for o in p.options]
        fewer = _fewer(p, counts or {})
        return Explanation(
            binding=binding,
            cost_per_h=cost,
            alternatives=tuple(a for a in (*others, fewer) if a is not None),
            figures=p.advice.figures,
        )


def _current(server: ServerSpec, view: ServerView | None, memory: ServerMemory) -> dict[str, int]:
    """What was asked for last: as the cluster says, as remembered, as seen, or as the spec says, in this order."""
    if view is not None and view.wanted:
        return dict(view.wanted)
    if memory.asked is not None:
        return dict(memory.asked)
    counts: dict[str, int] = {}
    for r in view.replicas if view is not None else ():
        if r.phase != "draining":
            counts[r.accelerator] = counts.get(r.accelerator, 0) + 1
    if not counts and server.current.replicas:
        counts[server.current.accelerator] = server.current.replicas
    return counts


def _held(memory: ServerMemory, current: Mapping[str, int], why: str) -> _Plan:
    return _Plan(memory, current, (f"held: {why}",))


def _lengths(old: tuple[float, float, float], view: ServerView) -> tuple[float, float, float]:
    """Mean tokens in and out, over the last requests that said so."""
    n, m, count = old
    if math.isnan(view.input_tokens) or math.isnan(view.output_tokens) or not view.completed:
        return old
    seen = float(view.completed)
    if count == 0:
        return view.input_tokens, view.output_tokens, seen
    kept = min(count, max(_LENGTHS_KEPT - seen, 0.0))
    total = kept + seen
    return (n * kept + view.input_tokens * seen) / total, (m * kept + view.output_tokens * seen) / total, total


def _measured_start_up(memory: ServerMemory, view: ServerView) -> ServerMemory:
    """Learn from each replica that was starting at the last look and is ready now; a third of the way each time."""
    start_up_s = memory.start_up_s
    for r in view.replicas:
        if r.phase == "ready" and r.name in memory.starting:
            took_s = (memory.starting[r.name] + r.age_s) / 2.0
            start_up_s = took_s if start_up_s is None else start_up_s + (took_s - start_up_s) / 3.0
    starting = {r.name: r.age_s for r in view.replicas if r.phase == "starting"}
    return replace(memory, starting=starting, start_up_s=start_up_s)


def _brought_to(seen: Seen, wanted: Mapping[str, int], total: int) -> dict[str, int]:
    """Wanted counts with another total; who is woken from zero is woken on the cheapest accelerator."""
    counts = {name: count for name, count in wanted.items() if count}
    more = total - sum(counts.values())
    if more > 0:
        if not counts and not seen.replicas:
            name = min(seen.options, key=lambda o: (max(o.replicas(seen.level_rps), 1) * o.cost_per_h, o.name)).name
        else:
            name = next(iter(counts), seen.home.name)
        counts[name] = counts.get(name, 0) + more
    for name in sorted(counts, key=lambda n: -counts[n]):
        taken = min(max(-more, 0), counts[name])
        counts[name] -= taken
        more += taken
    return counts


def _make_room(
    counts: Mapping[str, int], wanted: Mapping[str, int], current: Mapping[str, int], capped: bool
) -> dict[str, int]:
    """While a server moves, keep the old replicas until as many new ones are asked for, one going where room is short.

    Without a move this changes nothing.
    """
    growing = {n: c for n, c in wanted.items() if c > current.get(n, 0)}
    leaving = [n for n, c in current.items() if c > wanted.get(n, 0)]
    if not growing or not leaving:
        return dict(counts)
    kept = dict(counts)
    for name in leaving:
        kept[name] = current[name] - 1 if capped and sum(current.values()) > 1 else current[name]
        capped = False
    return kept


def _alternative(option: Option, rate_rps: float, counts: Mapping[str, int], cost: float) -> Alternative | None:
    if counts.get(option.name):
        return None
    needed = max(option.replicas(rate_rps), 1)
    price = option.cost_per_h * needed
    why = f"costs {price - cost:+.4g} an hour" if price > cost else "moving is not worth the gain yet"
    return Alternative(replicas={option.name: needed}, cost_per_h=price, why_not=why)


def _fewer(p: _Plan, counts: Mapping[str, int]) -> Alternative | None:
    """One replica less on the dearest accelerator in use: what it would save and cannot take."""
    used = [o for o in p.options if counts.get(o.name)]
    if not used or p.wish is None:
        return None
    option = max(used, key=lambda o: o.cost_per_h)
    left = {**counts, option.name: counts[option.name] - 1}
    takes = math.fsum(o.takes_rps(left.get(o.name, 0)) for o in p.options)
    cost = math.fsum(o.cost_per_h * left.get(o.name, 0) for o in p.options)
    rate = p.wish.rate_rps
    why = f"takes {takes:.3g} of {rate:.3g} requests/s" if takes < rate else "would do, once it is sure to last"
    return Alternative(replicas=left, cost_per_h=cost, why_not=why)


def controller(name: str, spec: FleetSpec, settings: LoopSettings | None = None) -> FleetLoop:
    """A loop by the name of its analyzer: `slo` is ours as set; the field's rules run as published, undamped by us.

    Several names joined by `+` are combined.
    """
    settings = settings or LoopSettings()
    names = tuple(part.strip() for part in name.split("+"))
    if names == ("slo",):
        return FleetLoop(spec, replace(settings, analyzers=names))
    period_s = min(analyzer(n).period_s for n in names)
    if "slo" in names:
        return FleetLoop(spec, replace(settings, analyzers=names, period_s=period_s))
    return FleetLoop(spec, replace(settings, analyzers=names, period_s=period_s, damping=NO_DAMPING, forecast="naive"))
