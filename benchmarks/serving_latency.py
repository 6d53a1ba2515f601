"""What TTFT and ITL do clients see under Poisson load, against vLLM's server on the same model, machine and requests?

The 153 M model of `engine_throughput.py` in bfloat16 behind each server on 2 threads, 128 input and 64 output tokens a
request. First each server's capacity: requests a second while it works off 64 that come at once. Then the same Poisson
arrivals for both at 50 % and 80 % of the lesser capacity, in turns, and for ours at the same shares of its own.
Latency counts from the scheduled arrival.

    python benchmarks/serving_latency.py [--requests 60] [--rivals vllm]
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as hf_logging

import _peers
import startup
from _figures import figure
from engine_throughput import BATCH, INPUT, OUTPUT, SHAPE, checkpoint
from flyball.adapters.loadgen import HttpLoad, client_bound
from flyball.adapters.traces import poisson
from flyball.core.metrics import MetricsWindow
from flyball.core.slo import Slo
from flyball.core.workload import RequestSpec, Workload
from flyball.engine.bundled import bundled_model_path

SHARES = (0.5, 0.8)
REQUEST = RequestSpec(arrival_s=0.0, input_tokens=INPUT, output_tokens=OUTPUT)
READY_S = 300.0


def capacity(load: HttpLoad) -> float:
    """Requests a second while 64 that came at once are worked off; the second of two such bursts."""
    burst = Workload(requests=(REQUEST,) * BATCH, source="a burst")
    load.run(burst, Slo(), "burst")
    return load.run(burst, Slo(), "burst").throughput_rps


def arrivals(rate_rps: float, count: int) -> Workload:
    """Requests of one size at Poisson times, the same for every server."""
    return poisson([REQUEST], name="fixed", rate_rps=rate_rps, seed=1, count=count)


def main() -> None:
    """Start the servers, measure capacities, then latencies in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=60, help="at each load and server")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rivals", default="vllm", help="vllm, or nothing")
    parser.add_argument("--peers-folder", type=Path, default=_peers.CACHE, help="where peers are installed")
    args = parser.parse_args()
    say = Console(stderr=True, soft_wrap=True).print
    torch.set_num_threads(args.threads)
    hf_logging.disable_progress_bar()
    rivals = [name for name in args.rivals.split(",") if name]
    with checkpoint() as path, contextlib.ExitStack() as running:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(bundled_model_path() / name, path)
        loads: dict[str, HttpLoad] = {}
        for name, server in startup.servers(rivals, args.threads, args.peers_folder, say, path).items():
            say(f"{name}: starting")
            process, port = running.enter_context(startup.started(server))
            try:
                startup.await_first_token(server, process, port, READY_S)
            except _peers.PeerUnavailable as reason:
                if name == "flyball":
                    raise
                say(f"{name} is left out: {reason}")
                continue
            loads[name] = HttpLoad(url=f"http://127.0.0.1:{port}", model=startup.NAME, vocab_size=SHAPE.vocab_size)
        found = {name: capacity(load) for name, load in loads.items()}
        for name, rate in found.items():
            say(f"{name}: capacity {rate:.2f} requests/s")
        windows: dict[tuple[str, str], MetricsWindow] = {}
        common = min(found.values())
        for share in SHARES:
            for name, load in loads.items():
                windows[name, f"{share:.0%}"] = measured(load, share * common, args.requests, name, say)
            if len(loads) > 1:
                own = share * found["flyball"]
                windows["flyball", f"{share:.0%} of its own"] = measured(
                    loads["flyball"], own, args.requests, "flyball", say
                )
        report(windows, found)


def measured(load: HttpLoad, rate_rps: float, count: int, name: str, say: Callable[[str], None]) -> MetricsWindow:
    """One window, after which it is said whether the client was the bottleneck."""
    window = load.run(arrivals(rate_rps, count), Slo(), name)
    say(f"{name}: {count} requests at {rate_rps:.2f}/s")
    if (reason := client_bound(window)) is not None:
        say(f"{name}: these figures tell of the client too: {reason}")
    if window.errors:
        say(f"{name}: failed requests {dict(window.errors)}")
    return window


def report(windows: dict[tuple[str, str], MetricsWindow], capacities: dict[str, float]) -> None:
    """The table and the JSON lines; `ratio` is ours over the rival's, below 1 is better."""
    table = Table(title=f"Latency in ms, {INPUT} input and {OUTPUT} output tokens; shares of the lesser capacity")
    for column in ("load", "server", "requests/s", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99", "failed"):
        table.add_column(column, justify="right")
    for (name, load), window in windows.items():
        ttft, itl = window.summary("ttft"), window.summary("itl")
        values = (ttft.p50, ttft.p99, itl.p50, itl.p99)
        table.add_row(
            load, name, f"{window.throughput_rps:.2f}", *(f"{v * 1e3:.1f}" for v in values),
            str(sum(window.errors.values())),
        )  # fmt: skip
    Console(width=110).print(table)
    for name, rate in capacities.items():
        figure(f"capacity_{name}", rate, "requests/s")
    for share in SHARES:
        load = f"{share:.0%}"
        rival = next((name for name, at in windows if at == load and name != "flyball"), None)
        for metric in ("ttft", "itl"):
            ours = windows["flyball", load].summary(metric)
            theirs = windows[rival, load].summary(metric) if rival else None
            for quantile in ("p50", "p99"):
                figure(
                    f"{metric}_{quantile}_{share * 100:.0f}", getattr(ours, quantile), "s",
                    rival=getattr(theirs, quantile) if theirs else None, rival_name=rival,
                )  # fmt: skip


if __name__ == "__main__":
    main()
