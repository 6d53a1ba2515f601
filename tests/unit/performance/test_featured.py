"""The latency law with features: what relatives tell, how sure it is, and that leaving out is really leaving out."""

from __future__ import annotations

import numpy as np
import pytest

from flyball.core.errors import InvalidInput
from flyball.performance.featured import FeatureLaw, Part, Table, interval_factor
from flyball.performance.silicon import Measured, fit_queue_law, learn_tpot, queue_law, table

PARTS = (
    Part(weight=1.0),
    Part(weight=0.5, kind="linear"),
    Part(weight=0.3, kind="smooth", reach=(2.0,)),
    Part(weight=0.3, same=("engine",)),
)


def measured(rng: np.random.Generator, count: int = 60) -> tuple[Table, np.ndarray]:
    """Latencies that grow with the square root of concurrency, one engine a fifth slower than the other."""
    x = rng.uniform(0, 8, (count, 1))
    engine = rng.choice(["a", "b"], count)
    y = np.exp(0.35 * x[:, 0] + 0.2 * (engine == "b") + 0.02 * rng.standard_normal(count)) * 1e-2
    return Table(x, {"engine": engine}), y


def test_leaving_out_is_learning_without(rng: np.random.Generator) -> None:
    """The closed form of what the others say of a block equals a law learnt from the others."""
    given, y = measured(rng)
    blocks = np.arange(len(y)) // 4
    law = FeatureLaw.learn(given, y, PARTS, noise=0.02)
    out = law.left_out(blocks)
    rows = blocks != 3
    others = FeatureLaw(  # with the centre and level of all, which leaving out keeps
        law.parts, law.noise, law.center, law.level,
        Table(law.table.numbers[rows], {"engine": law.table.labels["engine"][rows]}),
        *_inverse(law, rows, np.log(y)),
    )  # fmt: skip
    there = others.predict(Table(given.numbers[~rows], {"engine": given.labels["engine"][~rows]}))
    assert out.mean[~rows] == pytest.approx(there.mean, abs=1e-8)
    assert out.deviation[~rows] == pytest.approx(there.deviation, rel=1e-6)


def _inverse(law: FeatureLaw, rows: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    precision = np.linalg.inv(np.linalg.inv(law.precision)[np.ix_(rows, rows)])
    return precision, precision @ (y[rows] - law.level)


def test_an_unseen_place_is_predicted_and_doubted(rng: np.random.Generator) -> None:
    """Between the data the error is the noise's, far from them the deviation says so; an engine's offset is told."""
    given, y = measured(rng)
    law = FeatureLaw.learn(given, y, PARTS, noise=0.02)
    seen = law.predict(Table(np.array([[4.0], [4.0], [30.0]]), {"engine": np.array(["a", "b", "a"])}))
    assert seen.mean[:2] == pytest.approx(np.log(1e-2) + 1.4 + np.array([0.0, 0.2]), abs=0.05)
    assert seen.deviation[2] > 5 * seen.deviation[0]


def test_intervals_hold_the_share_they_state(rng: np.random.Generator) -> None:
    """Errors with heavy tails: the factor makes 80 % of them fall inside, whatever the process thinks of its noise."""
    given, y = measured(rng, 300)
    y = y * np.exp(0.05 * rng.standard_t(2, 300))
    blocks = np.arange(300)
    out = FeatureLaw.learn(given, y, PARTS, noise=0.02).left_out(blocks)
    inside = np.abs(out.mean - np.log(y)) <= interval_factor(out, np.log(y), blocks) * out.deviation
    assert inside.mean() == pytest.approx(0.8, abs=0.03)


def rows_of(concurrency: list[float]) -> list[Measured]:
    """Loads of one deployment."""
    return [
        Measured(model="m", system="h100", engine="vllm", concurrency=b, input_tokens=n, output_tokens=256, tensor=2)
        for b in concurrency
        for n in (128.0, 1024.0)
    ]


def test_the_queue_law_is_found_again_and_needs_no_start() -> None:
    """Rows that obey alpha, beta, gamma exactly give them back, one odd row among them or not."""
    rows, truth = rows_of([1, 4, 16, 64, 128]), np.array([6e-3, 3e-5, 2e-8])
    ttft, tpot = queue_law(rows, truth)
    assert fit_queue_law(rows, ttft, tpot) == pytest.approx(truth, rel=1e-6)
    ttft[3] *= 3
    assert fit_queue_law(rows, ttft, tpot)[:2] == pytest.approx(truth[:2], rel=0.1)


def test_relatives_tell_of_a_load_that_was_not_measured() -> None:
    """TPOT of a concurrency between those measured comes within 5 %, with a deviation that is no larger."""
    rows = rows_of([1, 2, 4, 8, 32, 64, 128])
    tpot = queue_law(rows, np.array([6e-3, 3e-5, 2e-8]))[1]
    law = learn_tpot(rows, tpot)
    unseen = rows_of([16])
    seen = law.predict(table(unseen))
    expected = queue_law(unseen, np.array([6e-3, 3e-5, 2e-8]))[1]
    assert np.exp(seen.mean) == pytest.approx(expected, rel=0.05)
    assert (seen.deviation < 0.15).all()


def test_impossible_configurations_are_refused() -> None:
    """No logarithm of nothing is taken."""
    with pytest.raises(InvalidInput, match="concurrency is 0; give a number above 0"):
        rows_of([0])
    with pytest.raises(InvalidInput, match="latencies above 0 s"):
        FeatureLaw.learn(Table(np.zeros((1, 1)), {}), np.zeros(1), PARTS[:1], 0.1)
