"""A fleet on one machine: real engines, a real Prometheus, load that doubles and halves, and the loop in between.

Each replica is a `flyball serve` process; a small gateway in front counts what arrives and spreads it; Prometheus
scrapes both; the loop reads Prometheus and starts or drains replicas. Not one request is lost on the way down.

    python examples/fleet_on_processes.py            # needs the program prometheus (Debian: apt-get install prometheus)

The latency law given to the planner is a slow one on purpose: a machine with two cores could not show three replicas of
a fast one under load.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from pathlib import Path

from flyball.adapters.gateway import Gateway, gateway
from flyball.adapters.loadgen import HttpLoad
from flyball.adapters.process_cluster import ProcessCluster, process_cluster
from flyball.adapters.prometheus import PrometheusClient, PrometheusSource, ServerQuery, gateway_queries
from flyball.adapters.prometheus_process import prometheus
from flyball.core.fleet import Accelerator, Demand, FleetSpec, LatencyProfile, ServerSpec, ServiceClass, Targets
from flyball.core.slo import Slo
from flyball.core.workload import RequestSpec, Workload
from flyball.planner.cycle import turn
from flyball.planner.damping import Damping
from flyball.planner.loop import FleetLoop, LoopSettings

SERVE = (sys.executable, "-m", "flyball", "serve", "--port", "{port}", "--threads", "1", "--max-model-len", "256",
         "--kv-cache-mib", "16", "--name", "tiny")  # fmt: skip
PHASES = ((2.5, 2), (5.0, 3), (1.5, 2))  # requests per second, and the replicas that shall be ready for them
INPUT_TOKENS, OUTPUT_TOKENS = 16, 8
BURST_S = 4.0  # the load is sent in bursts this long, until the replicas are there
PATIENCE_S = 150.0  # of a phase


def spec() -> FleetSpec:
    """One server on this machine's processes; two may run at least, four at most."""
    return FleetSpec(
        accelerators=(Accelerator(name="core", type="core", cost_per_h=1.0),),
        profiles=(
            LatencyProfile(model="tiny", accelerator="core", alpha_s=0.08, beta_s=0.0, gamma_s=0.0, max_batch=2),
        ),
        service_classes=(ServiceClass(name="interactive", targets={"tiny": Targets(ttft_s=1.0)}),),
        servers=(
            ServerSpec(
                name="chat",
                service_class="interactive",
                model="tiny",
                min_replicas=2,
                demand=Demand(input_tokens=INPUT_TOKENS, output_tokens=OUTPUT_TOKENS),
            ),
        ),
        capacity={"core": 4},
    )


def settings() -> LoopSettings:
    """A loop in a hurry, for an example of a minute; in production periods and windows are minutes."""
    damping = Damping(down_window_s=6.0, down_cooldown_s=4.0, min_stable_s=6.0)
    return LoopSettings(period_s=2.0, start_up_s=5.0, damping=damping, forecast="naive")


def burst(rate_rps: float) -> Workload:
    """Evenly spaced requests."""
    return Workload(
        requests=tuple(
            RequestSpec(arrival_s=k / rate_rps, input_tokens=INPUT_TOKENS, output_tokens=OUTPUT_TOKENS)
            for k in range(round(BURST_S * rate_rps))
        ),
        source=f"{rate_rps} requests/s",
    )


def govern(
    source: PrometheusSource, cluster: ProcessCluster, loop: FleetLoop, ready: list[int], done: threading.Event
) -> None:
    """Turn after turn until done; notes how many replicas were ready after each."""
    memory = loop.start()
    shown: list[str] = []
    while not done.wait(loop.period_s):
        told, memory = turn(source, loop, cluster, memory, window_s=8.0)
        phases = sorted(r.phase for r in cluster.replicas("chat"))
        ready.append(phases.count("ready"))
        if phases != shown:
            said = (told.blind,) if told.decision is None else told.decision.reasons["chat"]
            print(f"{' '.join(phases)}: {'; '.join(said)}", flush=True)
            shown = list(phases)


def drive(door: Gateway, ready: list[int]) -> tuple[int, int]:
    """Send each phase's load until its replicas are ready, and a little longer; returns requests sent and answered."""
    load = HttpLoad(url=door.url, model="tiny", vocab_size=256, timeout_s=120.0)
    sent = answered = 0
    for rate_rps, wanted in PHASES:
        late_s = time.monotonic() + PATIENCE_S
        bursts = 0
        while bursts < 3 or (ready[-1:] != [wanted] and time.monotonic() < late_s):
            window = load.run(burst(rate_rps), Slo(ttft_s=1.0), generation="example")
            sent, answered, bursts = sent + len(window.traces), answered + len(window.completed), bursts + 1
    return sent, answered


def main() -> None:
    """Run it, and tell what came of it."""
    with (
        tempfile.TemporaryDirectory() as name,
        gateway("chat") as door,
        process_cluster({"chat": {"core": SERVE}}, {"chat": door}, Path(name)) as cluster,
        prometheus(Path(name), targets=cluster.targets_file, static=[door.url.removeprefix("http://")]) as url,
        PrometheusClient(url) as client,
    ):
        cluster.scale({"chat": {"core": 2}})
        while sum(r.phase == "ready" for r in cluster.replicas("chat")) < 2:
            time.sleep(0.2)
        query = ServerQuery(engine="flyball", matchers={"server": "chat"}, **gateway_queries("chat"))
        source = PrometheusSource(client, {"chat": query}, cluster)
        done = threading.Event()
        ready: list[int] = []
        loop = FleetLoop(spec(), settings())
        thread = threading.Thread(target=govern, args=(source, cluster, loop, ready, done))
        thread.start()
        try:
            sent, answered = drive(door, ready)
        finally:
            done.set()
            thread.join()
        print(f"replicas: {ready[0]} at first, {max(ready)} at most, {ready[-1]} at last")
        print(f"requests: {sent} sent, {answered} answered, {sent - answered} lost")
        print(f"gateway: {door.counts.arrived} arrived, {door.counts.broken} answers cut off")


if __name__ == "__main__":
    main()
