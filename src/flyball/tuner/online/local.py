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
from flyball.tuner.online.points import Points, Seen, Suggestion, among

FIRST_RADIUS = 0.35
LEAST_RADIUS = 5e-4
MOST_RADIUS = 0.6
_AROUND = 0.08  # edges of the cube that the first points lie from where the search starts, if it starts somewhere
_LIVE_RADIUS = 0.1  # and the first radius then: what serves is left in small steps, which grow where they do good
_CANDIDATES = 24  # random ones, beside those on the path to the model's minimum
_PATH = np.concatenate([[0.0], 10.0 ** np.linspace(-4, 2.5, 14)])
_CLOSER = 0.4  # of the way from the last good to the first bad point, where a wall is put
_MARGIN = 1.0  # standard deviations of the model's residual that a predicted margin must keep
_DOUBT_RADIUS = 0.1  # from where a search that has settled is tried once more
_SURE_RADIUS = 1e-2  # below, a step that failed shrinks the radius whatever the model stands on
_HOP_REACH = 0.2  # edges of the cube
_NOISY_RADIUS = 0.02  # the least radius where measurements are noisy
_EXACT = 1e-3  # of the spread of the costs: a residual that small means that the model is right
_LOOK = (6, 64)  # asks from one look around to the next once settled: at first, at most
_EXPLAINED = 0.9  # share of variance that one quadratic must explain for hops to be of no use


class Step(NamedTuple):
    """What the model expected of a point."""

    u: Vector
    gain: float
    length: float


class Hop(NamedTuple):
    """An excursion to another region."""

    tick: int  # of its beginning
    until: int
    center: Vector
    cost: float  # of the incumbent then


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
        if start is None:
            self._design = deque(cube.snap(low_discrepancy(0, 2 * d + 2, d, shift)))
        else:  # something serves there now: look around it, not everywhere
            around = start + _AROUND * (2.0 * low_discrepancy(0, d + 1, d, shift) - 1.0)
            around = cube.snap(np.where((around < 0) | (around > 1), 2.0 * start - around, around))
            self._design = deque([start, *(u for u in around if (u != start).any())])
        self._first_radius = FIRST_RADIUS if start is None else _LIVE_RADIUS
        self.radius = self._first_radius
        self.settled = False
        self._best: int | None = None
        self._steps: list[Step] = []
        self._looks = _LOOK[0]
        self._since_look = 0
        self._check = False
        self._surprises = 0
        self._suspected: int | None = None
        self._suspected_cliff = False
        self._replicated = False
        self._fill_next = False
        self._doubted = False
        self._hop_from: Hop | None = None
        self._hops = 0
        self._hops_failed = 0
        self._quiet = 0  # asks until the next hop may begin

    # -- ask ----------------------------------------------------------------------------------------------------------

    def ask(self, pending: Matrix) -> Suggestion:
        """The next point; it differs from every pending one."""
        while self._design:
            u = self._design.popleft()
            if not among(u, pending):  # coarse knobs have few points
                return Suggestion(u, "a spread of first points")
        best = self._best
        if best is None:
            return Suggestion(self._random(pending), "nothing was measured yet")
        known = self.points.u[best]
        if self._due_again(best) and not among(known, pending):
            self._check = False
            return Suggestion(known.copy(), "the incumbent again")
        if self.settled:
            return self._settled_ask(known, pending)
        if self.radius < self._least_radius:
            return self._settle(pending)
        return self._model_step(self._center(best), pending)

    @property
    def _least_radius(self) -> float:
        return _NOISY_RADIUS if self.points.noise > 0 else LEAST_RADIUS

    def _center(self, best: int) -> int:
        """The row that steps are made from: the incumbent, or the best of a hop's region."""
        if self._hop_from is None:
            return best
        points = self.points
        recent = (points.age[: points.n] > self._hop_from.tick) & points.feasible()
        recent &= np.abs(points.u[: points.n] - self._hop_from.center).max(axis=1) <= _HOP_REACH
        if not recent.any():
            return best
        return int(np.where(recent, points.y[: points.n, 0], np.inf).argmin())

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
            return Suggestion(self._design.popleft(), "another region, as one quadratic does not explain this one")
        if self._since_look < self._looks and not among(known, pending):
            return Suggestion(known.copy(), "the incumbent, settled")
        if self._since_look >= self._looks:
            self._since_look, self._looks = 0, min(int(self._looks * 1.5) + 1, _LOOK[1])
        reach = 0.02 * 4.0 ** self._rng.random()
        around = self._around(known, reach)
        allowed = self._apart(around, pending, 0.0) & self._safe(around, 0.5)
        if not allowed.any():
            return Suggestion(
                self._random(pending) if among(known, pending) else known.copy(), "the incumbent, settled"
            )
        chosen = around[int(allowed.argmax())]
        self._steps.append(Step(chosen, 0.0, reach))
        return Suggestion(chosen, "a look around the incumbent")

    def _model_step(self, center: int, pending: Matrix) -> Suggestion:
        points = self.points
        known = points.u[center]
        if self._fill_next:
            self._fill_next = False
            if self._thin(center) and (filling := self._fill(known, pending)) is not None:
                return filling
        model = _Model(self, center)
        least_gain = max(model.tolerance, 0.2 * float(np.sqrt(points.noise)))
        while True:
            around = self._cube.snap(known + model.candidates(self.radius, self._rng))
            away = self._cube.differences(around, known)
            allowed = self._apart(around, pending, 0.02 * self.radius) & model.safe(away)
            gains = model.gains(away, allowed)
            chosen = int(gains.argmax())
            promising = gains[chosen] > least_gain
            short = not promising or float((away[chosen] ** 2).sum()) < (0.1 * self.radius) ** 2
            if short and not model.exact and self._thin(center):
                filling = self._fill(known, pending)
                if filling is not None:
                    return filling
            if promising:
                step = Step(around[chosen], float(gains[chosen]), float(np.sqrt((away[chosen] ** 2).sum())))
                self._steps.append(step)
                return Suggestion(step.u, f"the model's minimum within {self.radius:.3g}")
            self.radius *= 0.5
            if self.radius < self._least_radius:
                return self._settle(pending)

    def _thin(self, best: int) -> bool:
        """Whether there are too few rows around to say what happens within the radius."""
        points = self.points
        away = np.abs(self._cube.differences(points.u[: points.n], points.u[best])).max(axis=1)
        near = int(((away > 0.05 * self.radius) & (away <= 2.0 * self.radius)).sum())
        return near < min(self._p - 1, 2 * self._cube.size + 1)

    def _fill(self, known: Vector, pending: Matrix) -> Suggestion | None:
        """The candidate farthest from all rows: the model lacks points to stand on."""
        around = self._around(known, self.radius)
        allowed = self._apart(around, pending, 0.1 * self.radius) & self._safe(around)
        if not allowed.any():
            return None
        rows = self.points.u[: self.points.n]
        gaps = ((around[:, None, :] - rows) ** 2).sum(axis=2).min(axis=1)
        chosen = around[int(np.where(allowed, gaps, -1.0).argmax())]
        self._steps.append(Step(chosen, 0.0, self.radius))
        return Suggestion(chosen, "a point that the model lacks")

    def _settle(self, pending: Matrix) -> Suggestion:
        """The search is at its end here: look once more from farther away, then stay."""
        self._end_hop()
        if not self._doubted and not self.points.noise > 0:
            self._doubted, self.radius = True, _DOUBT_RADIUS
            assert self._best is not None
            return self._model_step(self._best, pending)
        self.settled, self.radius, self._since_look = True, LEAST_RADIUS, 0
        assert self._best is not None
        return self._settled_ask(self.points.u[self._best], pending)

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

    def _safe(self, around: Matrix, nearer: float = 1.0) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Which candidates are nearer to a good row than to a bad one, by a factor."""
        points = self.points
        bad = ~points.feasible()
        bad |= _cliff(points.y[: points.n, 0], bad)
        if not bad.any() or bad.all():
            return np.ones(len(around), dtype=bool)
        gaps = ((around[:, None, :] - points.u[: points.n]) ** 2).sum(axis=2)
        return np.asarray(gaps[:, ~bad].min(axis=1) <= nearer**2 * gaps[:, bad].min(axis=1))

    # -- tell ---------------------------------------------------------------------------------------------------------

    def tell(self, seen: Seen) -> None:
        """One measurement, asked for or not."""
        points = self.points
        before, at = self._best, points.find(seen.u)
        if at is not None and at == before and not seen.failed and points.changed(at, seen):
            self._suspect(at, seen)
            return
        if at is not None and at == self._suspected:
            self._suspected = None
            if self._suspected_cliff:  # once far above what it is now: too close to a cliff
                points.failed[at] = True
                self._best = points.best()
                return
        center = None if before is None else self._center(before)
        was = float(points.y[center, 0]) if center is not None else np.inf
        row = points.add(seen, before)
        self._best = points.best()
        step = self._take_step(seen.u)
        if step is not None and center is not None and self._best is not None:
            now = self._center(self._best)
            self._judge(step, seen, was, moved=now != center and now == row)
        elif self._best == row and before is not None and row != before and self.settled:
            self.settled, self.radius = False, 0.1
        if self._hop_from is not None and points.tick > self._hop_from.until:
            self._end_hop()

    def _suspect(self, row: int, seen: Seen) -> None:
        """The incumbent is not what it was: measured twice, the world has changed; once may be chance."""
        points = self.points
        if self._suspected != row:
            self._suspected_cliff = seen.cost - float(points.y[row, 0]) > 6.0 * points.spread()
            self._suspected, self._check = row, True
            points.tick += 1
            points.age[row] = points.tick
            return
        points.y[row] = (seen.cost, *seen.margins)
        self.forget(row)

    def _judge(self, step: Step, seen: Seen, was: float, *, moved: bool) -> None:
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
        cliff = seen.failed or seen.cost - was > 10.0 * step.gain
        if cliff:
            self._surprises += 1
            if self._surprises >= 2 and self._best is not None and self._stale(self._best, 8):
                self._check, self._surprises = True, 0
        if self._best is not None and self._thin(self._center(self._best)) and self.radius > _SURE_RADIUS:
            self._fill_next = True
            self.radius *= 0.8
        else:
            self.radius *= 0.7 if cliff else 0.5

    def _stale(self, row: int, ticks: int) -> bool:
        return bool(self.points.tick - self.points.age[row] >= ticks)

    def _take_step(self, u: Vector) -> Step | None:
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
        self._suspected = None
        self._hop_from, self._hops, self._doubted, self._fill_next = None, 0, False, False
        self.settled, self.radius, self._looks = False, self._first_radius, _LOOK[0]
        self._replicated, self._check, self._surprises, self._hops_failed, self._quiet = False, False, 0, 0, 0
        if row is None:
            return
        points.keep_only(row)
        self._best = 0
        known = points.u[0]
        spread = low_discrepancy(0, self._cube.size + 1, self._cube.size, self._rng.random(self._cube.size)) - 0.5
        self._design.extend(self._cube.snap(known + 2.0 * self._first_radius * spread))

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
        if good.sum() < self._p + 4 or points.noise > 0 or (~good).sum() >= 2:
            return False  # too little is known, or leaving could break promises
        u, y = points.u[: points.n][good] - 0.5, points.y[: points.n, 0][good]
        terms = np.column_stack([np.ones(len(u)), u, u[:, self._i] * u[:, self._j]])
        basis, _ = np.linalg.qr(terms)
        residual = y - basis @ (basis.T @ y)
        left_out = residual / np.maximum(1.0 - (basis**2).sum(axis=1), 0.05)
        self._quiet = 8
        return bool((left_out**2).sum() > (1 - _EXPLAINED) * ((y - y.mean()) ** 2).sum())

    def _begin_hop(self, known: Vector) -> None:
        """Search another region for a while: first where the whole space's trend is least, then around the best."""
        points, d = self.points, self._cube.size
        assert self._best is not None
        aim = self._cube.snap(known + _HOP_REACH * self._rng.standard_normal((_CANDIDATES, d)))
        if not self._hops:
            u = self._cube.snap(self._rng.random((16 * _CANDIDATES, d)))
            aim = u[np.argsort(self._trend(u))[:_CANDIDATES]]
        safe = self._safe(aim) & self._apart(aim, np.empty((0, d)), 0.05)
        center = aim[int(safe.argmax())]
        self._hop_from = Hop(points.tick, points.tick + 8 * d, center, float(points.y[self._best, 0]))
        self._hops += 1
        spread = low_discrepancy(0, d + 1, d, self._rng.random(d)) - 0.5
        self._design.extend([center, *self._cube.snap(center + _HOP_REACH * spread)])
        self.settled, self.radius = False, 0.5 * _HOP_REACH

    def _trend(self, u: Matrix) -> Vector:
        """Cost by a separable parabola through all rows: no wiggles, only where it is lower on the whole."""
        points = self.points
        good = points.feasible()
        rows, cost = points.u[: points.n][good] - 0.5, points.y[: points.n, 0][good]
        system = np.column_stack([np.ones(len(rows)), rows, rows**2])
        weights = np.linalg.solve(system.T @ system + 1e-2 * np.eye(system.shape[1]), system.T @ cost)
        return np.asarray(np.column_stack([np.ones(len(u)), u - 0.5, (u - 0.5) ** 2]) @ weights)

    def _end_hop(self) -> None:
        if self._hop_from is None:
            return
        best = self._best
        better = best is not None and float(self.points.y[best, 0]) < self._hop_from.cost
        self._hops_failed = 0 if better else self._hops_failed + 1
        self._quiet = 0 if better else 2 ** min(self._hops_failed, 8)
        self._hop_from, self._doubted = None, not better
        self.radius = 0.1 if better else LEAST_RADIUS
        self.settled = not better


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
        self._s = away / self._h
        self._margins = points.margins()[best].copy() if points.constraints else np.empty(0)
        terms = self._terms(self._s)
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
        self._broken = broken_now(points, best)
        self._walls = self._wall(self._s, square <= 9.0 * reach)

    def _wall(self, s: Matrix, near: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> tuple[Vector, float] | None:
        """What keeps good points from bad ones: a normal and an offset, a_0 + a s <= 0, where a plane can."""
        if not self.bad.any():
            return None
        rows = np.column_stack([np.ones(len(s)), s])[near]
        label = np.where(self.bad[near], 1.0, -1.0)
        if not self.bad[near].any():
            return None
        weight = np.exp(-0.5 * (rows[:, 1:] ** 2).sum(axis=1)) + 1e-3
        weight[label > 0] *= max((label < 0).sum() / (label > 0).sum(), 1.0)
        system = (rows.T * weight) @ rows
        system.flat[:: self._d + 2] += 1e-6 * weight.sum()
        a = np.linalg.solve(system, rows.T @ (weight * label))
        score = rows @ a
        good, bad = float(score[label < 0].max()), float(score[label > 0].min())
        if bad <= good or not (a[1:] ** 2).sum() > 0:
            return None
        return a[1:], float(a[0]) - (good + _CLOSER * (bad - good))

    def safe(self, away: Matrix) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Which steps stay on the good side of the wall; where no plane is one, on the side of the nearest good row."""
        if not self.bad.any():
            return np.ones(len(away), dtype=bool)
        s = away / self._h
        if self._walls is not None:
            normal, offset = self._walls
            return np.asarray(s @ normal + offset <= 1e-9)
        gaps = ((s[:, None, :] - self._s) ** 2).sum(axis=2)
        return np.asarray(gaps[:, ~self.bad].min(axis=1) <= gaps[:, self.bad].min(axis=1))

    def gains(self, away: Matrix, allowed: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Vector:
        """What each step should gain; minus infinity for one that is not allowed or would break a promise."""
        expected = self._terms(away / self._h) @ self._b
        gains = np.where(allowed, self.at_center - expected[:, 0], -np.inf)
        if expected.shape[1] == 1:
            return gains
        broken = np.maximum(expected[:, 1:] + _MARGIN * self.deviation[1:] + self._margins, 0.0).sum(axis=1)
        if self._broken > 0:  # first of all, keep the promises
            return np.where(allowed, self._broken - broken, -np.inf)
        return np.where(broken > 0, -np.inf, gains)

    def _terms(self, s: Matrix) -> Matrix:
        d = s.shape[1]
        terms = np.empty((len(s), 1 + d + len(self._i)))
        terms[:, 0] = 1.0
        terms[:, 1 : d + 1] = s
        np.multiply(s[:, self._i], s[:, self._j], out=terms[:, d + 1 :])
        return terms

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
        walls = [] if self._walls is None else [self._walls]
        walls += [(self._b[1 : d + 1, j], float(m) + _MARGIN * float(self.deviation[j]))
                  for j, m in enumerate(self._margins, start=1)]  # fmt: skip
        for normal, offset in walls:  # along a wall that is in the way, not away from it
            over = (steps / self._h) @ normal + offset
            along_it = steps - np.outer(np.maximum(over, 0.0) / max(float(normal @ normal), 1e-30), normal) * self._h
            steps = np.concatenate([steps, along_it[over > 0]])
        longest = np.abs(steps).max(axis=1, keepdims=True)
        return np.asarray(steps * np.minimum(1.0, radius / np.maximum(longest, 1e-30)))


def broken_now(points: Points, row: int) -> float:
    """The sum of a row's broken margins."""
    return float(np.maximum(points.margins()[row], 0.0).sum()) if points.constraints else 0.0


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
