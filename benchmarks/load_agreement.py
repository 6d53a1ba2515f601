"""Does Flyball's load generator measure what `vllm bench serve` measures, on the same server under the same trace?

One server: Flyball with the bundled model, or with `--server paced` one that waits as long as a law says (100 ms and
half a millisecond a prompt token to the first token, 20 ms to each other one), which a busy machine disturbs little. A
trace in Mooncake's form (Azure's lengths, Poisson arrivals, shared prefixes) is replayed by both clients at its own
times, in turns (A B B A ...), each time with new prompts. Compared are the medians over the rounds. Asked for:
throughput within 5 %, p50 and p99 of TTFT and ITL within 10 %.

    python benchmarks/load_agreement.py [--server paced] [--rounds 4] [--requests 120] [--rate 6]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from aiohttp import web
from rich.console import Console
from rich.table import Table

import _peers
from _figures import figure
from flyball.adapters.engines.process import free_port, spawned
from flyball.adapters.loadgen import HttpLoad, client_bound
from flyball.adapters.traces import Lengths, poisson, read_trace, recorded, trace_path
from flyball.core.slo import Slo
from flyball.engine.bundled import bundled_model_path

NAME = "bundled"
METRICS = ("throughput_rps", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")
ALLOWED = {name: 0.05 if name == "throughput_rps" else 0.10 for name in METRICS}
CHUNK = 512  # tokens that a hash id stands for


def write_trace(path: Path, requests: int, rate: float, seed: int) -> None:
    """A trace in Mooncake's form; of three long prompts, two begin alike."""
    rows = read_trace(trace_path("azure-conv"))
    load = poisson(rows, name="azure-conv", rate_rps=rate, seed=seed, count=requests,
                   lengths=Lengths(scale=0.6, max_input=CHUNK + 128, max_output=64))  # fmt: skip
    fresh = itertools.count(1000)
    with path.open("w") as file:
        for index, r in enumerate(load.requests):
            ids = [next(fresh) for _ in range(-(-r.input_tokens // CHUNK))]
            if r.input_tokens > CHUNK and index % 3:
                ids[0] = 7
            file.write(json.dumps({
                "timestamp": round(r.arrival_s * 1e3, 3), "input_length": r.input_tokens,
                "output_length": r.output_tokens, "hash_ids": ids,
            }) + "\n")  # fmt: skip


def ours(trace: Path, load: HttpLoad) -> dict[str, float]:
    """One replay by Flyball."""
    window = load.run(recorded(read_trace(trace), name=trace.name), Slo(), "g")
    if window.errors:
        raise SystemExit(f"requests failed: {dict(window.errors)}")
    if doubt := client_bound(window):
        Console(stderr=True).print(f"in doubt: {doubt}")
    ttft, itl = window.summary("ttft"), window.summary("itl")
    return {"throughput_rps": window.throughput_rps, "ttft_p50_ms": ttft.p50 * 1e3, "ttft_p99_ms": ttft.p99 * 1e3,
            "itl_p50_ms": itl.p50 * 1e3, "itl_p99_ms": itl.p99 * 1e3}  # fmt: skip


def theirs(url: str, trace: Path, python: Path, requests: int, folder: Path) -> dict[str, float]:
    """One replay by `vllm bench serve`."""
    command = [
        str(python.with_name("vllm")), "bench", "serve", "--backend", "openai", "--base-url", url, "--model", NAME,
        "--tokenizer", str(bundled_model_path()), "--dataset-name", "timed_trace", "--dataset-path", str(trace),
        "--timed-trace-chunk-hash-size", str(CHUNK), "--timed-trace-sec-multiplier", "0.001", "--num-prompts",
        str(requests), "--percentile-metrics", "ttft,itl", "--metric-percentiles", "50,99", "--temperature", "0",
        "--save-result", "--result-dir", str(folder), "--result-filename", "theirs.json", "--disable-tqdm",
    ]  # fmt: skip
    done = subprocess.run(command, env=_peers.environment(_peers.vllm_variables(1, multiprocessing=False)),
                          capture_output=True, text=True, check=False)  # fmt: skip
    if done.returncode:
        raise SystemExit(f"vllm bench serve failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    told = json.loads((folder / "theirs.json").read_text())
    if told["completed"] != requests:
        raise SystemExit(f"vllm bench serve completed {told['completed']} of {requests} requests")
    names = {"throughput_rps": "request_throughput", "ttft_p50_ms": "p50_ttft_ms", "ttft_p99_ms": "p99_ttft_ms",
             "itl_p50_ms": "p50_itl_ms", "itl_p99_ms": "p99_itl_ms"}  # fmt: skip
    return {ours: told[theirs] for ours, theirs in names.items()}


def report(seen: dict[str, list[dict[str, float]]], server: str) -> None:
    """The table and the JSON lines; `within` is 1 when every metric is as near as asked for."""
    table = Table(title=f"Medians over the rounds (lowest to highest), server: {server}")
    for column in ("", "Flyball", "vllm bench serve", "difference", "asked for"):
        table.add_column(column, justify="left" if not column else "right")
    within = True
    for name in METRICS:
        values = {who: [round_[name] for round_ in rounds] for who, rounds in seen.items()}
        mid = {who: statistics.median(v) for who, v in values.items()}
        difference = mid["flyball"] / mid["vllm"] - 1
        within &= abs(difference) <= ALLOWED[name]
        shown = {who: f"{mid[who]:.4g} ({min(v):.4g} to {max(v):.4g})" for who, v in values.items()}
        table.add_row(name, shown["flyball"], shown["vllm"], f"{difference:+.1%}", f"±{ALLOWED[name]:.0%}")
        figure(
            f"load_agreement.{name}",
            difference,
            "share",
            runs=len(seen["flyball"]),
            server=server,
            ours=mid["flyball"],
            theirs=mid["vllm"],
        )
    Console().print(table)
    figure(
        "load_agreement.within",
        float(within),
        "all metrics within what is asked for",
        server=server,
        runs=len(seen["flyball"]),
    )


def serve_paced(port: int) -> None:
    """OpenAI's completions at the pace of the law, in this process."""

    async def completions(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        await asyncio.sleep(0.1 + 0.0005 * len(body["prompt"]))
        for number in range(body["max_tokens"]):
            if number:
                await asyncio.sleep(0.02)
            await reply.write(b'data: {"choices": [{"index": 0, "text": " a", "finish_reason": null}]}\n\n')
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        await reply.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode())
        return reply

    async def ready(_: web.Request) -> web.Response:
        return web.Response()

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": NAME, "object": "model"}]})

    app = web.Application()
    app.add_routes([web.get("/health/ready", ready), web.get("/v1/models", models),
                    web.post("/v1/completions", completions)])  # fmt: skip
    web.run_app(app, host="127.0.0.1", port=port, print=None)


def main() -> None:
    """Start the server, let the clients take turns, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", choices=("flyball", "paced"), default="flyball")
    parser.add_argument("--serve-paced", type=int, metavar="PORT", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--rate", type=float, default=6.0, help="requests a second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peers-folder", type=Path, default=_peers.CACHE, help="where peers are installed")
    args = parser.parse_args()
    if args.serve_paced:
        serve_paced(args.serve_paced)
        return
    say = Console(stderr=True, soft_wrap=True).print
    python = _peers.prepare(_peers.recipes(1)["vllm"], args.peers_folder, say)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = {
        "flyball": [sys.executable, "-m", "flyball", "serve", "--name", NAME, "--port", str(port), "--threads", "1"],
        "paced": [sys.executable, __file__, "--serve-paced", str(port)],
    }[args.server]

    def ready() -> bool:
        try:
            with urllib.request.urlopen(f"{url}/health/ready", timeout=2) as reply:
                return reply.status == 200
        except OSError:
            return False

    with tempfile.TemporaryDirectory() as folder, spawned(command, ready=ready, timeout_s=120):
        trace = Path(folder) / "trace.jsonl"
        write_trace(trace, args.requests, args.rate, args.seed)
        vocabulary = json.loads((bundled_model_path() / "config.json").read_text())["vocab_size"]
        load = HttpLoad(url=url, model=NAME, vocab_size=vocabulary, prompt_seed=time.time_ns() % 2**32, warmup=4)
        seen: dict[str, list[dict[str, float]]] = {"flyball": [], "vllm": []}
        for number in range(args.rounds):
            for who in ("flyball", "vllm") if number % 2 == 0 else ("vllm", "flyball"):
                found = (
                    ours(trace, load) if who == "flyball"
                    else theirs(url, trace, python, args.requests, Path(folder))
                )  # fmt: skip
                seen[who].append(found)
                say(f"round {number + 1}, {who}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items()))
    report(seen, args.server)


if __name__ == "__main__":
    main()
