"""The proposer as a plain class: ask for a configuration, tell what it was worth, over a space or a finite table.

>>> table = [{"batch": b, "paged": p} for b in (1, 2, 4, 8, 16) for p in (False, True)]
>>> proposer = Proposer(table, seed=1)
>>> for _ in range(8):
...     values = proposer.ask()
...     proposer.tell(values, 10 - abs(values["batch"] - 8) + values["paged"])
>>> proposer.best()
({'batch': 8, 'paged': True}, (11.0,))
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from flyball.core.errors import Infeasible, InvalidInput
from flyball.core.knobs import Configuration, Knob, KnobKind, Space, Value
from flyball.tuner.bayes import Prediction, Tried, suggest
from flyball.tuner.constraints import Constraint
from flyball.tuner.feasibility import MODELS
from flyball.tuner.pool import Points, Pool
from flyball.tuner.space import Axis, Lattice, Point

DESIGNS = 64  # start designs of which the most even is taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How the next configuration is chosen."""

    seed: int = 0
    starts: int = 4  # evenly spread configurations between the first and those of the model
    feasibility: str = "gp"  # how hidden constraints are learnt: gp, forest (SCOOT's) or none
    prior: Prediction | None = None  # what is expected of the first objective before anything is measured, in its unit
    promised: tuple[Prediction, ...] = ()  # what is expected of each promise's margin; empty: nothing
    maximise: bool = True  # the first objective's direction, for which `prior` speaks


def next_point(pool: Pool, tried: Sequence[Tried], rules: Rules) -> Point | None:
    """The configuration after these, a pure function of them and the rules; None if every legal one was tried."""
    rng = np.random.default_rng([rules.seed, len(tried)])
    own = [t for t in tried if not t.earlier]
    taken = {pool.lattice.point(t.values) for t in own}
    nth = len(own) - 1
    if 0 <= nth < rules.starts and len(own) == len(tried):
        wish = spread(pool.lattice, rules.starts, np.random.default_rng(rules.seed))[nth]
        if nth == 0 and rules.prior is not None:
            return _expected_best(pool, taken, rules, rng)
        return _nearest(pool, wish, taken, rng)
    return suggest(pool, tried, rng, feasibility=rules.feasibility, prior=_as_gain(rules), promised=rules.promised)


def spread(lattice: Lattice, count: int, rng: np.random.Generator) -> list[Point]:
    """Points spread evenly: one in each of `count` equal parts of every axis, and far from each other.

    A Latin hypercube, of many the one whose nearest two points are farthest apart (Johnson, Moore and Ylvisaker, 1990).
    """
    strata = np.tile(np.arange(count), (DESIGNS, len(lattice.axes), 1))
    designs = (rng.permuted(strata, axis=2).transpose(0, 2, 1) + 0.5) / count  # [design, point, axis]
    gaps = np.linalg.norm(designs[:, :, None] - designs[:, None], axis=-1) + 2 * np.eye(count) * len(lattice.axes)
    return [lattice.at(u) for u in designs[gaps.min(axis=(1, 2)).argmax()]]


def _as_gain(rules: Rules) -> Prediction | None:
    prior = rules.prior
    if prior is None or rules.maximise:
        return prior
    return lambda values: -prior(values)


def _expected_best(pool: Pool, taken: set[Point | None], rules: Rules, rng: np.random.Generator) -> Point | None:
    gain = _as_gain(rules)
    assert gain is not None
    points = pool.candidates(taken, rng)
    expected = [gain(pool.lattice.values(tuple(point))) for point in points.tolist()]
    return _point(points, int(np.argmax(expected))) if expected else None


def _nearest(pool: Pool, wish: Point, taken: set[Point | None], rng: np.random.Generator) -> Point | None:
    """The free legal point nearest to a wish."""
    wished = np.array([wish])
    if wish not in taken and pool.allows(wished)[0]:
        return wish
    points = pool.free(np.vstack([pool.candidates(taken, rng), pool.around(wished)]), taken)
    away = np.linalg.norm(pool.encode(points) - pool.encode(wished), axis=1)
    return _point(points, int(np.argmin(away))) if len(points) else None


def _point(points: Points, row: int) -> Point:
    return tuple(int(level) for level in points[row])


class Proposer:
    """Proposes configurations of a space, or rows of a table, and learns from what they were worth.

    `space`      knobs, a lattice of them, or a finite table: a sequence of configurations with the same names
    `maximise`   for each objective whether more is better; one value for one objective
    `first`      the configuration to begin with; default: a space's own default, of a table the row nearest its middle
    `constraints` known relations, such as "max_num_seqs <= max_num_batched_tokens"; never broken by a proposal
    `prior`      predicts the first objective of a configuration, in its unit; how far it is trusted is learnt
    `feasibility` gp, forest (SCOOT's rule) or none: how configurations that fail are learnt

    Equal seeds and equal tells give equal proposals, in any process. No proposal repeats another; several asks before a
    tell give several configurations.
    """

    def __init__(
        self,
        space: Space | Lattice | Sequence[Configuration],
        *,
        maximise: bool | Sequence[bool] = True,
        seed: int = 0,
        starts: int = 4,
        feasibility: str = "gp",
        first: Configuration | None = None,
        constraints: Iterable[str] = (),
        prior: Prediction | None = None,
    ) -> None:
        self._directions = (maximise,) if isinstance(maximise, bool) else tuple(maximise)
        if not self._directions:
            raise InvalidInput("no objective is given; say for each objective whether to maximise it")
        if feasibility not in MODELS:
            raise InvalidInput(f"unknown model of hidden constraints {feasibility!r}; use one of {', '.join(MODELS)}")
        self._rules = Rules(seed=seed, starts=starts, feasibility=feasibility, prior=prior,
                            maximise=self._directions[0])  # fmt: skip
        self._rows: dict[Point, Configuration] = {}
        if isinstance(space, Space | Lattice):
            lattice = space if isinstance(space, Lattice) else Lattice.of(space, constraints=constraints)
            self._pool = Pool(lattice)
            self._first: Configuration | None = lattice.default if first is None else first
        else:
            lattice = tabulated(space, constraints)
            for row in space:
                point = lattice.point(row)
                assert point is not None
                if lattice.legal(point):
                    self._rows.setdefault(point, row)
            self._pool = Pool(lattice, list(self._rows))
            self._first = first
        self._tried: list[Tried] = []

    def ask(self) -> dict[str, Value]:
        """The next configuration to try. Raises Infeasible when every legal one was tried."""
        if not self._tried and self._first is not None:
            values = dict(self._first)
        else:
            point = self._next()
            if point is None:
                raise Infeasible(
                    f"each of the {len(self._tried)} legal configurations was tried; widen the space to go on"
                )
            values = dict(self._rows[point] if self._rows else self._pool.lattice.values(point))
        self._tried.append(Tried(values=values))
        return values

    def _next(self) -> Point | None:
        if self._tried:
            return next_point(self._pool, self._tried, self._rules)
        middle = tuple(len(axis.levels) // 2 for axis in self._pool.lattice.axes)
        return _nearest(self._pool, middle, set(), np.random.default_rng(self._rules.seed))

    def ask_many(self, count: int) -> list[dict[str, Value]]:
        """Several configurations to try at once; fewer than asked for when no more are left."""
        asked: list[dict[str, Value]] = []
        while len(asked) < count:
            try:
                asked.append(self.ask())
            except Infeasible:
                if not asked:
                    raise
                break
        return asked

    def tell(
        self,
        values: Configuration,
        value: float | Sequence[float] | None = None,
        *,
        margins: Sequence[float] = (),
        failed: bool = False,
    ) -> None:
        """What a configuration was worth, asked for or not, in any order; `failed` if it could not be measured.

        `margins` are how far each promise was kept (at most 0) or broken (above 0), the same promises in each tell.
        """
        gains: tuple[float, ...] | None = None
        if not failed:
            seen = () if value is None else tuple(value) if isinstance(value, Sequence) else (float(value),)
            if len(seen) != len(self._directions) or not all(map(math.isfinite, (*seen, *margins))):
                raise InvalidInput(
                    f"told {value!r} with margins {list(margins)}; give {len(self._directions)} finite value(s), or "
                    "failed=True"
                )
            gains = tuple(v if up else -v for v, up in zip(seen, self._directions, strict=True))
        told = Tried(values=dict(values), gains=gains, margins=tuple(margins), failed=failed)
        for i, tried in enumerate(self._tried):
            if tried.runs and tried.values == told.values:
                self._tried[i] = told
                return
        self._tried.append(told)

    @property
    def history(self) -> list[Tried]:
        """What was asked and told, in order."""
        return list(self._tried)

    def best(self) -> tuple[Configuration, tuple[float, ...]] | None:
        """The configuration with the best first objective among those that kept every promise, and its values."""
        kept = [t for t in self._tried if t.gains is not None and all(m <= 0 for m in t.margins)]
        if not kept:
            return None
        top = max(kept, key=lambda t: t.gains or ())
        assert top.gains is not None
        return top.values, tuple(g if up else -g for g, up in zip(top.gains, self._directions, strict=True))


def tabulated(rows: Sequence[Configuration], constraints: Iterable[str] = ()) -> Lattice:
    """The lattice whose axes hold the values that occur in a table."""
    if not rows:
        raise InvalidInput("the table holds no configuration; give at least one")
    names = list(rows[0])
    for number, row in enumerate(rows):
        if set(row) != set(names):
            raise InvalidInput(
                f"row {number} of the table sets {', '.join(row)}; every row must set {', '.join(names)}"
            )
    axes, fixed = [], {}
    for name in names:
        levels = list(dict.fromkeys(row[name] for row in rows))
        if len(levels) == 1:
            fixed[name] = levels[0]
        else:
            axes.append(_axis(name, levels))
    known = tuple(Constraint(text) for text in constraints)
    for constraint in known:
        constraint.check_names(names)
    return Lattice(axes=tuple(axes), fixed=fixed, constraints=known)


def _axis(name: str, levels: list[Value]) -> Axis:
    switch = all(isinstance(v, bool) for v in levels)
    if not switch and all(isinstance(v, int | float) and not isinstance(v, bool) for v in levels):
        ordered = sorted(levels, key=float)
        low, high = float(ordered[0]), float(ordered[-1])
        kind: KnobKind = "int" if all(isinstance(v, int) for v in levels) else "float"
        return Axis(knob=Knob(name=name, kind=kind, default=ordered[0], low=low, high=high), levels=tuple(ordered))
    if switch:
        return Axis(knob=Knob(name=name, kind="bool", default=False), levels=(False, True))
    words = tuple(str(v) for v in levels)
    return Axis(knob=Knob(name=name, kind="choice", default=words[0], choices=words), levels=tuple(levels))
