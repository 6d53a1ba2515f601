"""Decisions of several fleets as metrics, read back over HTTP by the names and labels that HPA and KEDA objects use."""

from __future__ import annotations

from urllib.request import urlopen

from prometheus_client import start_http_server
from prometheus_client.parser import text_string_to_metric_families

from flyball.adapters.fleet_export import FleetMetrics, FleetsMetrics
from flyball.planner.cycle import Turn, turn
from flyball.planner.loop import FleetLoop
from helpers.toy_fleet import ToyFleet, fleet_spec


def decided(rate_rps: float) -> tuple[Turn, ToyFleet]:
    """A decision after some turns."""
    spec = fleet_spec()
    fleet = ToyFleet(spec=spec, rates={"chat": lambda _: rate_rps})
    fleet.put("chat", "H100", 1)
    loop = FleetLoop(spec)
    memory = loop.start()
    for _ in range(4):
        fleet.advance(15.0)
        told, memory = turn(fleet, loop, fleet, memory)
    return told, fleet


def test_fleets_share_one_page_and_variants_are_what_is_scaled() -> None:
    """`wva_desired_replicas{variant_name=DEPLOYMENT}` of each fleet, once; a forgotten one advises nothing."""
    every = FleetsMetrics()
    wanted = {}
    for name, rate_rps in (("a", 15.0), ("b", 2.0)):
        told, fleet = decided(rate_rps)
        metrics = FleetMetrics(namespace=f"ns-{name}", variants={("chat", "H100"): "chat-h100"})
        every.put(f"ns-{name}/fleet", metrics)
        metrics.record(told)
        wanted[f"ns-{name}"] = fleet.count("chat")
    server, thread = start_http_server(0, addr="127.0.0.1", registry=every.registry)
    try:
        with urlopen(f"http://127.0.0.1:{server.server_port}/metrics") as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert len({f.name for f in families}) == len(families)
    desired = next(f for f in families if f.name == "wva_desired_replicas").samples
    assert {s.labels["namespace"]: s.value for s in desired} == wanted
    assert {s.labels["variant_name"] for s in desired} == {"chat-h100"}
    processed = next(f for f in families if f.name == "wva_models_processed").samples
    assert {s.labels["fleet"] for s in processed} == {"ns-a/fleet", "ns-b/fleet"}
    every.forget("ns-a/fleet")
    left = {s.labels["fleet"] for f in every.registry.collect() for s in f.samples}
    assert left == {"ns-b/fleet"}
