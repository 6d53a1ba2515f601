"""The simulated fleet behind the loop's ports: replicas start, drain, fail and are paid for; what is seen is true."""

from __future__ import annotations

import math
from dataclasses import replace
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from flyball.adapters.simulated import SimulatedFleet, SimulatedServer, SimulatedWorld, govern
from flyball.adapters.simulated_picture import picture
from flyball.adapters.simulated_report import LatencySketch, Timeline
from flyball.core.errors import ActuationFailed, InvalidInput
from flyball.core.fleet import Accelerator, FleetSpec, LatencyProfile, ServerSpec, ServiceClass, Targets
from flyball.core.slo import Slo
from flyball.performance.request_streams import Rates, merged, poisson_process
from flyball.performance.simulator import Law, Requests
from flyball.planner.loop import LoopSettings, controller

LAW = Law(alpha_s=0.009, beta_s=3e-5, gamma_s=6e-8)
GPU = Accelerator(name="GPU", type="GPU", units=2, cost_per_h=3.0)
CHAT = SimulatedServer(name="chat", laws={"GPU": LAW}, slo=Slo(ttft_s=0.2, tpot_s=0.015), start={"GPU": 1})
WORLD = SimulatedWorld(servers=(CHAT,), accelerators=(GPU,), cold_start_s=60.0)


def arrivals(rate_rps: float, duration_s: float, *, server: int = 0, seed: int = 1) -> list[Requests]:
    """Poisson arrivals of middling requests."""
    return list(
        poisson_process(
            Rates.of([0], [rate_rps]), [(800, 150), (300, 60)], duration_s=duration_s, seed=seed, server=server
        )
    )


def test_replicas_start_serve_drain_and_are_paid_for_all_along() -> None:
    """A replica is paid for from being asked for until its last request is done, in cards and in money."""
    fleet = SimulatedFleet(WORLD, arrivals(3.0, 600.0))
    fleet.advance(100.0)
    fleet.scale({"chat": {"GPU": 3}})
    assert fleet.observe(15.0).servers["chat"].count("starting") == 2
    fleet.advance(159.0)
    assert fleet.observe(15.0).servers["chat"].count("ready") == 1
    fleet.advance(160.0)
    assert fleet.observe(15.0).servers["chat"].count("ready") == 3
    fleet.advance(300.0)
    fleet.scale({"chat": {"GPU": 1}})
    assert fleet.observe(15.0).servers["chat"].count("draining") > 0
    fleet.advance(400.0)
    assert fleet.observe(15.0).servers["chat"].count("ready", "draining") == 1
    fleet.advance(600.0)
    report = fleet.finish()
    served = report.servers[0]
    assert served.completed == served.arrivals
    assert report.actions == 2
    least_h = (600 + 2 * 200) / 3600
    assert least_h < served.replica_hours["GPU"] < least_h + 2 * 10 / 3600  # a drain takes as long as a request
    assert report.gpu_hours == pytest.approx(2 * served.replica_hours["GPU"])
    assert report.cost == pytest.approx(3 * served.replica_hours["GPU"])


def test_a_start_that_is_called_off_costs_only_its_wait() -> None:
    """Replicas that have not started are the first to go, and are never seen ready."""
    fleet = SimulatedFleet(WORLD, arrivals(1.0, 200.0))
    fleet.scale({"chat": {"GPU": 4}})
    fleet.advance(30.0)
    fleet.scale({"chat": {"GPU": 1}})
    fleet.advance(200.0)
    assert fleet.finish().servers[0].replica_hours["GPU"] == pytest.approx((200 + 3 * 30) / 3600)


def test_what_is_seen_is_what_happened() -> None:
    """Sums over the windows are the run's; means are those of the requests; use of the cache is a share."""
    fleet = SimulatedFleet(WORLD, arrivals(4.0, 300.0))
    states = []
    for end in range(15, 301, 15):
        fleet.advance(float(end))
        states.append(fleet.observe(15.0))
    assert all(s.window_s == pytest.approx(15.0) for s in states)
    views = [s.servers["chat"] for s in states]
    report = fleet.finish()
    served = report.servers[0]
    assert sum(v.arrivals or 0 for v in views) == served.arrivals
    assert sum(v.completed for v in views) <= served.completed
    assert sum(v.good or 0 for v in views) / sum(v.completed for v in views) == pytest.approx(
        served.attainment, abs=0.02
    )
    firsts = [v.replicas[0].ttft_s for v in views]
    assert np.mean(firsts) == pytest.approx(served.latencies["ttft"].mean_s, rel=0.1)
    assert all(r.ttft_p90_s >= r.ttft_s * 0.9 and 0 < r.kv_used < 1 for v in views for r in v.replicas)
    assert all(r.kv_capacity_tokens == 524_288 for v in views for r in v.replicas)


def test_nothing_served_waits_at_the_gateway_and_zero_is_a_count() -> None:
    """Without replicas requests queue at the gateway, and the first replica serves them all."""
    world = replace(WORLD, servers=(replace(CHAT, start={}),))
    fleet = SimulatedFleet(world, arrivals(2.0, 30.0))
    fleet.advance(20.0)
    view = fleet.observe(15.0).servers["chat"]
    assert view.replicas == ()
    assert view.queued > 20
    fleet.scale({"chat": {"GPU": 1}})
    fleet.advance(30.0)
    assert fleet.finish().servers[0].lost == 0


def test_a_failed_replica_is_replaced_and_its_requests_are_lost_or_sent_again() -> None:
    """Replicas that live two minutes on average cost attainment, but every request ends, and the count recovers."""
    world = replace(WORLD, servers=(replace(CHAT, start={"GPU": 3}),), mean_life_s=120.0, cold_start_s=10.0)
    fleet = SimulatedFleet(world, arrivals(6.0, 600.0), seed=3)
    fleet.advance(600.0)
    assert fleet.observe(15.0).servers["chat"].count("starting", "ready") == 3
    served = fleet.finish().servers[0]
    assert 0 < served.lost < served.arrivals / 10
    assert served.completed + served.lost == served.arrivals
    fleet = SimulatedFleet(WORLD, arrivals(1.0, 10.0))
    with pytest.raises(InvalidInput, match="chat-0"):
        fleet.fail("nobody")
    fleet.fail("chat-0")
    assert fleet.observe(5.0).servers["chat"].count("starting") == 1


def test_the_same_seed_is_the_same_run() -> None:
    """World, load and seed settle everything, failures and start-up times included."""
    world = replace(WORLD, mean_life_s=100.0, cold_start_spread=0.5, servers=(replace(CHAT, start={"GPU": 2}),))

    def hours(seed: int) -> tuple[float, float]:
        fleet = SimulatedFleet(world, arrivals(4.0, 300.0), seed=seed)
        fleet.advance(300.0)
        report = fleet.finish()
        return report.gpu_hours, report.attainment

    assert hours(1) == hours(1)
    assert hours(1) != hours(2)


def test_models_and_accelerators_live_side_by_side() -> None:
    """Two servers with loads of their own, one on two kinds of accelerator, keep their own books."""
    fast = Accelerator(name="fast", type="fast", cost_per_h=9.0)
    world = SimulatedWorld(
        servers=(
            CHAT,
            SimulatedServer(
                name="code",
                laws={"GPU": LAW, "fast": replace(LAW, alpha_s=0.004)},
                start={"GPU": 1, "fast": 1},
            ),
        ),
        accelerators=(GPU, fast),
    )
    load = merged([arrivals(2.0, 120.0), arrivals(3.0, 120.0, server=1, seed=2)])
    fleet = SimulatedFleet(world, load)
    fleet.advance(120.0)
    chat, code = fleet.finish().servers
    assert chat.completed == chat.arrivals
    assert code.completed == code.arrivals
    assert code.arrivals > chat.arrivals
    assert code.cost == pytest.approx((3 + 9) * 120 / 3600)
    assert fleet.observe(60.0).servers["code"].replicas[1].accelerator == "fast"


def test_a_cluster_refuses_what_it_cannot_do_and_changes_nothing() -> None:
    """Unknown servers and accelerators, negative counts, and more cards than exist, draining ones included."""
    fleet = SimulatedFleet(replace(WORLD, capacity={"GPU": 6}), arrivals(3.0, 100.0))
    for wrong in ({"chat": {"TPU": 1}}, {"nobody": {"GPU": 1}}, {"chat": {"GPU": -1}}, {"chat": {"GPU": 4}}):
        with pytest.raises(ActuationFailed):
            fleet.scale(wrong)
    assert fleet.observe(5.0).servers["chat"].wanted == {"GPU": 1}
    fleet.scale({"chat": {"GPU": 3}})
    fleet.advance(100.0)
    fleet.scale({"chat": {"GPU": 1}})
    with pytest.raises(ActuationFailed, match="draining"):
        fleet.scale({"chat": {"GPU": 3}})


def test_promises_that_cannot_be_checked_are_refused() -> None:
    """Single gaps are not kept, and servers must name accelerators that exist."""
    with pytest.raises(InvalidInput, match="mean gap"):
        SimulatedFleet(replace(WORLD, servers=(replace(CHAT, slo=Slo(itl_s=0.02)),)), [])
    with pytest.raises(InvalidInput, match="accelerators are GPU"):
        replace(WORLD, servers=(replace(CHAT, start={"TPU": 1}),))
    with pytest.raises(InvalidInput, match="cold_start_s"):
        replace(WORLD, cold_start_s=-1.0)


def test_a_loop_governs_the_fleet_through_its_ports() -> None:
    """Ours, from one replica at a load for two, asks for the second at once, keeps the promise and then rests."""
    spec = FleetSpec(
        accelerators=(GPU,),
        profiles=(
            LatencyProfile(
                model="m", accelerator="GPU", alpha_s=0.009, beta_s=3e-5, gamma_s=6e-8, max_batch=256,
                queue_model="v3-engine",
            ),
        ),
        service_classes=(ServiceClass(name="c", targets={"m": Targets(ttft_s=0.2, itl_s=0.015)}),),
        servers=(ServerSpec(name="chat", service_class="c", model="m", min_replicas=1),),
        unlimited=True,
    )  # fmt: skip
    fleet = SimulatedFleet(WORLD, arrivals(12.0, 1200.0))
    turns = govern(fleet, controller("slo", spec, LoopSettings(start_up_s=60.0)))
    report = fleet.finish()
    assert turns[0].decision is not None
    assert sum(turns[0].decision.replicas["chat"].values()) >= 2
    assert report.attainment > 0.85  # the first minute, on one replica, is lost
    assert report.actions <= 4
    assert report.duration_s == pytest.approx(fleet.load_ends_s)
    drawn = picture(report.servers[0], "ours & theirs")
    texts = [e.text for e in ET.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]
    assert {"ours & theirs", "replicas", "attainment %"} <= set(texts)


def test_sketch_and_timeline_hold_what_they_say_in_bounded_memory() -> None:
    """Percentiles within a hundredth; neighbours are merged into means once there are too many rows."""
    values = np.random.default_rng(0).lognormal(-2, 1, 20_000)
    sketch = LatencySketch()
    assert math.isnan(sketch.percentile_s(50))
    sketch.add(values)
    for q in (1, 50, 99):
        assert sketch.percentile_s(q) == pytest.approx(np.percentile(values, q), rel=0.02)
    timeline = Timeline(("x",))
    for i in range(5000):
        timeline.add(5.0, {"x": float(i)})
    rows = timeline.arrays()
    assert len(rows["time_s"]) <= 2048
    assert rows["x"][0] == pytest.approx(3.5)  # of the first eight, after three mergers
    assert rows["time_s"][-1] < 25_000
