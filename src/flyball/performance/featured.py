"""A latency law with features: what measured configurations tell of one that was not measured.

Log latency is a Gaussian process over what describes a configuration: numbers (logs of concurrency, lengths,
parallelism) and labels (model, accelerator, engine, precision). Its covariance is a sum of parts, each smooth, linear
or constant in the numbers and confined to configurations that share some labels: what holds for all, what a model adds,
what an engine adds to a model on an accelerator, and so on. A configuration with relatives borrows from all of them,
one without from what holds for all, and the variance says which (Rasmussen and Williams, Gaussian Processes for Machine
Learning, 2006: additive kernels 4.2.4, leave-one-out 5.4.2).

symbol   shape    meaning
R, d              configurations measured, numbers of each
x        [R, d]   numbers; y [R] log latency
K        [R, R]   covariance of y, noise included
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flyball.core.errors import InvalidInput
from flyball.numerics.markov import Floats, Ints

Labels = NDArray[np.str_]


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Configurations: their numbers and their labels."""

    numbers: Floats  # [R, d], finite
    labels: Mapping[str, Labels]  # name -> [R]

    def __post_init__(self) -> None:
        if self.numbers.ndim != 2 or not np.isfinite(self.numbers).all():
            raise InvalidInput("a configuration's numbers must be finite and as many for each; correct the table")
        if any(len(values) != len(self.numbers) for values in self.labels.values()):
            raise InvalidInput("a label is not given for every configuration; complete the table")

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One term of the covariance."""

    weight: float  # standard deviation it explains, of log latency
    same: tuple[str, ...] = ()  # labels that two configurations must share
    kind: Literal["constant", "linear", "smooth"] = "constant"
    reach: tuple[float, ...] = ()  # [d] of a smooth part: distance at which numbers are hardly related

    def between(self, one: Table, other: Table) -> Floats:
        """Covariance [R, R'] of two tables' configurations by this part."""
        shape = (len(one), len(other))
        covariance = np.full(shape, self.weight**2)
        if self.kind == "linear":
            covariance *= one.numbers @ other.numbers.T
        elif self.kind == "smooth":
            a, b = one.numbers / self.reach, other.numbers / self.reach
            squares = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1) - 2 * a @ b.T
            covariance *= np.exp(-np.maximum(squares, 0.0) / 2)
        for name in self.same:
            covariance *= one.labels[name][:, None] == other.labels[name]
        return covariance


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """Log latency, and the standard deviation of what would be measured."""

    mean: Floats  # [R]
    deviation: Floats


@dataclass(frozen=True, slots=True, eq=False)
class FeatureLaw:
    """A law learnt; `learn` makes one."""

    parts: tuple[Part, ...]
    noise: float
    center: Floats  # [d] of the numbers
    level: float  # mean of y
    table: Table  # its numbers centred
    precision: Floats  # K⁻¹
    weights: Floats  # K⁻¹ (y - level)

    @classmethod
    def learn(cls, table: Table, latencies_s: Floats, parts: Sequence[Part], noise: float) -> FeatureLaw:
        """From measured latencies; `noise` is the relative error of one measurement.

        >>> table = Table(np.log2([[1.0], [2.0], [4.0], [16.0]]), {})
        >>> law = FeatureLaw.learn(table, np.array([0.1, 0.2, 0.4, 1.6]), [Part(weight=1.0, kind="linear")], 0.01)
        >>> seen = law.predict(Table(np.log2([[8.0]]), {}))
        >>> print(f"{np.exp(seen.mean[0]):.2f}")
        0.80
        """
        if not (len(table) == len(latencies_s) > 0 and (np.asarray(latencies_s) > 0).all()):
            raise InvalidInput("a law is learnt from latencies above 0 s, one for each configuration; correct them")
        center = table.numbers.mean(axis=0)
        own = Table(table.numbers - center, table.labels)
        y = np.log(latencies_s)
        level = float(y.mean())
        covariance = _covariance(parts, own, own) + np.eye(len(y)) * noise**2
        precision: Floats = np.asarray(np.linalg.inv(covariance), dtype=np.float64)
        return cls(tuple(parts), noise, center, level, own, precision, precision @ (y - level))

    def predict(self, table: Table) -> Prediction:
        """Of configurations, measured or not."""
        there = Table(table.numbers - self.center, table.labels)
        cross = _covariance(self.parts, there, self.table)
        own = np.concatenate([_covariance(self.parts, row, row).ravel() for row in _rows(there)])
        variance = own + self.noise**2 - np.einsum("ij,jk,ik->i", cross, self.precision, cross)
        return Prediction(self.level + cross @ self.weights, np.sqrt(np.maximum(variance, self.noise**2)))

    def left_out(self, blocks: Ints) -> Prediction:
        """For every configuration what the others, without any of its own block [R], would have said of it."""
        y = np.linalg.solve(self.precision, self.weights)
        mean, deviation = np.empty(len(y)), np.empty(len(y))
        for block in np.unique(blocks):
            rows = np.flatnonzero(blocks == block)
            covariance = np.linalg.inv(self.precision[np.ix_(rows, rows)])
            mean[rows] = self.level + y[rows] - covariance @ self.weights[rows]
            deviation[rows] = np.sqrt(np.diag(covariance))
        return Prediction(mean, deviation)


def _covariance(parts: Sequence[Part], one: Table, other: Table) -> Floats:
    total = np.zeros((len(one), len(other)))
    for part in parts:
        total += part.between(one, other)
    return total


def _rows(table: Table) -> list[Table]:
    return [
        Table(table.numbers[i : i + 1], {name: values[i : i + 1] for name, values in table.labels.items()})
        for i in range(len(table))
    ]


def interval_factor(seen: Prediction, measured: Floats, blocks: Ints, share: float = 0.8) -> Floats:
    """[R] How many standard deviations an interval needs to hold that share of measurements.

    Found on the errors made on every other block left out in turn (conformal prediction: Vovk, Gammerman and Shafer,
    2005), so that an interval is honest even where the process is not quite normal.
    """
    odd = np.abs(seen.mean - measured) / seen.deviation
    factors = np.empty(len(odd))
    for block in np.unique(blocks):
        rows = blocks == block
        factors[rows] = np.quantile(odd[~rows], share) if (~rows).any() else np.nan
    return factors
