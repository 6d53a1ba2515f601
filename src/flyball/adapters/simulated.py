"""A fleet in virtual time behind the loop's ports: the simulator's replicas, started, drained, failed, and paid for."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flyball.adapters.simulated_report import FleetReport, Promises, ServerReport, Timeline
from flyball.core.errors import ActuationFailed, InvalidInput
from flyball.core.fleet import Accelerator
from flyball.core.observation import Counts, FleetState, Phase, ReplicaView, ServerView
from flyball.core.slo import Slo
from flyball.performance.simulator import BUCKETS, COUNTERS, Core, Counters, Law, Requests, Router, new_core
from flyball.planner.cycle import Turn, turn
from flyball.planner.loop import FleetLoop

_COLUMNS = ("arrival_rps", "wanted", "starting", "ready", "draining", "attainment", "running", "waiting")
_BUCKET_ENDS_S = 1e-3 * 1.1 ** np.arange(BUCKETS)
_KEPT_S = 900.0  # of counters: the longest window that can be looked at


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedServer:
    """One model served for one class: how its replicas behave on each accelerator, and what is promised."""

    name: str
    laws: Mapping[str, Law]  # by accelerator
    slo: Slo = field(default_factory=Slo)
    start: Mapping[str, int] = field(default_factory=dict)  # replicas that are ready at 0 s, by accelerator
    cards: int = 1  # accelerators that one replica takes


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedWorld:
    """All of a simulated fleet that does not change."""

    servers: tuple[SimulatedServer, ...]
    accelerators: tuple[Accelerator, ...]
    cold_start_s: float = 60.0  # from asked for to ready
    cold_start_spread: float = 0.0  # standard deviation of its logarithm
    router: Router = "least_loaded"
    capacity: Mapping[str, int] = field(default_factory=dict)  # cards of a type; a type not named is plentiful
    mean_life_s: float = math.inf  # of a replica that is ready, until it fails
    scrape_s: float = 5.0  # between two readings of the counters
    compiled: bool | None = None  # the core; None: as can be

    def __post_init__(self) -> None:
        names = {a.name for a in self.accelerators}
        for server in self.servers:
            unknown = (set(server.laws) | set(server.start)) - names
            if unknown or not set(server.start) <= set(server.laws):
                raise InvalidInput(
                    f"server {server.name} runs on {', '.join(sorted({*server.laws, *server.start}))}, but the "
                    f"accelerators are {', '.join(sorted(names))}; name those, and a law for each it starts on"
                )
        for name in ("scrape_s", "mean_life_s"):
            if not getattr(self, name) > 0:
                raise InvalidInput(f"{name} is {getattr(self, name)}; give a number of seconds above 0")
        if not (math.isfinite(self.cold_start_s) and self.cold_start_s >= 0):
            raise InvalidInput(f"cold_start_s is {self.cold_start_s}; give a number of seconds of at least 0")


@dataclass(slots=True, eq=False)
class _Replica:
    name: str
    server: int
    accelerator: Accelerator
    asked_s: float
    ready_s: float
    fails_s: float
    phase: Phase = "starting"
    slot: int = -1
    drained_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Sight:
    """Counters at one moment: of the servers, and of the replicas by name."""

    time_s: float
    servers: tuple[Counters, ...]
    good: tuple[int, ...]
    replicas: Mapping[str, Counters]


class SimulatedFleet:
    """A `MetricsSource` and a `Cluster`; time moves by `advance`. Deterministic: world, load and seed settle all."""

    def __init__(self, world: SimulatedWorld, load: Iterable[Requests], *, seed: int = 0) -> None:
        self.world = world
        self.now_s = 0.0
        self.load_ends_s = math.inf  # the last arrival, once it is known
        self._load: Iterator[Requests] = iter(load)
        self._part = next(self._load, None)  # one part is read ahead, to see the end
        self._rng = np.random.default_rng(seed)
        self._core: Core = new_core(len(world.servers), world.router, compiled=world.compiled)
        self._index = {s.name: i for i, s in enumerate(world.servers)}
        self._accelerators = {a.name: a for a in world.accelerators}
        self._promises = [Promises(s.slo) for s in world.servers]
        self._wanted: list[dict[str, int]] = [dict(s.start) for s in world.servers]
        self._actions = [0] * len(world.servers)
        self._paid_s: list[dict[str, float]] = [dict.fromkeys(s.laws, 0.0) for s in world.servers]
        self._timelines = [Timeline(_COLUMNS) for _ in world.servers]
        self._replicas: list[_Replica] = []
        self._started = 0
        for i, server in enumerate(world.servers):
            for accelerator, count in server.start.items():
                for _ in range(count):
                    self._start(i, accelerator, cold_start_s=0.0)
        self._make_ready()
        self._feed()
        self._sights: deque[_Sight] = deque([self._look()])

    # ---- time ----

    def advance(self, until_s: float) -> None:
        """Move on to a time."""
        while self.now_s < until_s:
            scrape_s = (math.floor(self.now_s / self.world.scrape_s + 1e-9) + 1) * self.world.scrape_s
            due = [r.ready_s if r.phase == "starting" else r.fails_s for r in self._replicas]
            next_s = min(until_s, scrape_s, *due, math.inf)
            self._run(next_s)
            self.now_s = next_s
            self._fail_due()
            self._make_ready()
            self._retire()
            if next_s >= min(scrape_s, until_s):
                self._scrape()

    def finish(self) -> FleetReport:
        """The report of all until now; requests under way are first served to their end, at no cost."""
        end_s = self.now_s
        self._retire()
        paid = [dict(p) for p in self._paid_s]
        for r in self._replicas:
            paid[r.server][r.accelerator.name] += end_s - r.asked_s
        while any(r.phase == "starting" for r in self._replicas):
            self.now_s = min(r.ready_s for r in self._replicas if r.phase == "starting")
            self._run(self.now_s)
            self._make_ready()
        self._run(math.inf)
        self._core.books().check()
        return FleetReport(
            duration_s=end_s,
            servers=tuple(self._report(i, paid[i]) for i in range(len(self.world.servers))),
        )

    def _report(self, index: int, paid_s: Mapping[str, float]) -> ServerReport:
        server, promises = self.world.servers[index], self._promises[index]
        seen = self._core.server(index)
        arrivals = int(seen["arrivals"])
        cards = {name: self._accelerators[name].units * server.cards for name in paid_s}
        prices = {name: self._accelerators[name].cost_per_h * server.cards for name in paid_s}
        return ServerReport(
            name=server.name,
            slo=server.slo,
            arrivals=arrivals,
            completed=int(seen["completed"]),
            lost=arrivals - int(seen["completed"]),
            attainment=promises.good / arrivals if arrivals else math.nan,
            replica_hours={name: s / 3600 for name, s in paid_s.items()},
            gpu_hours=math.fsum(s / 3600 * cards[name] for name, s in paid_s.items()),
            cost=math.fsum(s / 3600 * prices[name] for name, s in paid_s.items()),
            actions=self._actions[index],
            latencies=promises.sketches,
            timeline=self._timelines[index].arrays(),
        )

    def _run(self, until_s: float) -> None:
        while self._core.run(until_s):
            self._feed()
        records, _ = self._core.take()
        for index, promises in enumerate(self._promises):
            promises.add(records[records["server"] == index])

    def _feed(self) -> None:
        part, self._part = self._part, next(self._load, None)
        if part is not None:
            self._core.offer(part)
        if self._part is None:
            self._core.close()
            self.load_ends_s = min(self.load_ends_s, 0.0 if part is None else float(part.arrival_s[-1]))

    # ---- replicas ----

    @property
    def actions(self) -> int:
        """Decisions so far that changed the replicas asked for."""
        return sum(self._actions)

    def scale(self, wanted: Counts) -> None:
        """See `flyball.core.ports.Cluster`."""
        for name, counts in wanted.items():
            self._check(name, counts)
        self._check_capacity(wanted)
        for name, counts in wanted.items():
            index = self._index[name]
            before = self._wanted[index]
            asked = {a: n for a, n in counts.items() if n}
            if asked != {a: n for a, n in before.items() if n}:
                self._actions[index] += 1
            self._wanted[index] = asked
            for accelerator in self.world.servers[index].laws:
                self._bring(index, accelerator, asked.get(accelerator, 0))

    def fail(self, name: str) -> None:
        """End a replica at once; the next `advance` starts another in its place, as a cluster would."""
        replica = next((r for r in self._replicas if r.name == name), None)
        if replica is None:
            raise InvalidInput(f"no replica is named {name!r}; there are {', '.join(r.name for r in self._replicas)}")
        self._fail(replica)

    def _check(self, name: str, counts: Mapping[str, int]) -> None:
        if name not in self._index:
            raise ActuationFailed(f"there is no server {name!r}; there are {', '.join(self._index)}")
        laws = self.world.servers[self._index[name]].laws
        if any(a not in laws or n < 0 for a, n in counts.items()):
            raise ActuationFailed(f"{name} cannot have {dict(counts)} replicas; it runs on {', '.join(laws)}")

    def _check_capacity(self, wanted: Counts) -> None:
        used: dict[str, int] = {}
        for index, server in enumerate(self.world.servers):
            for accelerator in server.laws:
                here = [r for r in self._replicas if r.server == index and r.accelerator.name == accelerator]
                draining = sum(r.phase == "draining" for r in here)
                live = wanted[server.name].get(accelerator, 0) if server.name in wanted else len(here) - draining
                unit = self._accelerators[accelerator]
                leaving = max(sum(r.phase == "ready" for r in here) - live, 0)
                used[unit.type] = used.get(unit.type, 0) + (draining + leaving + live) * unit.units * server.cards
        for kind, most in self.world.capacity.items():
            if used.get(kind, 0) > most:
                raise ActuationFailed(
                    f"{used[kind]} cards of {kind} are asked for, draining ones included; {most} exist"
                )

    def _bring(self, index: int, accelerator: str, count: int) -> None:
        mine = [r for r in self._replicas if r.server == index and r.accelerator.name == accelerator]
        live = [r for r in mine if r.phase != "draining"]
        for _ in range(count - len(live)):
            self._start(index, accelerator, cold_start_s=self._cold_start_s())
        spare = sorted(live, key=lambda r: (r.phase != "starting", self._load_of(r), -r.asked_s, r.name))
        for replica in spare[: max(len(live) - count, 0)]:
            if replica.phase == "starting":
                self._pay(replica, self.now_s)
            else:
                self._core.drain(replica.slot)
                replica.phase, replica.drained_s = "draining", self.now_s
        self._make_ready()
        self._retire()

    def _load_of(self, replica: _Replica) -> int:
        if replica.phase == "starting":
            return 0
        seen = self._core.counters(replica.slot)
        return int(seen["running"] + seen["waiting"])

    def _cold_start_s(self) -> float:
        spread = self.world.cold_start_spread
        return self.world.cold_start_s * (float(self._rng.lognormal(0.0, spread)) if spread else 1.0)

    def _start(self, index: int, accelerator: str, *, cold_start_s: float) -> None:
        server = self.world.servers[index]
        ready_s = self.now_s + cold_start_s
        life_s = self.world.mean_life_s
        lives_s = float(self._rng.exponential(life_s)) if math.isfinite(life_s) else math.inf
        self._replicas.append(
            _Replica(
                name=f"{server.name}-{self._started}",
                server=index,
                accelerator=self._accelerators[accelerator],
                asked_s=self.now_s,
                ready_s=ready_s,
                fails_s=ready_s + lives_s,
            )
        )
        self._started += 1

    def _make_ready(self) -> None:
        for replica in self._replicas:
            if replica.phase == "starting" and replica.ready_s <= self.now_s:
                law = self.world.servers[replica.server].laws[replica.accelerator.name]
                replica.slot = self._core.add(replica.server, law)
                replica.phase = "ready"

    def _fail_due(self) -> None:
        for replica in [r for r in self._replicas if r.phase != "starting" and r.fails_s <= self.now_s]:
            self._fail(replica)

    def _fail(self, replica: _Replica) -> None:
        phase = replica.phase
        if replica.slot >= 0:
            self._core.fail(replica.slot)
        self._pay(replica, self.now_s)
        if phase != "draining":
            self._start(replica.server, replica.accelerator.name, cold_start_s=self._cold_start_s())

    def _retire(self) -> None:
        """Let go of drained replicas that serve nobody any more."""
        for replica in [r for r in self._replicas if r.phase == "draining"]:
            seen = self._core.counters(replica.slot)
            if seen["running"] + seen["waiting"] == 0:
                self._core.remove(replica.slot)
                self._pay(replica, max(float(seen["emptied_s"]), replica.drained_s))

    def _pay(self, replica: _Replica, until_s: float) -> None:
        self._paid_s[replica.server][replica.accelerator.name] += until_s - replica.asked_s
        self._replicas.remove(replica)

    # ---- what is seen ----

    def observe(self, window_s: float) -> FleetState:
        """See `flyball.core.ports.MetricsSource`; the window is one of whole scrapes, and no longer than 15 minutes."""
        now = self._look()
        since = next((s for s in reversed(self._sights) if s.time_s <= self.now_s - window_s + 1e-9), self._sights[0])
        servers = {s.name: self._server_view(i, since, now) for i, s in enumerate(self.world.servers)}
        return FleetState(now_s=self.now_s, window_s=max(self.now_s - since.time_s, 1e-9), servers=servers)

    def _look(self) -> _Sight:
        servers = range(len(self.world.servers))
        return _Sight(
            self.now_s,
            tuple(self._core.server(i) for i in servers),
            tuple(self._promises[i].good for i in servers),
            {r.name: self._core.counters(r.slot) for r in self._replicas if r.slot >= 0},
        )

    def _scrape(self) -> None:
        now, last = self._look(), self._sights[-1]
        self._sights.append(now)
        while self._sights[1].time_s <= self.now_s - _KEPT_S:
            self._sights.popleft()
        lasted_s = now.time_s - last.time_s
        for i, timeline in enumerate(self._timelines):
            phases = [r.phase for r in self._replicas if r.server == i]
            gauges = [now.replicas[r.name] for r in self._replicas if r.server == i and r.slot >= 0]
            ended = int(now.servers[i]["completed"] + now.servers[i]["lost"])
            ended -= int(last.servers[i]["completed"] + last.servers[i]["lost"])
            timeline.add(
                lasted_s,
                {
                    "arrival_rps": int(now.servers[i]["arrivals"] - last.servers[i]["arrivals"]) / lasted_s,
                    "wanted": sum(self._wanted[i].values()),
                    **{p: phases.count(p) for p in _PHASES},
                    "attainment": (now.good[i] - last.good[i]) / ended if ended else math.nan,
                    "running": sum(int(g["running"]) for g in gauges),
                    "waiting": sum(int(g["waiting"]) for g in gauges) + int(now.servers[i]["queued"]),
                },
            )

    def _server_view(self, index: int, since: _Sight, now: _Sight) -> ServerView:
        seen, before = now.servers[index], since.servers[index]
        arrivals = int(seen["arrivals"] - before["arrivals"])
        completed = int(seen["completed"] - before["completed"])
        return ServerView(
            name=self.world.servers[index].name,
            arrivals=arrivals,
            queued=int(seen["queued"]),
            input_tokens=int(seen["input"] - before["input"]) / arrivals if arrivals else math.nan,
            output_tokens=int(seen["output"] - before["output"]) / completed if completed else math.nan,
            completed=completed,
            good=now.good[index] - since.good[index],
            wanted=dict(self._wanted[index]),
            replicas=tuple(self._replica_view(r, since, now) for r in self._replicas if r.server == index),
        )

    def _replica_view(self, replica: _Replica, since: _Sight, now: _Sight) -> ReplicaView:
        age_s = self.now_s - replica.asked_s
        if replica.slot < 0:
            return ReplicaView(name=replica.name, accelerator=replica.accelerator.name, phase="starting", age_s=age_s)
        law = self.world.servers[replica.server].laws[replica.accelerator.name]
        seen = now.replicas[replica.name]
        before = since.replicas.get(replica.name, _NOTHING)

        def grown(name: str) -> int:
            return int(seen[name] - before[name])

        def mean_s(total: str, count: str) -> float:
            return float(seen[total] - before[total]) / grown(count) if grown(count) else math.nan

        prompt, hits = grown("prompt"), grown("hits")
        return ReplicaView(
            name=replica.name,
            accelerator=replica.accelerator.name,
            phase=replica.phase,
            age_s=age_s,
            running=int(seen["running"]),
            waiting=int(seen["waiting"]),
            kv_used=int(seen["blocks_used"]) / int(seen["blocks"]),
            kv_capacity_tokens=law.blocks * law.block_tokens,
            arrivals=grown("arrivals"),
            completed=grown("completed"),
            generated_tokens=grown("generated"),
            prompt_tokens=prompt,
            ttft_s=mean_s("ttft_sum_s", "firsts"),
            itl_s=mean_s("gap_sum_s", "gaps"),
            ttft_p90_s=_percentile_s(seen["ttft_hist"] - before["ttft_hist"], 0.9),
            itl_p90_s=_percentile_s(seen["gap_hist"] - before["gap_hist"], 0.9),
            prefix_hits=min(hits / prompt, 1.0) if prompt else 0.0,
        )


_PHASES: tuple[Literal["starting", "ready", "draining"], ...] = ("starting", "ready", "draining")
_NOTHING: Counters = np.zeros((), COUNTERS)


def _percentile_s(counts: NDArray[np.int64], share: float) -> float:
    """The share's bucket, where it ends; NaN of nothing."""
    below = np.cumsum(counts)
    return float(_BUCKET_ENDS_S[np.searchsorted(below, share * below[-1])]) if below[-1] else math.nan


def govern(fleet: SimulatedFleet, loop: FleetLoop | None, *, until_s: float = math.inf) -> list[Turn]:
    """Let a loop run a fleet until a time, or until the last arrival; without a loop its replicas stay.

    Returns the turns in which something changed, was held or was refused.
    """
    turns: list[Turn] = []
    memory = None if loop is None else loop.start()
    period_s = 60.0 if loop is None else loop.period_s
    while fleet.now_s < min(until_s, fleet.load_ends_s):
        fleet.advance(min(fleet.now_s + period_s, until_s, fleet.load_ends_s))
        if loop is None or memory is None:
            continue
        before = fleet.actions
        seen, memory = turn(fleet, loop, fleet, memory)
        if fleet.actions != before or seen.blind or seen.refused:
            turns.append(seen)
    return turns
