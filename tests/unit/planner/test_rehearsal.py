"""Plans are tried in the simulator before they are acted on."""

from __future__ import annotations

from flyball.core.fleet import Targets
from flyball.performance.simulator import Law
from flyball.planner.cycle import turn
from flyball.planner.loop import FleetLoop, LoopSettings
from flyball.planner.rehearsal import RehearsedLoop, lengths, rehearse
from helpers.toy_fleet import ToyFleet, fleet_spec

LAW = Law(alpha_s=0.009, beta_s=3e-5, gamma_s=6e-8)
TARGETS = Targets(ttft_s=0.2, itl_s=0.015)


def test_a_rehearsal_tells_enough_from_too_few() -> None:
    """At 8 requests/s one replica keeps far fewer promises than three; the same seed gives the same share."""
    pairs = lengths(1180.0, 215.0)
    shares = [rehearse(LAW, n, [8.0] * 5, TARGETS, pairs, seed=1) for n in (1, 3)]
    assert shares[0] < 0.7
    assert shares[1] > 0.95
    assert rehearse(LAW, 1, [8.0] * 5, TARGETS, pairs, seed=1) == shares[0]


def decided(loop: FleetLoop, rate_rps: float, replicas: int, seconds: float) -> tuple[int, str]:
    """Replicas after a while, and all that was said on the way."""
    fleet = ToyFleet(spec=loop.spec, rates={"chat": lambda _: rate_rps})
    fleet.put("chat", "H100", replicas)
    memory, said = loop.start(), []
    for _ in range(int(seconds / loop.period_s)):
        fleet.advance(loop.period_s)
        told, memory = turn(fleet, loop, fleet, memory)
        assert told.decision is not None
        said += told.decision.reasons["chat"]
    return fleet.count("chat"), "; ".join(said)


def test_a_replica_is_kept_where_the_rehearsal_says_it_is_needed() -> None:
    """The formula for means would give up a replica that promises to each request need: the rehearsal keeps it."""
    settings = LoopSettings(share=None, forecast="ewma")
    assert decided(FleetLoop(fleet_spec(), settings), 5.0, 2, 1800)[0] == 1
    count, said = decided(RehearsedLoop(fleet_spec(), settings), 5.0, 2, 1800)
    assert count == 2
    assert "2 are kept" in said


def test_a_change_that_holds_is_made_and_told() -> None:
    """A plan that stands the rehearsal is carried out, with the share of requests it would serve as promised."""
    count, said = decided(RehearsedLoop(fleet_spec()), 12.0, 1, 600)
    assert count >= 3
    assert "rehearsed on the last" in said
