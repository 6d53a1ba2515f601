"""Does `flyball hold` keep more promises than the default, and than the best fixed configuration, when traffic shifts?

The real engine serves the bundled model. Traffic is the Azure conversation trace and, from the middle on, the code
trace (lengths scaled, Poisson arrivals). The SLO is set from the default's own p95s on conversation traffic. Some fixed
configurations are measured on conversation traffic (the offline search), the best of them is kept; then default, best
fixed and `hold`, which starts from the best fixed, replay the same traffic one after the other on the same server. Two
answers: SLO attainment and goodput as clients saw them, and the longest breach after a move that `hold` took back.

    python benchmarks/online_engine.py [--short] [--half-s 120] [--out flyball-online]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from rich.console import Console
from rich.table import Table

from _figures import figure
from flyball.adapters.audit_files import AuditFile
from flyball.adapters.engines.flyball_http import FlyballTarget
from flyball.adapters.engines.process import free_port, spawned
from flyball.adapters.hold_windows import ServerWindows
from flyball.adapters.loadgen import HttpLoad
from flyball.adapters.server_facts import ServerFacts, ask_server
from flyball.adapters.traces import Lengths, poisson, read_trace, trace_path
from flyball.core.clock import SystemClock
from flyball.core.knobs import Space, Value
from flyball.core.metrics import MetricsWindow, RequestTrace, percentile
from flyball.core.slo import Slo, SloBound
from flyball.core.workload import Workload
from flyball.tuner.enough import Enough
from flyball.tuner.guard import Guard
from flyball.tuner.guard_limits import Limits
from flyball.tuner.hold import Holder
from flyball.tuner.hold_reading import judge
from flyball.tuner.objective import Objective
from flyball.tuner.online.tuner import OnlineTuner

HELD = {"max_num_batched_tokens": (32, 2048), "max_num_seqs": (2, 64)}
FIXED: tuple[Mapping[str, Value], ...] = tuple(
    {"max_num_batched_tokens": tokens, "max_num_seqs": seqs} for tokens in (64, 128, 512) for seqs in (8, 32)
)
WINDOW_S, SETTLE_S = 4.0, 0.5
WIDTH, HEIGHT = 1000, 220  # of a panel of the picture
COLOURS = ("#999999", "#2f6db3", "#d1592b")


class Arm(NamedTuple):
    """One contender's run."""

    window: MetricsWindow
    moves: list[dict[str, Any]]  # decisions of `hold`, with seconds from the start
    longest_breach_s: float | None


def traffic(trace: str, rate_rps: float, seconds: float, scale: float, seed: int, limit: int) -> Workload:
    lengths = Lengths(scale=scale, max_input=limit * 3 // 4, max_output=limit // 4)
    return poisson(read_trace(trace_path(trace)), name=trace, rate_rps=rate_rps, seed=seed, duration_s=seconds,
                   lengths=lengths)  # fmt: skip


def joined(first: Workload, second: Workload, at_s: float) -> Workload:
    late = tuple(replace(r, arrival_s=r.arrival_s + at_s) for r in second.requests)
    return Workload(requests=(*first.requests, *late), source=f"{first.source}; then {second.source}")


class Bench:
    """One server, one load."""

    def __init__(self, url: str, facts: ServerFacts, seed: int) -> None:
        self.url, self.clock = url, SystemClock()
        self.target = FlyballTarget(url)
        self.load = HttpLoad(url=facts.url, model=facts.model, vocab_size=facts.vocab_size, prompt_seed=seed,
                             timeout_s=60.0)  # fmt: skip
        self.default = dict(self.target.configuration())

    def fixed(self, values: Mapping[str, Value], workload: Workload, slo: Slo) -> MetricsWindow:
        self.target.apply({**self.default, **values})
        return self.load.run(workload, slo, "")

    def held(self, start: Mapping[str, Value], workload: Workload, bounds: tuple[SloBound, ...], audit: Path) -> Arm:
        """Replay under `hold`, which runs in a thread of its own."""
        self.target.apply({**self.default, **start})
        space = Space(tuple(
            replace(self.target.space()[n], low=low, high=high, default=start[n]) for n, (low, high) in HELD.items()
        ))  # fmt: skip
        windows = ServerWindows(self.url, self.clock)
        log = AuditFile(audit)
        limits = Limits(max_step=0.2, cumulative=2.0, flips=20, stable_s=3 * WINDOW_S, stable_windows=2,
                        rollbacks_per_hour=1000, breaches=1000, cooldown_s=WINDOW_S)  # fmt: skip
        guard = Guard(space, dict(start), apply=self.target.apply, limits=limits, audit=log, clock=self.clock)
        tuner = OnlineTuner(space, direction="maximize", constraints=[str(b) for b in bounds], start=dict(start),
                            relations=[lambda v: v["max_num_seqs"] <= v["max_num_batched_tokens"]])  # fmt: skip
        objective = Objective.parse("attainment")
        holder = Holder(tuner=tuner, guard=guard, judge=lambda r: judge(r, objective, bounds), clock=self.clock,
                        generation=windows.generation, settle_s=SETTLE_S,
                        enough=Enough(explore_every=0))  # fmt: skip
        over, moves = threading.Event(), []
        begun_s = self.clock.now_s()

        def loop() -> None:
            over.wait(SETTLE_S)
            windows.skip()
            while not over.wait(WINDOW_S):
                decision = holder.step(windows.read())
                moves.append(decision.describe() | {"at_s": self.clock.now_s() - begun_s})
                if decision.action in ("apply", "rollback"):
                    over.wait(SETTLE_S)
                    windows.skip()

        thread = threading.Thread(target=loop, daemon=True)
        thread.start()
        try:
            window = self.load.run(workload, Slo.from_bounds(bounds), "")
        finally:
            over.set()
            thread.join()
            windows.close()
            log.close()
        return Arm(window, moves, _longest_breach(moves))


def _longest_breach(moves: list[dict[str, Any]]) -> float:
    """Longest time from a change that broke a promise until it was taken back."""
    longest, changed_s = 0.0, None
    for move in moves:
        if move["action"] == "rollback" and changed_s is not None:
            longest = max(longest, move["at_s"] - changed_s)
        if move["action"] in ("apply", "rollback"):
            changed_s = move["at_s"] if move["action"] == "apply" else None
    return longest


def slices(window: MetricsWindow, length_s: float) -> list[tuple[float, list[RequestTrace]]]:
    end = max(t.scheduled_s for t in window.traces)
    count = int(end / length_s) + 1
    return [
        (i * length_s, [t for t in window.traces if i * length_s <= t.scheduled_s < (i + 1) * length_s])
        for i in range(count)
    ]


def attainment(traces: list[RequestTrace], slo: Slo) -> float:
    return sum(t.meets(slo) for t in traces) / max(len(traces), 1)


def picture(arms: Mapping[str, Arm], slo: Slo, bounds: tuple[SloBound, ...], half_s: float, path: Path) -> None:
    """Attainment and both latencies over time, and the knobs that `hold` set, as one SVG file."""
    step = max(half_s / 24, 2.5)
    shares, ttfts, itls = {}, {}, {}
    for name, arm in arms.items():
        parts = slices(arm.window, step)
        shares[name] = [(at + step / 2, attainment(p, slo)) for at, p in parts if p]
        ttfts[name] = [(at + step / 2, 1e3 * percentile([t.ttft_s for t in p if t.ttft_s is not None], 95))
                       for at, p in parts if p]  # fmt: skip
        itls[name] = [(at + step / 2, 1e3 * percentile([g for t in p for g in t.itl_s], 95)) for at, p in parts if p]
    knobs = {n: [(m["at_s"], float(m["values"][n])) for m in arms["hold"].moves] for n in HELD}
    limits = [bound.limit_s * 1e3 for bound in bounds]
    panels = [
        _panel("share of requests within the SLO", shares, half_s, 0, None, COLOURS),
        _panel("p95 TTFT, ms (dashed: promised)", ttfts, half_s, 1, limits[0], COLOURS),
        _panel("p95 ITL, ms (dashed: promised)", itls, half_s, 2, limits[1], COLOURS),
        _panel("knobs that hold set, log2", {n: [(x, math.log2(y)) for x, y in v] for n, v in knobs.items()}, half_s, 3,
               None, ("#7a5195", "#ef5675")),
    ]  # fmt: skip
    style = "font:12px sans-serif"
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{4 * HEIGHT + 30}" '
                    f'style="background:white;{style}">{"".join(panels)}'
                    f'<text x="{WIDTH / 2}" y="{4 * HEIGHT + 20}" text-anchor="middle">seconds; conversation until '
                    f'{half_s:g} s, then code</text></svg>\n')  # fmt: skip


def _panel(
    title: str, lines: Mapping[str, list[tuple[float, float]]], half_s: float, row: int, limit: float | None,
    colours: tuple[str, ...],
) -> str:  # fmt: skip
    values = [y for line in lines.values() for _, y in line if math.isfinite(y)] + ([limit] if limit else [])
    top, low = max([*values, 1e-9]) * 1.05, min([*values, 0.0])
    y0 = row * HEIGHT + 24

    def x(at: float) -> float:
        return 60 + (WIDTH - 80) * at / (2 * half_s)

    def y(value: float) -> float:
        return y0 + (HEIGHT - 40) * (1 - (value - low) / (top - low))

    drawn = [f'<text x="60" y="{y0 - 8}">{title}</text>']
    drawn += [
        f'<line x1="60" x2="{WIDTH - 20}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>'
        f'<text x="54" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        for value in (low, (low + top) / 2, top)
    ]
    drawn.append(f'<line x1="{x(half_s):.1f}" x2="{x(half_s):.1f}" y1="{y0}" y2="{y(low):.1f}" stroke="#888" '
                 'stroke-dasharray="2 3"/>')  # fmt: skip
    if limit:
        drawn.append(f'<line x1="60" x2="{WIDTH - 20}" y1="{y(limit):.1f}" y2="{y(limit):.1f}" stroke="black" '
                     'stroke-dasharray="6 4"/>')  # fmt: skip
    for i, (name, line) in enumerate(lines.items()):
        points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line if math.isfinite(b))
        drawn.append(f'<polyline points="{points}" fill="none" stroke="{colours[i]}" stroke-width="2"/>'
                     f'<text x="{300 + 170 * i}" y="{y0 - 8}" fill="{colours[i]}">{name}</text>')  # fmt: skip
    return "".join(drawn)


def main() -> None:
    """Serve, search, replay thrice, print and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--short", action="store_true", help="three to four minutes in all")
    parser.add_argument("--half-s", type=float, default=120.0, help="seconds of each traffic")
    parser.add_argument("--rate", type=float, default=3.0)
    parser.add_argument("--code-rate", type=float, default=2.0)
    parser.add_argument("--scale", type=float, default=0.12, help="of the traces' lengths")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("flyball-online"))
    args = parser.parse_args()
    half_s = 20.0 if args.short else args.half_s
    search_s = 4.0 if args.short else 15.0
    args.out.mkdir(parents=True, exist_ok=True)
    say = Console(stderr=True, soft_wrap=True).print
    url = f"http://127.0.0.1:{free_port()}"
    command = [
        sys.executable,
        "-m",
        "flyball",
        "serve",
        "--port",
        url.rsplit(":", 1)[1],
        "--threads",
        str(args.threads),
    ]

    def ready() -> bool:
        try:
            return httpx.get(f"{url}/health/ready", trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    with spawned(command, ready=ready, timeout_s=120.0):
        facts = ask_server(url)
        limit = facts.max_model_len or 1024
        bench = Bench(url, facts, args.seed)
        chat = traffic("azure-conv", args.rate, half_s, args.scale, args.seed, limit)
        code = traffic("azure-code", args.code_rate, half_s, args.scale, args.seed + 1, limit)
        probe = traffic("azure-conv", args.rate, search_s, args.scale, args.seed + 2, limit)
        bench.fixed({}, probe, Slo())  # warm
        seen = bench.fixed({}, probe, Slo())
        bounds = (
            SloBound(metric="ttft", percentile=95.0, limit_s=max(2.0 * seen.summary("ttft").p95, 0.25)),
            SloBound(metric="itl", percentile=95.0, limit_s=max(1.5 * seen.summary("itl").p95, 0.02)),
        )
        slo = Slo.from_bounds(bounds)
        say(f"SLO from the default on conversation traffic: {', '.join(map(str, bounds))}")
        start = {n: bench.default[n] for n in HELD}
        tried = {json.dumps(v): bench.fixed(v, probe, slo) for v in (start, *FIXED)}
        for text, window in tried.items():
            say(f"offline: {text} attainment {window.attainment:.2f}, goodput {window.goodput_rps:.2f}/s")
        best: dict[str, Value] = json.loads(max(tried, key=lambda text: tried[text].goodput_rps))
        both = joined(chat, code, half_s)
        arms = {
            "default": Arm(bench.fixed({}, both, slo), [], None),
            "best fixed": Arm(bench.fixed(best, both, slo), [], None),
            "hold": bench.held(best, both, bounds, args.out / "audit.jsonl"),
        }
        bench.target.stop()
    report(arms, slo, bounds, half_s, best, args.out)


def report(
    arms: Mapping[str, Arm], slo: Slo, bounds: tuple[SloBound, ...], half_s: float, best: Mapping[str, Value], out: Path
) -> None:
    """Table, picture, figures."""
    table = Table(title=f"SLO {', '.join(map(str, bounds))}; best fixed {dict(best)}")
    for column in ("", "attainment", "conversation", "code", "goodput /s"):
        table.add_column(column, justify="right")
    for name, arm in arms.items():
        chat = [t for t in arm.window.traces if t.scheduled_s < half_s]
        code = [t for t in arm.window.traces if t.scheduled_s >= half_s]
        table.add_row(name, f"{arm.window.attainment:.3f}", f"{attainment(chat, slo):.3f}",
                      f"{attainment(code, slo):.3f}", f"{arm.window.goodput_rps:.2f}")  # fmt: skip
    Console().print(table)
    picture(arms, slo, bounds, half_s, out / "timeline.svg")
    (out / "decisions.json").write_text(json.dumps(arms["hold"].moves, indent=1) + "\n")
    print(f"time line: {out / 'timeline.svg'}; decisions: {out / 'decisions.json'}; audit: {out / 'audit.jsonl'}")
    held = arms["hold"].window
    for rival in ("default", "best fixed"):
        name = rival.replace(" ", "_")
        other = arms[rival].window
        figure(f"hold_attainment_vs_{name}", held.attainment, "share", rival=other.attainment, rival_name=rival)
        figure(f"hold_goodput_vs_{name}", held.goodput_rps, "requests/s", rival=other.goodput_rps, rival_name=rival)
    allowed_s = 2 * (WINDOW_S + SETTLE_S)
    figure("hold_longest_breach_s", arms["hold"].longest_breach_s or 0.0, "s", allowed=allowed_s,
           moves=sum(m["action"] == "apply" for m in arms["hold"].moves),
           rollbacks=sum(m["action"] == "rollback" for m in arms["hold"].moves))  # fmt: skip


if __name__ == "__main__":
    main()
