"""The field's rules by hand numbers, and how several are combined."""

from __future__ import annotations

import math
from typing import Any

import pytest

from flyball.core.observation import ReplicaView, ServerView
from flyball.planner.analyzers import Advice, Seen, combine
from flyball.planner.analyzers.inferno import Inferno
from flyball.planner.analyzers.saturation import SaturationV1, SaturationV2
from flyball.planner.analyzers.serverless import Kpa, SkyServe
from flyball.planner.analyzers.throughput import Throughput
from flyball.planner.analyzers.tracking import TargetTracking
from flyball.planner.forecast import Forecast, Sample, forecaster, found_season
from flyball.planner.options import Sizer
from helpers.toy_fleet import fleet_spec


def seen(replicas: list[dict[str, Any]], **changes: Any) -> Seen:
    """A server with these replicas on one accelerator."""
    spec = fleet_spec()
    views = tuple(
        ReplicaView(name=f"r{i}", accelerator="H100", **{"kv_capacity_tokens": 32768, **r})
        for i, r in enumerate(replicas)
    )
    view = ServerView(
        name="chat", arrivals=120, input_tokens=1024.0, output_tokens=512.0, completed=changes.pop("completed", 120),
        replicas=views,
    )  # fmt: skip
    options = Sizer(spec, None).options(spec.servers[0], 1024.0, 512.0, spec.profiles)
    assert not isinstance(options, str)
    given: dict[str, Any] = {
        "view": view, "server": spec.servers[0], "now_s": 0.0, "window_s": 15.0, "current": {"H100": len(replicas)},
        "options": options, "rate_rps": 8.0, "level_rps": 8.0, "peak_rps": 8.0, "start_up_s": 60.0,
        "ahead": Forecast(mean_rps=8.0, sd_rps=0.0, method="naive"),
    }  # fmt: skip
    return Seen(**(given | changes))


def total(advice: Advice) -> int:
    """Replicas wanted."""
    assert advice.wanted is not None
    return sum(advice.wanted.values())


def test_saturation_v1_by_hand() -> None:
    """KV .85, .70, .60 with queues 1, 3, 1: one is saturated, the spare is .15 and 3, which is just enough; at .65 the
    removal of one of two would need .65 * 2, which is not safe."""
    loaded = [{"kv_used": k, "waiting": q} for k, q in ((0.85, 1), (0.70, 3), (0.60, 1))]
    advice, _ = SaturationV1().advise(seen(loaded), None)
    assert total(advice) == 3
    assert "spare KV 0.15, spare queue 3.0" in advice.reason
    assert total(SaturationV1().advise(seen([{"kv_used": 0.65}] * 2), None)[0]) == 2
    assert total(SaturationV1().advise(seen([{"kv_used": 0.75}] * 2), None)[0]) == 3
    assert total(SaturationV1().advise(seen([{"kv_used": 0.2}] * 3), None)[0]) == 2
    assert total(SaturationV1().advise(seen([{"kv_used": 0.2}] * 3, current={"H100": 4}), None)[0]) == 4


def test_saturation_v2_by_hand() -> None:
    """2048 blocks of 16 hold 26214 tokens at .8; 20000 in use and four waiting of 1024 in and 512 out want more."""
    advice, _ = SaturationV2().advise(seen([{"kv_used": 20000 / 32768, "waiting": 4}]), {})
    assert "26144 KV tokens wanted, 26214 held" in advice.reason
    assert total(advice) == 2
    assert total(SaturationV2().advise(seen([{"kv_used": 0.1}] * 3), {})[0]) < 3
    _, learnt = SaturationV2().advise(seen([{"kv_used": 0.7, "waiting": 6}]), {})
    assert learnt == {"long": (pytest.approx(0.7 * 32768),)}


def test_throughput_by_hand() -> None:
    """From ITL(k) = 40 ms k + 6 ms a replica at .85 gives a gap of 40 ms; supply and demand are in tokens."""
    sights = tuple((k / 20, 0.040 * k / 20 + 0.006) for k in range(4, 16))
    advice, _ = Throughput().advise(
        seen([{"kv_used": 0.5, "itl_s": 0.026, "kv_capacity_tokens": 100_000}], rate_rps=8.0), sights
    )
    per_replica = 0.85 * 100_000 / 1280 / 0.040
    assert f"4096 tokens/s wanted, a replica gives {per_replica:.0f}" in advice.reason
    assert total(advice) == math.ceil(4096 / per_replica)


def test_hpa_by_hand() -> None:
    """Twice the target a replica doubles the replicas, within a tenth nothing moves, and down waits 300 s."""
    rule = TargetTracking()
    base = seen([{"running": 0.0}] * 2)
    target = base.home.concurrency * rule.utilization
    up, wishes = rule.advise(seen([{"running": 2 * target}] * 2), ())
    assert total(up) == 4
    assert total(rule.advise(seen([{"running": 1.05 * target}] * 2), ())[0]) == 2
    idle = [{"running": 0.0}] * 4
    assert total(rule.advise(seen(idle, now_s=200.0), wishes)[0]) == 4
    assert total(rule.advise(seen(idle, now_s=301.0), wishes)[0]) == 1


def test_kpa_panics_and_does_not_go_down_in_panic() -> None:
    """Twice the capacity wanted within six seconds is a panic, in which the count never falls."""
    rule = Kpa()
    busy = 10 * seen([{}]).home.concurrency
    first, memory = rule.advise(seen([{"running": busy}]), rule.start())
    assert "panic" in first.reason
    calm, _ = rule.advise(seen([{"running": 0.0}] * total(first), now_s=20.0), memory)
    assert total(calm) >= total(first)


def test_skyserve_waits_its_delays() -> None:
    """More is asked for after 300 s of wanting it, not before, and from none at once."""
    rule = SkyServe()
    memory = rule.start()
    counts = []
    for k in range(20):
        advice, memory = rule.advise(seen([{}], now_s=20.0 * k, rate_rps=30.0), memory)
        counts.append(total(advice))
    assert set(counts[:15]) == {1}
    assert max(counts) > 1
    assert total(rule.advise(seen([], current={}, rate_rps=3.0), rule.start())[0]) >= 1


def test_the_original_loop_takes_what_is_served_for_what_is_asked() -> None:
    """Whatever arrives, its count follows from the throughput."""
    few = Inferno().advise(seen([{}], completed=15, rate_rps=100.0), None)[0]
    assert total(few) == 1


def test_any_up_is_followed_and_down_needs_all() -> None:
    """The most wanted up wins; one that says stay stops a way down; a silent one does not."""
    current = {"H100": 3}
    up, stay, down = (Advice(wanted={"H100": n}, reason="") for n in (5, 3, 1))
    silent = Advice(wanted=None, reason="blind")
    assert combine({"a": up, "b": down}, current).wanted == {"H100": 5}
    assert combine({"a": stay, "b": down}, current).wanted == {"H100": 3}
    assert combine({"a": down, "b": silent}, current).wanted == {"H100": 1}
    assert combine({"b": silent}, current).wanted is None


def test_a_season_is_found_and_forecast() -> None:
    """From two and a half periods of a wave its length is found, and half a period ahead is forecast within 20 %."""
    period_s, made = 1800.0, forecaster("seasonal")

    def rate(at_s: float) -> float:
        return 8.0 + 6.0 * math.sin(2 * math.pi * at_s / period_s)

    outlook = made.start()
    for k in range(1, 301):
        outlook = made.update(outlook, Sample(15.0 * k, rate(15.0 * k), 15.0), 900.0)
    assert outlook.tracked["seasonal"].state.season == pytest.approx(30, abs=1)
    for ahead_s in (60.0, 450.0, 900.0):
        assert made.ahead(outlook, ahead_s).mean_rps == pytest.approx(rate(4500.0 + ahead_s), rel=0.2, abs=1.0)


def test_noise_has_no_season() -> None:
    """What varies no more than chance explains is no season."""
    assert found_season(tuple(8.0 + 0.3 * ((k * 7919) % 13 - 6) / 6 for k in range(200)), 60.0) == 0
