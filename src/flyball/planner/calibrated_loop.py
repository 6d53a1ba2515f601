"""The loop's calibrate step: what replicas show corrects the latency profiles that it sizes with.

Around a loop (`flyball.planner.loop`, or the rehearsed one) stands one that hands every replica's window to the online
calibrator (`flyball.planner.calibrate`) of its model and accelerator, and lets the loop decide with what was learnt
where that can be relied on: the windows determine all three parameters, and what the law then says of them is what they
show. Elsewhere the spec's profile stands. Which of the two, and why, is among the reasons of each decision.

A window is as many looks at a replica as it takes to end enough requests for a mean. It counts if the replica was ready
and reported its latencies throughout, and ended about as many requests as came: the law speaks of steady loads. Where
no such window comes, nothing differs from the loop within.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace

import numpy as np

from flyball.core.fleet import FleetSpec, LatencyProfile, ServerSpec
from flyball.core.observation import FleetState, ReplicaView, ServerView
from flyball.numerics.kalman import Belief
from flyball.numerics.markov import Floats
from flyball.performance.fit import OperatingPoint, relative_errors
from flyball.performance.queueing import DEFAULT_STEP_TOKENS, queue_model
from flyball.planner.calibrate import READY, UNKNOWN, Calibration, begin, observe
from flyball.planner.loop import FleetDecision, FleetLoop, LoopMemory
from flyball.planner.problem import BATCH_CEILING

Pair = tuple[str, str]  # model, accelerator
LAWS = ("v3", "v3-engine")  # that have the three parameters a calibration learns
_USUAL_LAW = "v3-engine"  # where the spec's is another one
ENOUGH = 200  # requests ended that make a window: fewer, and chance passes for a change of the law
LONGEST_S = 600.0  # that a window takes
LEAST = 30  # requests that a window of that length must have ended
STEADY = 0.2  # by how much what came and what ended may differ, as a share of what came
TRUSTED = 0.2  # median relative error of the windows kept up to which a learnt law is used
_STATED_SPREAD = 0.5  # of the log of a parameter that the spec states: a factor of 1.6
_LEARNT = (
    "alpha_s", "beta_s", "gamma_s", "delta_s", "queue_model", "generation", "condition_number", "log_covariance",
)  # fmt: skip
_SAME = 0.02  # laws whose latencies differ by less are one: replicas are not moved for it


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnt:
    """What is known of one pair, and the profile sized with."""

    calibration: Calibration
    advice: str = ""  # what to measure, where the parameters are not determined
    used: LatencyProfile | None = None  # None: the spec's
    said: str = ""  # which of the two, and why


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What was seen of one ready replica since a moment: sums over the requests that ended."""

    inside: float  # requests, when it began
    lasted_s: float = 0.0
    arrivals: float = 0.0  # 0 where nobody counts them
    completed: float = 0.0
    ttft_s: float = 0.0
    itl_s: float = 0.0
    input_tokens: float = 0.0
    output_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class CalibratedMemory(LoopMemory):
    """The loop's memory, and what it learnt."""

    learnt: Mapping[Pair, Learnt] = field(default_factory=dict)
    windows: Mapping[tuple[str, str], Window] = field(default_factory=dict)  # by server and replica
    looked_s: float = -math.inf  # the state's own time when windows were added to last


class CalibratedLoop(FleetLoop):
    """A loop that learns; `make` builds the one within for a spec, `known` is what earlier runs learnt."""

    def __init__(
        self, make: Callable[[FleetSpec], FleetLoop], spec: FleetSpec, known: Iterable[Calibration] = ()
    ) -> None:
        self._make, self._within = make, make(spec)
        super().__init__(spec, self._within.settings)
        self._stated = {(p.model, p.accelerator): p for p in spec.profiles}
        self._known = self._of_ours({(one.model, one.accelerator): Learnt(calibration=one) for one in known})

    def start(self) -> CalibratedMemory:
        """Nothing seen but what earlier runs learnt."""
        return CalibratedMemory(learnt=self._known)

    def decide(self, state: FleetState, memory: LoopMemory) -> tuple[FleetDecision, CalibratedMemory]:
        """The decision of the loop within, sizing with the profiles that can be relied on most."""
        before = memory if isinstance(memory, CalibratedMemory) else _widened(memory, self.start())
        before = replace(before, learnt=self._of_ours(before.learnt))  # another spec may have been learnt for
        _, odd = self._elapsed(state, before)
        observed = before if odd else self._observe(state, before)
        after = replace(observed, learnt={pair: self._choose(pair, one) for pair, one in observed.learnt.items()})
        decision, own = self._sizing_with(after).decide(state, before)
        reasons = {name: (*said, *self._told(name, after)) for name, said in decision.reasons.items()}
        return replace(decision, reasons=reasons), _widened(own, after)

    def refused(self, before: LoopMemory, after: LoopMemory, servers: Container[str]) -> LoopMemory:
        """As the loop within has it."""
        return self._within.refused(before, after, servers)

    def _of_ours(self, learnt: Mapping[Pair, Learnt]) -> dict[Pair, Learnt]:
        """What was learnt of pairs that the spec has, under the law that it has."""
        return {
            pair: one
            for pair, one in learnt.items()
            if pair in self._stated and one.calibration.queue_model == self._law(pair)
        }

    def _law(self, pair: Pair) -> str:
        stated = self._stated[pair]
        return stated.queue_model if stated.queue_model in LAWS and stated.known else _USUAL_LAW

    def _observe(self, state: FleetState, memory: CalibratedMemory) -> CalibratedMemory:
        """Windows grow, and each calibrator sees those that are complete."""
        if state.now_s - memory.looked_s < 0.99 * state.window_s:
            return memory  # what was seen already would count twice
        windows: dict[tuple[str, str], Window] = {}
        points: dict[Pair, list[OperatingPoint]] = {}
        for server, view, r in self._ready(state):
            window = _grown(memory.windows.get((server.name, r.name)), view, r, state.window_s)
            if window.completed >= ENOUGH or window.lasted_s >= LONGEST_S:
                pair = (server.model, r.accelerator)
                point = _point(window, server, self._stated[pair], r.running + r.waiting)
                points.setdefault(pair, []).extend([point] if point else [])
                window = Window(inside=r.running + r.waiting)
            windows[server.name, r.name] = window
        learnt = dict(memory.learnt)
        for pair, seen in points.items():
            if seen:
                calibration = learnt[pair].calibration if pair in learnt else self._begin(pair)
                calibration, report = observe(calibration, seen)
                used = learnt[pair].used if pair in learnt else None
                learnt[pair] = Learnt(calibration=calibration, advice=report.advice, used=used)
        return replace(memory, learnt=learnt, windows=windows, looked_s=state.now_s)

    def _ready(self, state: FleetState) -> Iterator[tuple[ServerSpec, ServerView, ReplicaView]]:
        """Replicas that report, on accelerators that the spec has a profile for."""
        for server in self.spec.servers:
            view = state.servers.get(server.name)
            for r in view.ready if view is not None else ():
                if view is not None and r.reported and (server.model, r.accelerator) in self._stated:
                    yield server, view, r

    def _begin(self, pair: Pair) -> Calibration:
        """What the spec states is believed to within a factor, what it leaves at 0 is not known."""
        stated = np.array([getattr(self._stated[pair], name) for name in ("alpha_s", "beta_s", "gamma_s")])
        usable = (stated > 0) & (self._stated[pair].queue_model == self._law(pair))
        mean = np.where(usable, np.log(np.maximum(stated, 1e-12)), UNKNOWN.mean)
        spread = np.where(usable, _STATED_SPREAD**2, np.diag(UNKNOWN.covariance))
        generation = self._stated[pair].generation
        return begin(*pair, law=self._law(pair), generation=generation, prior=Belief(mean, np.diag(spread)))

    def _choose(self, pair: Pair, one: Learnt) -> Learnt:
        """The learnt profile where it can be relied on; the one in use as long as it says the same."""
        state = one.calibration
        off = _off(state) if len(state.kept) >= READY else math.inf
        doubt = _doubt(one, off)
        if doubt:
            return replace(one, used=None, said=f"sized with the spec's latency profile on {pair[1]}: {doubt}")
        used = self._profile(pair, state)
        if one.used is not None and _alike(one.used, used, state):
            law = {name: getattr(one.used, name) for name in _LEARNT}
            used = replace(self._stated[pair], **law)
        seen = f"{len(state.kept)} windows, {off:.1%} off them"
        changes = f", {state.changes} changes of it noticed" if state.changes else ""
        return replace(one, used=used, said=f"sized with what was learnt of {pair[1]} from {seen}{changes}")

    def _profile(self, pair: Pair, state: Calibration) -> LatencyProfile:
        """What is believed now, in place of what the spec states."""
        alpha, beta, gamma = np.exp(state.belief.mean).tolist()
        return replace(
            self._stated[pair], alpha_s=alpha, beta_s=beta, gamma_s=gamma, delta_s=0.0, queue_model=state.queue_model,
            generation=state.generation, condition_number=state.condition_number,
            log_covariance=tuple(state.belief.covariance.ravel().tolist()),
        )  # fmt: skip

    def _sizing_with(self, memory: CalibratedMemory) -> FleetLoop:
        """The loop within for the profiles chosen; the last one made is kept, since they seldom change."""
        profiles = tuple(
            (one.used or p) if (one := memory.learnt.get((p.model, p.accelerator))) else p for p in self.spec.profiles
        )
        if profiles != self._within.spec.profiles:
            self._within = self._make(replace(self.spec, profiles=profiles))
        return self._within

    def _told(self, name: str, memory: CalibratedMemory) -> list[str]:
        """Which profiles a server was sized with, where any of its replicas were observed, and why."""
        model = next(s.model for s in self.spec.servers if s.name == name)
        return [one.said for pair, one in sorted(memory.learnt.items()) if pair[0] == model]


def calibrations(memory: LoopMemory) -> tuple[Calibration, ...]:
    """All that was learnt, to be kept over a restart (`adapters.calibration_files`)."""
    learnt = memory.learnt if isinstance(memory, CalibratedMemory) else {}
    return tuple(one.calibration for _, one in sorted(learnt.items()))


def _widened(memory: LoopMemory, learnt: CalibratedMemory) -> CalibratedMemory:
    """The loop's own part from one memory, what was learnt from another."""
    return replace(learnt, **{f.name: getattr(memory, f.name) for f in fields(LoopMemory)})


def _grown(window: Window | None, view: ServerView, r: ReplicaView, window_s: float) -> Window:
    """The window with one more look; at the first look, and where latencies are missing, it begins anew."""
    means = (r.ttft_s, r.itl_s, view.input_tokens, view.output_tokens)
    told = all(math.isfinite(mean) and mean > 0 for mean in means)
    if window is None or (r.completed and not told):
        return Window(inside=r.running + r.waiting)
    ttft_s, itl_s, n, m = (r.completed * mean if told else 0.0 for mean in means)
    return Window(
        inside=window.inside,
        lasted_s=window.lasted_s + window_s,
        arrivals=window.arrivals + r.arrivals,
        completed=window.completed + r.completed,
        ttft_s=window.ttft_s + ttft_s,
        itl_s=window.itl_s + itl_s,
        input_tokens=window.input_tokens + n,
        output_tokens=window.output_tokens + m,
    )


def _point(w: Window, server: ServerSpec, profile: LatencyProfile, inside: float) -> OperatingPoint | None:
    """A complete window as the calibrator takes it, or None where it does not count."""
    came = w.arrivals or w.completed + inside - w.inside
    if w.completed < LEAST or abs(came - w.completed) > STEADY * came:
        return None
    output_tokens = w.output_tokens / w.completed
    batch = server.max_batch or profile.batch_limit(output_tokens) or BATCH_CEILING
    return OperatingPoint(
        arrival_rps=came / w.lasted_s,
        input_tokens=w.input_tokens / w.completed,
        output_tokens=output_tokens,
        max_batch=batch,
        max_queue=server.max_queue or batch,
        max_step_tokens=profile.max_step_tokens or DEFAULT_STEP_TOKENS,
        ttft_s=w.ttft_s / w.completed,
        itl_s=w.itl_s / w.completed,
    )


def _doubt(one: Learnt, off: float) -> str:
    """Why what was learnt is not relied on; "" where it is."""
    state = one.calibration
    if len(state.kept) < READY:
        return f"{len(state.kept)} of {READY} windows were seen"
    if not state.identified:
        return one.advice or "the windows seen do not determine the parameters"
    return f"what was learnt is {off:.0%} off what replicas show" if off > TRUSTED else ""


def _errors(state: Calibration, alpha_s: float, beta_s: float, gamma_s: float) -> Floats:
    """[2, W] What a law says of the windows kept over what they showed, less 1: TTFT, then ITL."""
    points = [s.point for s in state.kept]
    return relative_errors(points, queue_model(state.queue_model), np.array([alpha_s, beta_s, gamma_s]))


def _off(state: Calibration) -> float:
    """The larger of the median errors of TTFT and ITL: one odd window says nothing."""
    return float(np.median(np.abs(_errors(state, *np.exp(state.belief.mean).tolist())), axis=1).max())


def _alike(old: LatencyProfile, new: LatencyProfile, state: Calibration) -> bool:
    """Whether two laws differ, in the windows kept, by less than replicas should be moved for."""
    a, b = (1.0 + _errors(state, p.alpha_s, p.beta_s, p.gamma_s) for p in (old, new))
    return bool(np.median(np.abs(b / a - 1.0), axis=1).max() <= _SAME)
