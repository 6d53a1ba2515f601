"""Learn a replica's latency law while it serves: what every replica shows, cycle by cycle, corrects what is believed.

The belief is Gaussian over the logs of alpha, beta and gamma of one model, accelerator and configuration. Each cycle it
is found anew from what was believed before the first window kept (the prior) and the windows kept: the mode of the
posterior by nonlinear least squares, its covariance from the Jacobian there (the iterated extended Kalman update, taken
over all windows kept at once: Bell and Cathey, IEEE TAC 38(2), 1993). So

- directions that the windows do not determine stay where the prior has them, and the covariance says so;
- a single odd window counts little (Huber, 1964), and one far outside what is believed not at all, unless the next
  ones agree with it: then the replica has changed. What is kept of the old belief is the ratio of the parameters; how
  fast the whole runs is open again;
- older windows count less, as if the parameters moved a little each cycle;
- a saturated window has no mean wait, since that depends on how long one looked: only its ITL counts, at a full batch;
- memory is bounded: of kept windows the oldest of the load seen most often makes room, so rare loads stay.

symbol   shape      meaning
x        [3]        log of alpha, beta, gamma (seconds)
P        [3, 3]     its covariance; P0 and x0 those of the prior
W        windows kept
y        [2 W]      log of measured TTFTs, then of measured ITLs
h(x)     [2 W]      log of what the law says
J        [2 W, 3]   dh / dx
R        [2 W]      variance of y: noise, age, and the load's own noise through d h / d log(load)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.optimize import least_squares

from flyball.core.errors import InvalidInput
from flyball.core.fleet import IDENTIFIED_BELOW, Accelerator, LatencyProfile
from flyball.numerics.kalman import Belief
from flyball.numerics.markov import Floats
from flyball.performance.fit import HOPELESS, OperatingPoint, steady_start
from flyball.performance.queueing import QueueModel, Replicas, queue_model

KEPT = 48  # windows
CONFIRMED = 3  # odd windows in a row that make a change
READY = 5  # windows before a window can be called odd
_DRIFT = 0.01  # by which a parameter may move in a cycle, relative
_LOAD_NOISE = 0.02  # relative error of a window's arrival rate
_NOISE = (0.005, 0.05, 0.3)  # relative error of a window's mean latency: least, at first, most
_HUBER = 2.0  # standard deviations from which an error counts linearly
_GATE = 13.8  # 99.9 % of chi-squared with 2 degrees of freedom
_OPEN = 0.5  # standard deviation of the common factor after a change
_LOOSE = 0.06  # and of each parameter by itself
_FLOODED = 1e6  # requests/s that fill any batch
_STEP = 1e-3  # of a log parameter, for J
_REACH = np.log(1e4)  # how far a fit may go from the prior
_PRIOR_SPREAD = 2.5  # of a log parameter about which nothing is known: a factor of 12
_TRANSFER_SPREAD = 0.4  # of one carried over from another accelerator, memory and compute both known
_UNKNOWN_SPREAD = 0.8  # where one of these is not known

UNKNOWN = Belief(np.log([5e-3, 5e-5, 5e-8]), np.eye(3) * _PRIOR_SPREAD**2)  # llm-inferno's default start


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A window of one replica, and the cycle it came in."""

    point: OperatingPoint
    cycle: int

    @property
    def saturated(self) -> bool:
        """Whether, by Little's law, as many requests were in the replica as its batch holds."""
        p = self.point
        return p.arrival_rps * (p.ttft_s + p.output_tokens * p.itl_s) >= p.max_batch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibration:
    """All that is known of one model on one accelerator; `adapters.calibration_files` keeps it on disk."""

    model: str
    accelerator: str
    queue_model: str = "v3-engine"
    generation: str = ""  # configuration; another one is another calibration
    prior: Belief = UNKNOWN
    belief: Belief = UNKNOWN
    kept: tuple[Seen, ...] = ()
    suspects: tuple[Seen, ...] = ()  # odd windows, the latest in a row
    cycle: int = 0
    noise: float = _NOISE[1]  # relative, of a window's mean latency
    condition_number: float = HOPELESS
    changes: int = 0
    outliers: int = 0

    @property
    def identified(self) -> bool:
        """Whether the windows alone determine all three parameters; if not, the prior had a say in them."""
        return self.condition_number <= IDENTIFIED_BELOW

    def profile(self) -> LatencyProfile:
        """What is believed, as the planner sizes with it."""
        if not self.kept:
            raise InvalidInput(
                f"nothing was observed of {self.model} on {self.accelerator} yet; observe a window before planning"
            )
        alpha, beta, gamma = np.exp(self.belief.mean).tolist()
        last = self.kept[-1].point
        return LatencyProfile(
            model=self.model,
            accelerator=self.accelerator,
            alpha_s=alpha,
            beta_s=beta,
            gamma_s=gamma,
            max_batch=last.max_batch,
            max_step_tokens=int(last.max_step_tokens),
            generation=self.generation,
            queue_model=self.queue_model,
            condition_number=self.condition_number,
            log_covariance=tuple(self.belief.covariance.ravel().tolist()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CycleReport:
    """What a cycle's windows did to the belief."""

    used: int
    saturated: int  # of which only ITL counted
    outliers: int  # left out for good
    suspects: int  # odd, waiting for the next ones to agree or not
    changed: bool  # the replica is another one than before
    error: float  # mean relative error of what the law says of this cycle's windows, after the update
    identified: bool
    condition_number: float
    advice: str  # what to measure, where the parameters are not determined


def begin(
    model: str, accelerator: str, *, law: str = "v3-engine", generation: str = "", prior: Belief = UNKNOWN
) -> Calibration:
    """A calibration that has seen nothing yet."""
    return Calibration(
        model=model, accelerator=accelerator, queue_model=law, generation=generation, prior=prior, belief=prior
    )


def prior_from(known: LatencyProfile, on: Accelerator, new: Accelerator) -> Belief:
    """What a known accelerator tells of another: alpha and gamma move with memory bandwidth, beta with compute.

    A step reads the weights (alpha) and the cache (gamma) from memory, and computes tokens (beta). Where a figure is
    missing the other one stands in, and the belief is wider.
    """
    memory = new.memory_gb_s / on.memory_gb_s if new.memory_gb_s and on.memory_gb_s else 0.0
    compute = new.compute_tflops / on.compute_tflops if new.compute_tflops and on.compute_tflops else 0.0
    if not (memory or compute):
        raise InvalidInput(
            f"neither memory bandwidth nor compute of both {on.name} and {new.name} is known; "
            "state memory_gb_s or compute_tflops of both"
        )
    if not known.known:
        raise InvalidInput(f"the profile of {known.model} on {known.accelerator} is empty; give one that was measured")
    faster = np.log([memory or compute, compute or memory, memory or compute])
    mean = np.log(np.maximum([known.alpha_s, known.beta_s, known.gamma_s], 1e-12)) - faster
    spread = np.where([memory, compute, memory], _TRANSFER_SPREAD, _UNKNOWN_SPREAD)
    own = np.reshape(known.log_covariance, (3, 3)) if known.log_covariance else np.zeros((3, 3))
    return Belief(mean, own + np.diag(spread**2))


def observe(state: Calibration, points: Sequence[OperatingPoint]) -> tuple[Calibration, CycleReport]:
    """One cycle: the windows of all replicas, in any order; without any, nothing changes but the cycle's number."""
    cycle = state.cycle + 1
    fresh = tuple(sorted((Seen(point=p, cycle=cycle) for p in points), key=_order))
    if not fresh:
        return replace(state, cycle=cycle), _report(state, (), 0, changed=False)
    odd = _odd(state, fresh) if len(state.kept) >= READY else (False,) * len(fresh)
    good = tuple(s for s, bad in zip(fresh, odd, strict=True) if not bad)
    bad = tuple(s for s, is_odd in zip(fresh, odd, strict=True) if is_odd)
    outliers, suspects = 0, state.suspects + bad
    if 2 * len(bad) <= len(fresh):  # most agree with what is believed, so the others are errors
        outliers, suspects = len(suspects), suspects[:0]
    changed = len(suspects) >= CONFIRMED
    if changed:
        prior, kept, suspects = _after_change(state.belief), suspects, suspects[:0]
    else:
        prior, kept = state.prior, _bounded(state.kept + good)
    state = replace(
        state, prior=prior, kept=kept, suspects=suspects, cycle=cycle,
        changes=state.changes + changed, outliers=state.outliers + outliers,
    )  # fmt: skip
    state = _refit(state, afresh=changed or len(kept) <= 2 * READY)
    return state, _report(state, kept[-KEPT:] if changed else good, outliers, changed=changed)


def _order(seen: Seen) -> tuple[float, ...]:
    p = seen.point
    return (p.arrival_rps, p.input_tokens, p.output_tokens, p.ttft_s, p.itl_s)


def _after_change(belief: Belief) -> Belief:
    """The ratios of the parameters stay; their common factor is open, and each a little."""
    return belief.moved(np.eye(3), np.full((3, 3), _OPEN**2) + np.eye(3) * _LOOSE**2)


def _bounded(kept: tuple[Seen, ...]) -> tuple[Seen, ...]:
    """At most KEPT windows: the oldest of the most crowded load goes first."""
    while len(kept) > KEPT:
        crowds = Counter(_load(s) for s in kept)
        most = max(crowds.values())
        goes = next(i for i, s in enumerate(kept) if crowds[_load(s)] == most)
        kept = kept[:goes] + kept[goes + 1 :]
    return kept


def _load(seen: Seen) -> tuple[int, ...]:
    """Loads within half an octave of rate, and an octave of lengths, count as alike."""
    p = seen.point
    rate, n, m = np.log2([p.arrival_rps, p.input_tokens, p.output_tokens]).tolist()
    return (round(2 * rate), round(n), round(m), p.max_batch)


@dataclass(frozen=True, slots=True, eq=False)
class _Windows:
    """Windows as arrays."""

    seen: tuple[Seen, ...]
    law: QueueModel
    measured: Floats = field(init=False)  # y [2 W]
    counts: Floats = field(init=False)  # [2 W] 0 where a TTFT says nothing

    def __post_init__(self) -> None:
        points = [s.point for s in self.seen]
        y = np.log([p.ttft_s for p in points] + [p.itl_s for p in points])
        counts = np.array([float(not s.saturated) for s in self.seen] + [1.0] * len(points))
        object.__setattr__(self, "measured", y)
        object.__setattr__(self, "counts", counts)

    def says(self, x: Floats, load: float = 1.0) -> Floats:
        """h [S, 2 W] for parameters [S, 3], the load being that many times what was measured."""
        points = [s.point for s in self.seen]
        rates = np.array([_FLOODED if s.saturated else s.point.arrival_rps * load for s in self.seen])
        alpha, beta, gamma = (np.repeat(np.exp(v), len(points)) for v in x.T)
        tiled = {
            name: np.tile([float(getattr(p, name)) for p in points], len(x))
            for name in ("input_tokens", "output_tokens", "max_batch", "max_queue", "max_step_tokens")
        }
        replicas = Replicas.of(alpha_s=alpha, beta_s=beta, gamma_s=gamma, **tiled)
        seen = self.law.prepare(replicas).analyze(np.tile(rates, len(x)))
        both = np.stack((seen.ttft_s.reshape(len(x), -1), seen.itl_s.reshape(len(x), -1)), axis=1)
        logs: Floats = np.log(np.maximum(np.nan_to_num(both, nan=1e9), 1e-12)).reshape(len(x), -1)
        return logs

    def jacobian(self, x: Floats) -> Floats:
        """J, by central differences, all at once."""
        moves = np.concatenate((np.eye(3), -np.eye(3))) * _STEP
        ends = self.says(x + moves)
        slopes: Floats = (ends[:3] - ends[3:]).T / (2 * _STEP)
        return slopes

    def variance(self, x: Floats, noise: float, cycle: int) -> Floats:
        """R."""
        up, down = self.says(x[None], 1.01)[0], self.says(x[None], 0.99)[0]
        elasticity = (up - down) / 0.02
        age = np.tile([float(cycle - s.cycle) for s in self.seen], 2)
        total: Floats = noise**2 + age * _DRIFT**2 + (_LOAD_NOISE * elasticity) ** 2
        return total


def _odd(state: Calibration, fresh: tuple[Seen, ...]) -> tuple[bool, ...]:
    """Which windows lie outside what is believed, its own uncertainty included."""
    windows = _Windows(fresh, queue_model(state.queue_model))
    x = state.belief.mean
    error = (windows.measured - windows.says(x[None])[0]) * windows.counts
    j, r = windows.jacobian(x), windows.variance(x, state.noise, state.cycle + 1)
    answers = []
    for i in range(len(fresh)):
        rows = [k for k in (i, i + len(fresh)) if windows.counts[k]]
        s = j[rows] @ state.belief.covariance @ j[rows].T + np.diag(r[rows])
        answers.append(float(error[rows] @ np.linalg.solve(s, error[rows])) > _GATE)
    return tuple(answers)


def _refit(state: Calibration, *, afresh: bool) -> Calibration:
    """The mode of the posterior and its covariance, from the prior and all windows kept."""
    windows = _Windows(state.kept, queue_model(state.queue_model))
    starts = [state.belief.mean]
    if afresh:
        starts += [state.prior.mean, steady_start([s.point for s in state.kept])]
    root = np.linalg.inv(np.linalg.cholesky(state.prior.covariance))  # P0⁻¹ = root' root
    variance = windows.variance(starts[0], state.noise, state.cycle)
    runs = [_mode(windows, state.prior, root, variance, start) for start in starts]
    x = min(runs, key=lambda run: run[0])[1]
    noise = _noise(windows, x, state.noise)
    variance = windows.variance(x, noise, state.cycle)
    _, x = _mode(windows, state.prior, root, variance, x)
    j = windows.jacobian(x)
    weight = windows.counts / variance
    covariance = np.linalg.inv((j * weight[:, None]).T @ j + root.T @ root)
    singular = np.linalg.svd(j * windows.counts[:, None], compute_uv=False)
    known = len(singular) == 3 and np.count_nonzero(windows.counts) >= 3 and singular[2] > 0
    kappa = float(min(singular[0] / singular[2], HOPELESS)) if known else HOPELESS
    return replace(state, belief=Belief(x, (covariance + covariance.T) / 2), noise=noise, condition_number=kappa)


def _mode(windows: _Windows, prior: Belief, root: Floats, variance: Floats, start: Floats) -> tuple[float, Floats]:
    """Least of the robust misfit and the distance to the prior, from one start; cost and place."""
    scale = windows.counts / np.sqrt(variance)
    free = len(scale)  # rows that count robustly; the prior's do not

    def residuals(x: Floats) -> Floats:
        return np.concatenate(((windows.says(x[None])[0] - windows.measured) * scale, root @ (x - prior.mean)))

    def slopes(x: Floats) -> Floats:
        return np.concatenate((windows.jacobian(x) * scale[:, None], root))

    def loss(squares: Floats) -> Floats:
        """Huber's for the windows, squares for the prior: value, first and second derivative."""
        far = np.sqrt(np.maximum(squares, _HUBER**2))
        rho = np.stack((2 * _HUBER * far - _HUBER**2, _HUBER / far, -_HUBER / (2 * far**3)))
        plain = (squares <= _HUBER**2) | (np.arange(len(squares)) >= free)
        rho[:, plain] = np.stack((squares, np.ones_like(squares), np.zeros_like(squares)))[:, plain]
        return rho

    bounds = (prior.mean - _REACH, prior.mean + _REACH)
    inside = np.clip(start, bounds[0] + 1e-6, bounds[1] - 1e-6)
    run = least_squares(residuals, inside, jac=slopes, bounds=bounds, loss=loss, xtol=1e-9, ftol=1e-9, max_nfev=60)
    return float(run.cost), np.asarray(run.x, dtype=np.float64)


def _noise(windows: _Windows, x: Floats, before: float) -> float:
    """Relative noise of a window's latency, by the median error (1.4826 of it is a normal law's deviation)."""
    errors = np.abs(windows.says(x[None])[0] - windows.measured)[windows.counts > 0]
    if len(errors) < 2 * READY:
        return before
    seen = 1.4826 * float(np.median(errors)) * np.sqrt(len(errors) / (len(errors) - 3))
    return float(np.clip(seen, _NOISE[0], _NOISE[2]))


def _report(state: Calibration, used: tuple[Seen, ...], outliers: int, *, changed: bool) -> CycleReport:
    error = 0.0
    if used:
        windows = _Windows(used, queue_model(state.queue_model))
        misses = np.expm1(windows.says(state.belief.mean[None])[0] - windows.measured)[windows.counts > 0]
        error = float(np.abs(misses).mean())
    return CycleReport(
        used=len(used),
        saturated=sum(s.saturated for s in used),
        outliers=outliers,
        suspects=len(state.suspects),
        changed=changed,
        error=error,
        identified=state.identified,
        condition_number=state.condition_number,
        advice="" if state.identified else _advice(state.kept),
    )


def _advice(kept: tuple[Seen, ...]) -> str:
    """What would tell the parameters apart."""
    if not kept:
        return "observe windows of two loads and two token mixes"
    n, m = (float(np.mean([getattr(s.point, name) for s in kept])) for name in ("input_tokens", "output_tokens"))
    return (
        f"loads so far do not tell the parameters apart; measure also {2 * n:.0f} tokens in and {m / 2:.0f} out, "
        f"and {n / 2:.0f} in and {2 * m:.0f} out, at a quarter of the present rate"
    )
