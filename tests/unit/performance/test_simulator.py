"""The simulator's cores: equal to each other step by step, to queueing theory in its limits, with their books kept."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball.core.errors import InvalidInput
from flyball.performance.request_streams import Rates, merged, plain, poisson_process
from flyball.performance.simulator import (
    COUNTERS,
    DONE,
    LOST,
    RECORD,
    REFUSED,
    ROUTERS,
    SERVER_COUNTERS,
    Core,
    Law,
    Records,
    Requests,
    Router,
    new_core,
)

STEP = Law(alpha_s=0.009, beta_s=3e-5, gamma_s=6e-8)
CORES = [False, pytest.param(True, marks=pytest.mark.skipif(not shutil.which("g++"), reason="no compiler"))]


def sharing(count: int, rate_rps: float, seed: int, *, part: int = 64) -> Requests:
    """Requests of widely differing lengths; a random share of each prompt is one of 20 common beginnings."""
    rng = np.random.default_rng(seed)
    inputs = np.minimum(rng.lognormal(6.5, 1.0, count).astype(int) + 1, 12_000)
    outputs = np.minimum(rng.lognormal(4.5, 0.9, count).astype(int) + 1, 800)
    parts = np.maximum(inputs // part, 1)
    common, group = rng.integers(1, 30, count), rng.integers(0, 20, count)
    ids = [
        group[i] * 1000 + j if j < common[i] else 10**6 + i * 1000 + j for i in range(count) for j in range(parts[i])
    ]
    return Requests(
        np.cumsum(rng.exponential(1 / rate_rps, count)), np.zeros(count, np.int32), inputs.astype(np.int32),
        outputs.astype(np.int32), np.full(count, part, np.int32), np.concatenate(([0], np.cumsum(parts))),
        np.array(ids, np.int64),
    )  # fmt: skip


def serve(core: Core, requests: Requests, law: Law, replicas: int = 1) -> Records:
    """To the last token of the last, with the books checked."""
    for _ in range(replicas):
        core.add(0, law)
    core.offer(requests)
    core.close()
    assert not core.run(math.inf)
    core.books().check()
    return core.take()[0]


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(
    ("law", "rate_rps"),
    [
        (STEP, 15.0),
        (Law(alpha_s=0.009, beta_s=3e-5, gamma_s=6e-8, max_step_tokens=512, max_batch=32), 8.0),
        (Law(alpha_s=0.009, beta_s=3e-5, gamma_s=6e-8, kv_tokens=20_000), 8.0),
        (Law(alpha_s=0.009, beta_s=3e-5, gamma_s=6e-8, kv_tokens=40_000, prefix_caching=True), 10.0),
        (Law(alpha_s=0.01, beta_s=1e-5, gamma_s=0, kv_tokens=17_000, block_tokens=7, max_step_tokens=300,
             prefix_caching=True), 5.0),
        (Law(alpha_s=0.009, beta_s=3e-5, gamma_s=6e-8, detail="requests"), 15.0),
    ],
    ids=["roomy", "chunked", "preempting", "prefixes", "odd blocks", "requests"],
)  # fmt: skip
def test_the_compiled_core_equals_the_naive_one_on_every_token(router: Router, law: Law, rate_rps: float) -> None:
    """Adding equal steps up changes no token time, no outcome and no count by more than 1e-9, a failure included."""
    seen = []
    for compiled in (False, True):
        core = new_core(1, router, record_times=True, compiled=compiled)
        for _ in range(3):
            core.add(0, law)
        core.offer(sharing(150, rate_rps, seed=2))
        core.close()
        core.run(6.0)
        core.books().check()
        core.fail(1)
        core.add(0, law)
        core.run(math.inf)
        core.books().check()
        seen.append((*core.take(), [core.counters(i) for i in range(3)], core.server(0)))
    (records, times, counters, server), (others, other_times, other_counters, other_server) = seen
    assert len(records) == len(others) == 150
    np.testing.assert_allclose(times, other_times, rtol=0, atol=1e-9)
    for name in RECORD.names or ():
        np.testing.assert_allclose(records[name], others[name], rtol=0, atol=1e-9, err_msg=name)
    for mine, theirs in zip(counters, other_counters, strict=True):
        for name in set(COUNTERS.names or ()) - {"gap_hist"}:  # runs of steps enter it at their mean
            np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-9, atol=1e-9, err_msg=name)
        assert mine["gap_hist"].sum() == theirs["gap_hist"].sum() == mine["gaps"]
    assert all(server[name] == other_server[name] for name in SERVER_COUNTERS.names or ())


@pytest.mark.parametrize("compiled", CORES)
def test_one_request_alone_takes_what_the_law_says(compiled: bool) -> None:
    """Two chunks of prompt, then one token a step, each reading what is cached: the times by hand."""
    law = Law(alpha_s=1.0, beta_s=0.1, gamma_s=0.01, max_batch=4, max_step_tokens=8, kv_tokens=64)
    core = new_core(1, "round_robin", record_times=True, compiled=compiled)
    core.add(0, law)
    core.offer(plain([5.0], [12], [3]))
    core.close()
    core.run(math.inf)
    first = 5.0 + (1 + 0.8 + 0.08) + (1 + 0.4 + 0.12)
    second = first + 1 + 0.1 + 0.13
    np.testing.assert_allclose(core.take()[1], [first, second, second + 1 + 0.1 + 0.14], rtol=1e-12)


@pytest.mark.parametrize("compiled", CORES)
def test_a_prompt_seen_before_is_not_computed_again(compiled: bool) -> None:
    """The second request of a prompt finds all but its last part cached, and so comes to its first token sooner."""
    law = Law(alpha_s=0.01, beta_s=1e-3, gamma_s=0.0, prefix_caching=True, kv_tokens=4096)
    twice = Requests(
        np.array([0.0, 60.0]), np.zeros(2, np.int32), np.full(2, 256, np.int32), np.full(2, 2, np.int32),
        np.full(2, 64, np.int32), np.array([0, 4, 8]), np.array([1, 2, 3, 4] * 2),
    )  # fmt: skip
    records = serve(new_core(1, "prefix_affine", compiled=compiled), twice, law, replicas=2)
    assert records["cached"].tolist() == [0, 192]
    assert records["replica"].tolist() == [0, 0]
    np.testing.assert_allclose(records["first_s"] - records["arrival_s"], [0.01 + 0.256, 0.01 + 0.064])


@pytest.mark.parametrize("compiled", CORES)
def test_what_can_never_fit_is_refused_and_what_a_failure_takes_is_lost(compiled: bool) -> None:
    """A request longer than the cache is refused; at a failure who has tokens is lost, and who has none is served."""
    law = Law(alpha_s=1.0, beta_s=0.0, gamma_s=0.0, max_batch=1, kv_tokens=64)
    core = new_core(1, "least_loaded", compiled=compiled)
    slot = core.add(0, law)
    core.offer(plain([0.0, 0.1, 0.2], [10, 100, 10], [20, 20, 5]))
    core.close()
    core.run(3.5)
    core.fail(slot)
    assert core.server(0)["queued"] == 1
    core.run(10.0)
    core.add(0, law)
    core.run(math.inf)
    core.books().check()
    records = np.sort(core.take()[0], order="id")
    assert records["outcome"].tolist() == [LOST, REFUSED, DONE]
    assert records["first_s"][2] == 11.0


def queue_wait(law: Law, rate_rps: float, outputs: np.ndarray, servers: int, seed: int, count: int) -> np.ndarray:
    """Mean waits of batches of requests, beyond their own service, with one output token costing alpha."""
    rng = np.random.default_rng(seed)
    requests = plain(np.cumsum(rng.exponential(1 / rate_rps, count)), np.ones(count), outputs)
    core = new_core(1, "least_loaded")
    records = np.sort(serve(core, requests, law, servers), order="id")
    waits = (records["last_s"] - records["arrival_s"]) - records["output"] * law.alpha_s
    return waits[count // 10 :].reshape(-1, count // 20).mean(axis=1)


def assert_mean(batches: np.ndarray, expected: float) -> None:
    """The expected mean lies in the 99.9 % interval of the batch means."""
    half = 3.9 * batches.std(ddof=1) / math.sqrt(len(batches))
    assert abs(batches.mean() - expected) <= half, f"{batches.mean()} ± {half}, expected {expected}"
    assert half < 0.15 * expected  # an interval that says something


@pytest.mark.skipif(not shutil.which("g++"), reason="needs the compiled core's speed")
@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_place_in_the_batch_is_an_m_d_1_queue(load: float) -> None:
    """Equal services one after another wait rho / (2 (1 - rho)) of a service (Pollaczek and Khinchine)."""
    law = Law(alpha_s=0.1, beta_s=0, gamma_s=0, max_batch=1, max_step_tokens=1)
    count = 200_000
    batches = queue_wait(law, load / 0.1, np.ones(count), 1, seed=3, count=count)
    assert_mean(batches, 0.1 * load / (2 * (1 - load)))


@pytest.mark.skipif(not shutil.which("g++"), reason="needs the compiled core's speed")
@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_place_and_geometric_lengths_are_an_m_m_1_queue(load: float) -> None:
    """Services of many short steps, geometric in number, are nearly exponential: M/G/1 with their exact moments."""
    law = Law(alpha_s=0.001, beta_s=0, gamma_s=0, max_batch=1, max_step_tokens=1)
    count, mean = 200_000, 100.0
    outputs = np.random.default_rng(4).geometric(1 / mean, count)
    batches = queue_wait(law, load / 0.1, outputs, 1, seed=5, count=count)
    second = 1e-6 * (2 - 1 / mean) * mean * mean  # of the geometric distribution
    expected = load / 0.1 * second / (2 * (1 - load))
    assert_mean(batches, expected)
    assert expected == pytest.approx(0.1 * load / (1 - load), rel=0.01)  # M/M/1


@pytest.mark.skipif(not shutil.which("g++"), reason="needs the compiled core's speed")
def test_places_in_the_batch_are_the_servers_of_an_m_m_c_queue() -> None:
    """With steps that cost the same however many share them, c places and geometric lengths wait as Erlang C says."""
    places, load, mean = 4, 0.8, 100.0
    law = Law(alpha_s=0.001, beta_s=0, gamma_s=0, max_batch=places, max_step_tokens=places)
    count = 400_000
    outputs = np.random.default_rng(6).geometric(1 / mean, count)
    rate = places * load / 0.1
    batches = queue_wait(law, rate, outputs, 1, seed=7, count=count)
    offered = places * load
    terms = [offered**k / math.factorial(k) for k in range(places)]
    last = offered**places / math.factorial(places) / (1 - load)
    erlang_c = last / (sum(terms) + last)
    rest_of_step = 0.001 / 2  # joining at a step's boundary
    assert_mean(batches, erlang_c * 0.1 / places / (1 - load) + rest_of_step)


@given(
    seed=st.integers(0, 2**31),
    kv_tokens=st.integers(16_000, 60_000),
    batch=st.integers(1, 64),
    caching=st.booleans(),
    replicas=st.integers(1, 3),
)
@settings(deadline=None, max_examples=25)
def test_books_are_kept_whatever_happens(seed: int, kv_tokens: int, batch: int, caching: bool, replicas: int) -> None:
    """Tokens, blocks and Little's law are conserved, and every request ends once."""
    law = Law(alpha_s=0.009, beta_s=3e-5, gamma_s=6e-8, kv_tokens=kv_tokens, max_batch=batch, prefix_caching=caching)
    core = new_core(1, ROUTERS[seed % 3])
    records = serve(core, sharing(60, 20.0, seed), law, replicas)
    assert sorted(records["id"]) == list(range(60))
    counters = [core.counters(i) for i in range(replicas)]
    assert sum(c["generated"] for c in counters) == records["output"][records["outcome"] == DONE].sum()
    assert all(c["blocks_used"] == 0 and c["running"] == 0 for c in counters)
    assert (records["first_s"] > records["arrival_s"]).all()
    assert (records["last_s"] >= records["first_s"]).all()


def test_looking_changes_nothing() -> None:
    """Runs that stop now and then to be looked at give the same tokens as one that does not."""
    seen = []
    for stops in ([], list(np.arange(0.37, 12.0, 0.37))):
        core = new_core(1, "least_loaded")
        core.add(0, STEP)
        core.offer(sharing(100, 12.0, seed=1))
        core.close()
        for stop in stops:
            core.run(float(stop))
            core.counters(0)
        core.run(math.inf)
        seen.append(np.sort(core.take()[0], order="id")["last_s"])
    np.testing.assert_allclose(seen[0], seen[1], rtol=0, atol=1e-9)


def test_request_level_is_near_step_level() -> None:
    """Settling latencies at admission keeps mean TTFT within a fifth and mean gaps within a twentieth, at half load."""
    rng = np.random.default_rng(0)
    count = 5000
    requests = plain(
        np.cumsum(rng.exponential(1 / 12, count)), rng.integers(100, 1500, count), rng.integers(50, 300, count)
    )
    seen = {}
    for detail in ("steps", "requests"):
        law = Law(alpha_s=0.009, beta_s=3e-5, gamma_s=6e-8, detail=detail)  # type: ignore[arg-type]
        r = serve(new_core(1, "least_loaded"), requests, law, replicas=4)
        gaps = (r["last_s"] - r["first_s"]).sum() / (r["output"] - 1).sum()
        seen[detail] = (float((r["first_s"] - r["arrival_s"]).mean()), float(gaps))
    assert seen["requests"][0] == pytest.approx(seen["steps"][0], rel=0.2)
    assert seen["requests"][1] == pytest.approx(seen["steps"][1], rel=0.05)


def test_streams_are_the_same_for_a_seed_and_merge_in_order() -> None:
    """A process is settled by its seed, follows its rates, and streams merge by time with nothing lost."""
    rates = Rates.of([0, 100, 200], [0, 20, 20])
    one = list(poisson_process(rates, [(10, 5), (20, 7)], duration_s=200, seed=1))
    again = list(poisson_process(rates, [(10, 5), (20, 7)], duration_s=200, seed=1))
    assert all((a.arrival_s == b.arrival_s).all() for a, b in zip(one, again, strict=True))
    times = np.concatenate([p.arrival_s for p in one])
    assert len(times) == pytest.approx(3000, abs=250)
    assert (times < 50).sum() == pytest.approx(250, abs=80)
    both = list(merged([one, [plain([1.0, 150.0], [1, 1], [1, 1], server=1)]]))
    whole = np.concatenate([p.arrival_s for p in both])
    assert (np.diff(whole) >= 0).all()
    assert len(whole) == len(times) + 2
    assert sum((p.server == 1).sum() for p in both) == 2


def test_a_law_that_cannot_be_is_refused() -> None:
    """Times that are no times, a budget below the batch, and a cache without a block are named."""
    for wrong in ({"alpha_s": math.nan}, {"alpha_s": -1.0}, {"max_batch": 0}, {"max_step_tokens": 3}, {"kv_tokens": 1}):
        with pytest.raises(InvalidInput, match="give"):
            Law(**{"alpha_s": 0.01, "beta_s": 0.0, "gamma_s": 0.0, **wrong})  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="round_robin"):
        new_core(1, "random")  # type: ignore[arg-type]
