"""Engines as measured on real accelerators: TTFT and TPOT of a configuration from those of its relatives.

A configuration is a deployment (model, accelerator, engine, precision, parallelism) under a load (lengths, and how many
requests are kept going at once). Two laws tell of it:

- `FeatureLaw` with the parts below, learnt from all measured configurations;
- the queue law alone, alpha + beta * tokens + gamma * cached tokens (`queue_v3`) at a constant number of requests.

The parts' weights and reaches were set by hand for TPOT. Those for TTFT come from a random search, scored on left-out
deployments of subsets of the same rows that the benchmark reports on: its score of TTFT is kind to that extent.

symbol   shape     meaning
b        [R]       requests kept going at once; n, m their tokens in and out
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from scipy.optimize import nnls

from flyball.core.errors import InvalidInput
from flyball.numerics.markov import Floats
from flyball.performance.featured import FeatureLaw, Part, Table
from flyball.performance.queue_v3 import Life
from flyball.performance.queueing import DEFAULT_STEP_TOKENS

_NUMBERS = ("concurrency", "input_tokens", "output_tokens", "tensor", "data", "expert", "expert_tensor")
_GROUP = ("system", "engine", "model")
_ROUNDS, _ODD = 5, 0.2  # of weighing; relative error from which a row counts less than its square
_NEAR, _FAR = 0.3**0.5, 0.7**0.5  # of what a precision adds, and of what its engine's version adds to that


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One configuration; parallelisms of 1 mean none."""

    model: str
    system: str  # accelerator
    engine: str
    version: str = ""
    precision: str = ""
    quantization: str = ""  # of weights
    concurrency: float
    input_tokens: float
    output_tokens: float
    tensor: float = 1.0
    data: float = 1.0
    expert: float = 1.0
    expert_tensor: float = 1.0

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            if not (np.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InvalidInput(f"a configuration's {name} is {getattr(self, name)}; give a number above 0")

    @property
    def deployment(self) -> str:
        """Everything but the load."""
        loads = {"concurrency", "input_tokens", "output_tokens"}
        return " ".join(str(getattr(self, f.name)) for f in fields(self) if f.name not in loads)


def table(rows: Sequence[Measured]) -> Table:
    """Configurations as the law takes them."""
    labels = {
        name: np.array([str(getattr(r, name)) for r in rows])
        for name in (*_GROUP, "version", "precision", "quantization", "deployment")
    }
    return Table(np.log2([[float(getattr(r, name)) for name in _NUMBERS] for r in rows]), labels)


def _parts(
    *, slope: float, reach: tuple[float, float, float, float], general: float, model: float, model_slope: float,
    system: float, engine: float, group: float, precision: float, deployment: float,
) -> tuple[Part, ...]:  # fmt: skip
    across = (*reach[:3], *(reach[3],) * 4)
    fine = (*_GROUP, "quantization")
    return (
        Part(weight=2.0),
        Part(weight=slope, kind="linear"),
        Part(weight=general, kind="smooth", reach=across),
        Part(weight=model, same=("model",)),
        Part(weight=model_slope, same=("model",), kind="linear"),
        Part(weight=system, same=("system",), kind="smooth", reach=across),
        Part(weight=engine, same=("engine",), kind="smooth", reach=across),
        Part(weight=group, same=_GROUP, kind="smooth", reach=across),
        Part(weight=precision * _NEAR, same=fine, kind="smooth", reach=across),
        Part(weight=precision * _FAR, same=(*fine, "version"), kind="smooth", reach=across),
        Part(weight=deployment, same=("deployment",)),
    )


_TPOT = _parts(
    slope=0.5, reach=(3.0, 3.0, 3.0, 1.5), general=0.5, model=0.5, model_slope=0.1, system=0.3, engine=0.3, group=0.4,
    precision=0.3, deployment=0.1,
)  # fmt: skip
_TTFT = _parts(
    slope=0.19, reach=(2.2, 1.0, 3.0, 3.1), general=0.6, model=0.41, model_slope=0.08, system=0.32, engine=0.53,
    group=0.38, precision=0.43, deployment=0.21,
)  # fmt: skip


def learn_tpot(rows: Sequence[Measured], tpot_s: Floats) -> FeatureLaw:
    """The law of time per output token."""
    return FeatureLaw.learn(table(rows), tpot_s, _TPOT, noise=0.05)


def learn_ttft(rows: Sequence[Measured], ttft_s: Floats) -> FeatureLaw:
    """The law of time to first token."""
    return FeatureLaw.learn(table(rows), ttft_s, _TTFT, noise=0.13)


def queue_law(rows: Sequence[Measured], parameters: Floats) -> Floats:
    """[2, R] TTFT and TPOT by the queue law alone, with alpha, beta, gamma (seconds) of one card.

    Work is divided among the cards of a replica. The first token waits for half a step on average.
    """
    b, n, m, cards = np.array([(r.concurrency, r.input_tokens, r.output_tokens, r.tensor) for r in rows]).T[:, :, None]
    alpha, beta, gamma = (np.full_like(b, value) for value in parameters)
    d, limit = np.maximum(m - 1, 1.0), np.full_like(b, DEFAULT_STEP_TOKENS)
    life = Life(alpha, beta / cards, gamma / cards, n, d, limit, n, np.zeros_like(b))
    c = life.chunks(b)
    background = life.background(c, b)
    first = (c + 0.5) * background + life.prefill_work(c)
    return np.concatenate((first, background + life.token_work), axis=1).T


def fit_queue_law(rows: Sequence[Measured], ttft_s: Floats, tpot_s: Floats) -> Floats:
    """Alpha, beta, gamma that fit best, in relative errors, odd rows counting less.

    At a constant number of requests both latencies are linear in the three.
    """
    design = np.stack([queue_law(rows, unit) for unit in np.eye(3)], axis=-1).reshape(-1, 3)
    relative = design / np.concatenate((ttft_s, tpot_s))[:, None]
    weight = np.ones(len(relative))
    for _ in range(_ROUNDS):
        found, _ = nnls(relative * weight[:, None], weight)
        weight = (1 + np.square((relative @ found - 1) / _ODD)) ** -0.25
    return np.asarray(found, dtype=np.float64)
