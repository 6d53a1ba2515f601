"""A local proposer: a quadratic model of the points near the incumbent, minimised within a radius that it earns.

d, p        knobs; terms of a quadratic, 1 + d + d (d + 1) / 2
c, r        the incumbent's point; the trust radius around it, in edges of the cube
h           reach of the model: the radius, or the distance of its K-th nearest point if that is more
S           (points - c) / h                                                      [n, d]
F           1, S_i, S_i S_j (i <= j)                                              [n, p]
w           exp(-|S|^2): near points count most                                   [n]
B           solves (F' w F + ridge) B = F' w Y: cost and every margin at once      [p, 1 + constraints]

Where the model was right the radius grows, where it was wrong it shrinks (Powell's UOBYQA, 2002, simplified). Points
that failed, and those whose cost lies far above a gap among their neighbours (a cliff: a penalty, a timeout), stay out
of the model and keep others away that are nearer to them than to a good point. Below the least radius the search has
settled: it measures the incumbent again, which finds a change of the world, and looks around ever less often. Where a
quadratic does not explain the whole space, it hops to another region first.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from flyball.tuner.online.cube import Cube, Matrix, Vector, low_discrepancy
from flyball.tuner.online.points import Points, Seen

FIRST_RADIUS = 0.35
LEAST_RADIUS = 1e-4
MOST_RADIUS = 0.6
_CANDIDATES = 24  # random ones, beside those on the path to the model's minimum
_PATH = np.concatenate([[0.0], 10.0 ** np.linspace(-4, 2.5, 14)])
_MARGIN = 1.0  # standard deviations of the model's residual that a predicted margin must keep
_NOISY_RADIUS = 0.02  # the least radius where measurements are noisy
_EXACT = 1e-3  # of the spread of the costs: a residual that small means that the model is right
_LOOK = (6, 64)  # asks from one look around to the next once settled: at first, at most
_EXPLAINED = 0.9  # share of variance that one quadratic must explain for hops to be of no use


class Suggestion(NamedTuple):
    """A point to measure, and why."""

    u: Vector
    why: str


class _Step(NamedTuple):
    """What the model expected of a point."""

    u: Vector
    gain: float
    length: float


class Local:
    """See the module."""

    name = "local"

    def __init__(self, cube: Cube, *, seed: int, constraints: int = 0, start: Vector | None = None) -> None:
        d = cube.size
        self._cube = cube
        self._rng = np.random.default_rng(seed)
        self._i, self._j = np.triu_indices(d)
        self._p = 1 + d + len(self._i)
        self.points = Points(room=max(96, 4 * self._p), size=d, constraints=constraints)
        shift = self._rng.random(d)
        self._design = deque([start] if start is not None else [])
        self._design.extend(cube.snap(low_discrepancy(0, 2 * d + 2, d, shift)))
        self.radius = FIRST_RADIUS
        self.settled = False
        self._best: int | None = None
        self._steps: list[_Step] = []
        self._looks = _LOOK[0]
        self._since_look = 0
        self._check = False
        self._surprises = 0
        self._replicated = False
        self._hop_from: tuple[Vector, float] | None = None
        self._hop_left = 0
        self._hops_failed = 0
        self._quiet = 0  # asks until the next hop may begin

    # -- ask ----------------------------------------------------------------------------------------------------------

    def ask(self, pending: Matrix) -> Suggestion:
        """The next point; it differs from every pending one."""
        if self._design:
            return Suggestion(self._design.popleft(), "a spread of first points")
        best = self._best
        if best is None:
            return Suggestion(self._random(pending), "nothing was measured yet")
        known = self.points.u[best]
        if self._due_again(best) and not _among(known, pending):
            self._check = False
            return Suggestion(known.copy(), "the incumbent again")
        if self.settled:
            return self._settled_ask(known, pending)
        return self._model_step(best, pending)

    def _due_again(self, best: int) -> bool:
        points = self.points
        if self._check:
            return True
        if points.noise > 0 and points.count[best] < 2:
            return True
        if not self._replicated and points.n >= 3 * self._cube.size + 4:
            self._replicated = True
            return True
        return False

    def _settled_ask(self, known: Vector, pending: Matrix) -> Suggestion:
        self._since_look += 1
        self._quiet -= 1
        if self._quiet <= 0 and self._worth_hopping():
            self._begin_hop(known)
            assert self._best is not None
            return Suggestion(self._design.popleft(), "another region, as one quadratic does not explain this one")
        if self._since_look < self._looks and not _among(known, pending):
            return Suggestion(known.copy(), "the incumbent, settled")
        if self._since_look >= self._looks:
            self._since_look, self._looks = 0, min(int(self._looks * 1.5) + 1, _LOOK[1])
        reach = 0.02 * 4.0 ** self._rng.random()
        around = self._around(known, reach)
        allowed = self._apart(around, pending, 0.0) & self._safe(around)
        if not allowed.any():
            return Suggestion(self._random(pending) if _among(known, pending) else known.copy(), "the incumbent, settled")
        chosen = around[int(allowed.argmax())]
        self._steps.append(_Step(chosen, 0.0, reach))
        return Suggestion(chosen, "a look around the incumbent")

    def _model_step(self, best: int, pending: Matrix) -> Suggestion:
        points = self.points
        known = points.u[best]
        model = _Model(self, best)
        noise = np.sqrt(points.noise)
        while True:
            steps = model.candidates(self.radius, self._rng)
            around = self._cube.snap(known + steps)
            away = self._cube.differences(around, known)
            allowed = self._apart(around, pending, 0.02 * self.radius)
            if model.bad.any():
                allowed &= self._safe(around, model.bad)
            expected = model.expect(away)
            gains = np.where(allowed, model.at_center - expected[:, 0], -np.inf)
            if expected.shape[1] > 1:
                broken = np.maximum(expected[:, 1:] + _MARGIN * model.deviation[1:], 0.0).sum(axis=1)
                least = np.where(allowed, broken, np.inf).min()
                if least > 0:
                    gains = np.where(allowed, broken_now(points, best) - broken, -np.inf)
                else:
                    gains = np.where(broken > 0, -np.inf, gains)
            chosen = int(gains.argmax())
            far = gains[chosen] > max(model.tolerance, 0.2 * noise)
            unsure = not model.exact and self._thin(best)
            if unsure and (not far or (away[chosen] ** 2).sum() < (0.1 * self.radius) ** 2):
                if (filling := self._fill(known, pending, model)) is not None:
                    return filling
            if far:
                step = _Step(around[chosen], float(gains[chosen]), float(np.sqrt((away[chosen] ** 2).sum())))
                self._steps.append(step)
                return Suggestion(step.u, f"the model's minimum within {self.radius:.3g}")
            self.radius *= 0.5
            if self.radius < (_NOISY_RADIUS if points.noise > 0 else LEAST_RADIUS):
                return self._settle(known, pending)

    def _thin(self, best: int) -> bool:
        """Whether there are too few rows around to say what happens within the radius."""
        points = self.points
        away = np.abs(self._cube.differences(points.u[: points.n], points.u[best])).max(axis=1)
        near = int(((away > 0.05 * self.radius) & (away <= 2.0 * self.radius)).sum())
        return near < min(self._p - 1, 2 * self._cube.size + 1)

    def _fill(self, known: Vector, pending: Matrix, model: _Model) -> Suggestion | None:
        """The candidate farthest from all rows: the model lacks points to stand on."""
        around = self._around(known, self.radius)
        allowed = self._apart(around, pending, 0.1 * self.radius) & self._safe(around, model.bad)
        if not allowed.any():
            return None
        rows = self.points.u[: self.points.n]
        gaps = ((around[:, None, :] - rows) ** 2).sum(axis=2).min(axis=1)
        chosen = around[int(np.where(allowed, gaps, -1.0).argmax())]
        self._steps.append(_Step(chosen, 0.0, self.radius))
        return Suggestion(chosen, "a point that the model lacks")

    def _settle(self, known: Vector, pending: Matrix) -> Suggestion:
        self.settled = True
        self.radius = LEAST_RADIUS
        self._since_look = 0
        self._end_hop()
        return self._settled_ask(self.points.u[self._best if self._best is not None else 0], pending)

    def _around(self, known: Vector, reach: float) -> Matrix:
        steps = self._rng.standard_normal((_CANDIDATES, self._cube.size))
        steps *= reach / np.sqrt(np.maximum((steps**2).mean(axis=1, keepdims=True), 1e-12))
        return self._cube.snap(known + steps)

    def _random(self, pending: Matrix) -> Vector:
        around = self._cube.snap(self._rng.random((_CANDIDATES, self._cube.size)))
        free = self._apart(around, pending, 0.0)
        return np.asarray(around[int(free.argmax())])

    def _apart(self, around: Matrix, pending: Matrix, least: float) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Which candidates are new: no row, and not pending."""
        rows = self.points.u[: self.points.n]
        if len(pending):
            rows = np.concatenate([rows, pending])
        gaps = np.abs(around[:, None, :] - rows).max(axis=2).min(axis=1)
        return np.asarray(gaps > max(least, 1e-12))

    def _safe(
        self, around: Matrix, bad: np.ndarray[tuple[int], np.dtype[np.bool_]] | None = None
    ) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Which candidates are nearer to a good row than to a bad one."""
        points = self.points
        if bad is None:
            bad = ~points.feasible()
            bad |= _cliff(points.y[: points.n, 0], bad)
        if not bad.any() or bad.all():
            return np.ones(len(around), dtype=bool)
        gaps = ((around[:, None, :] - points.u[: points.n]) ** 2).sum(axis=2)
        return np.asarray(gaps[:, ~bad].min(axis=1) <= gaps[:, bad].min(axis=1))

    # -- tell ---------------------------------------------------------------------------------------------------------

    def tell(self, seen: Seen) -> None:
        """One measurement, asked for or not."""
        points = self.points
        before, at = self._best, points.find(seen.u)
        if at is not None and at == before and not seen.failed and self._world_changed(at, seen):
            points.y[at, 0] = seen.cost
            points.y[at, 1:] = seen.margins
            self.forget(at)
            return
        was = float(points.y[before, 0]) if before is not None else np.inf
        row = points.add(seen, before)
        self._best = points.best()
        step = self._take_step(seen.u)
        if step is not None and before is not None:
            self._judge(step, seen, was, moved=self._best != before and self._best == row)
        elif self._best == row and before is not None and row != before and self.settled:
            self.settled, self.radius = False, 0.1
        if self._hop_left:
            self._hop_left -= 1
            if not self._hop_left:
                self._end_hop()

    def _world_changed(self, row: int, seen: Seen) -> bool:
        """Whether the incumbent, measured again, is not what it was: the world has changed."""
        points = self.points
        off = abs(seen.cost - float(points.y[row, 0]))
        usual = points.y[: points.n, 0][~points.failed[: points.n]]
        spread = float(np.percentile(usual, 75) - np.percentile(usual, 25)) if len(usual) > 3 else np.inf
        if points.pairs >= 3:
            return off > 6.0 * np.sqrt(points.noise * (1.0 + 1.0 / points.count[row])) + 0.02 * spread
        return off > 0.5 * spread

    def _judge(self, step: _Step, seen: Seen, was: float, *, moved: bool) -> None:
        if moved:
            self._surprises = 0
            if self.settled:
                self.settled, self.radius = False, min(max(2.0 * step.length, 0.01), MOST_RADIUS)
                self._looks = _LOOK[0]
            elif was - seen.cost > 0.6 * step.gain and step.length > 0.6 * self.radius:
                self.radius = min(2.0 * self.radius, MOST_RADIUS)
            return
        if self.settled or step.gain <= 0:
            return
        self.radius *= 0.5
        if seen.failed or seen.cost - was > 10.0 * step.gain:
            self._surprises += 1
            if self._surprises >= 2 and self._best is not None and self._stale(self._best, 8):
                self._check, self._surprises = True, 0
        if self.radius < LEAST_RADIUS:
            self.settled = True
            self._end_hop()

    def _stale(self, row: int, ticks: int) -> bool:
        return bool(self.points.tick - self.points.age[row] >= ticks)

    def _take_step(self, u: Vector) -> _Step | None:
        for i, step in enumerate(self._steps):
            if (step.u == u).all():
                return self._steps.pop(i)
        if len(self._steps) > 64:
            del self._steps[:32]
        return None

    def forget(self, row: int | None = None) -> None:
        """The world has changed: start again from the incumbent."""
        points = self.points
        row = self._best if row is None else row
        self._steps.clear()
        self._design.clear()
        self._hop_left, self._hop_from = 0, None
        self.settled, self.radius, self._looks = False, FIRST_RADIUS, _LOOK[0]
        self._replicated, self._check, self._surprises, self._hops_failed, self._quiet = False, False, 0, 0, 0
        if row is None:
            return
        points.keep_only(row)
        self._best = 0
        known = points.u[0]
        spread = low_discrepancy(0, self._cube.size + 1, self._cube.size, self._rng.random(self._cube.size)) - 0.5
        self._design.extend(self._cube.snap(known + 2.0 * FIRST_RADIUS * spread))

    def recheck(self) -> None:
        """The incumbent may no longer be what it was: measure it before anything else."""
        self._check = True

    @property
    def incumbent(self) -> int | None:
        """The row of the best point."""
        return self._best

    # -- hops ---------------------------------------------------------------------------------------------------------

    def _worth_hopping(self) -> bool:
        points = self.points
        good = points.feasible()
        good &= ~_cliff(points.y[: points.n, 0], ~good)
        if good.sum() < self._p + 4 or points.noise > 0:
            return False
        u, y = points.u[: points.n][good] - 0.5, points.y[: points.n, 0][good]
        terms = np.column_stack([np.ones(len(u)), u, u[:, self._i] * u[:, self._j]])
        fit = terms @ np.linalg.lstsq(terms, y, rcond=None)[0]
        self._quiet = 8
        return bool(((y - fit) ** 2).sum() > (1 - _EXPLAINED) * ((y - y.mean()) ** 2).sum())

    def _begin_hop(self, known: Vector) -> None:
        points = self.points
        assert self._best is not None
        self._hop_from = (known.copy(), float(points.y[self._best, 0]))
        self._hop_left = 6 * self._cube.size
        d = self._cube.size
        aim = self._cube.snap(known + 0.2 * self._rng.standard_normal((_CANDIDATES, d)))
        safe = self._safe(aim) & self._apart(aim, np.empty((0, d)), 0.05)
        center = aim[int(safe.argmax())]
        spread = low_discrepancy(0, d, d, self._rng.random(d)) - 0.5
        self._design.extend([center, *self._cube.snap(center + 0.1 * spread)])
        self._best_in_hop = center

    def _end_hop(self) -> None:
        if self._hop_from is None:
            return
        best = self._best
        better = best is not None and float(self.points.y[best, 0]) < self._hop_from[1]
        self._hops_failed = 0 if better else self._hops_failed + 1
        self._quiet = 0 if better else 4 * 2**min(self._hops_failed, 8)
        self._hop_from, self._hop_left = None, 0


class _Model:
    """The quadratic around the incumbent."""

    def __init__(self, owner: Local, best: int) -> None:
        points, cube = owner.points, owner._cube
        n, p, d = points.n, owner._p, cube.size
        self._i, self._j = owner._i, owner._j
        away = cube.differences(points.u[:n], points.u[best])
        square = np.einsum("ij,ij->i", away, away)
        failed = points.failed[:n]
        near = min(n - 1, p + d if points.noise == 0 else 3 * p)
        reach = max(owner.radius**2, float(np.partition(square, near)[near]))
        weights = np.exp(-square / reach)
        weights[failed] = 0.0
        y = points.y[:n]
        cliff = _cliff(y[:, 0], failed | (weights < 0.05))
        self.bad = failed | cliff
        weights[cliff] = 0.0
        self._h = float(np.sqrt(reach))
        terms = self._terms(away / self._h)
        weighted = terms.T * weights
        system = weighted @ terms
        right = weighted @ (y - y[best])
        enough = float((weights > 0.2).sum())
        scale = float(weights.sum()) / p
        diagonal = np.full(p, (1e-9 if enough >= p else 1e-3) * scale)
        diagonal[: d + 1] = 1e-11 * scale
        if points.noise > 0:
            diagonal[d + 1 :] = 1e-2 * scale
        system.flat[:: p + 1] += diagonal
        self._b = np.linalg.solve(system, right)
        residual = terms @ self._b - (y - y[best])
        freedom = max(float(weights.sum()) - 0.5 * p, 1.0)
        self.deviation = np.sqrt((weights[:, None] * residual**2).sum(axis=0) / freedom)
        self.at_center = float(self._b[0, 0])
        used = weights > 0.05
        spread = float(np.ptp(y[used, 0])) if used.any() else 0.0
        self.exact = bool(used.sum() >= p + 2 and self.deviation[0] <= _EXACT * spread)
        costs = y[:, 0][weights > 0.1]
        self.tolerance = max(1e-10 * float(costs.max() - costs.min()), 1e-14) if len(costs) else 1e-14
        self._d = d

    def _terms(self, s: Matrix) -> Matrix:
        d = s.shape[1]
        terms = np.empty((len(s), 1 + d + len(self._i)))
        terms[:, 0] = 1.0
        terms[:, 1 : d + 1] = s
        np.multiply(s[:, self._i], s[:, self._j], out=terms[:, d + 1 :])
        return terms

    def expect(self, away: Matrix) -> Matrix:
        """Cost and margins at some distance from the incumbent; costs relative to it."""
        expected = self._terms(away / self._h) @ self._b
        return np.asarray(expected)

    def candidates(self, radius: float, rng: np.random.Generator) -> Matrix:
        """Steps on the path to the model's minimum (one for each multiplier), and random ones."""
        d, b = self._d, self._b[:, 0]
        gradient = b[1 : d + 1]
        hessian = np.zeros((d, d))
        hessian[self._i, self._j] = b[d + 1 :]
        hessian = hessian + hessian.T
        values, basis = np.linalg.eigh(hessian)
        size = float(np.sqrt(gradient @ gradient)) / max(radius / self._h, 1e-9) + 1e-30
        multipliers = max(0.0, -2.0 * float(values[0])) + size * _PATH
        along = -(basis.T @ gradient) / np.maximum(values + multipliers[:, None], 1e-30)
        path = along @ basis.T * self._h
        steps = np.concatenate([path, radius * rng.uniform(-1.0, 1.0, (_CANDIDATES, d))])
        longest = np.abs(steps).max(axis=1, keepdims=True)
        return np.asarray(steps * np.minimum(1.0, radius / np.maximum(longest, 1e-30)))


def broken_now(points: Points, row: int) -> float:
    """The sum of a row's broken margins."""
    return float(np.maximum(points.y[row, 1:], 0.0).sum())


def _cliff(
    cost: Vector, ignored: np.ndarray[tuple[int], np.dtype[np.bool_]]
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Rows above a gap in their costs that is far wider than all that lies below it."""
    above = np.zeros(len(cost), dtype=bool)
    usual = np.sort(cost[~ignored])
    if len(usual) < 6 or usual[-1] - usual[0] <= 6.0 * (usual[len(usual) // 3] - usual[0]):
        return above
    gaps = np.diff(usual)
    k = int(gaps.argmax())
    if k + 1 < max(3, len(usual) // 4) or gaps[k] <= 6.0 * (usual[k] - usual[0]):
        return above
    np.greater(cost, usual[k], out=above)
    return above & ~ignored


def _among(u: Vector, pending: Matrix) -> bool:
    return bool(len(pending)) and bool((pending == u).all(axis=1).any())
