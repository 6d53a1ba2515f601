"""How good, how quick to forget, how careful and how cheap is the online tuner, against arqonhpo and Optuna's TPE?

Four parts. *Functions*: the least regret found within 100 evaluations, median over seeds. *Drift*: (x-c)² + (y-c)² +
floor on [0,10]², 600 steps, c jumps from 2 to 8 and the floor from 0 to 1 at step 300; mean regret of the last 100
steps. *SLO*: the dynamic batching example, 200 steps, its penalty of -1000 told as the example does, direction stated;
share of violations in the last 50. *Cost*: CPU of one ask and tell at histories of 100, 1000 and 10000.

arqonhpo has wheels for CPython 3.12 only and so runs in an environment of its own, made on first use with the 3.12 that
is found (or `--arqon-python`); where there is none, the figures once measured of its version 0.3.3 are the yardstick.

    python benchmarks/online_quality.py [--seeds 10] [--parts functions,drift,slo,cost]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

ROOT = Path(__file__).parent
CACHE = Path.home() / ".cache" / "flyball" / "peers"
PUBLISHED = {  # arqonhpo 0.3.3 ask_one, medians measured by us in November 2026 with 3.12
    "sphere_4d": 0.80, "rosenbrock_2d": 0.67, "rosenbrock_4d": 11.3, "rastrigin_4d": 12.2, "branin": 0.0095,
    "sla_cliff": 0.065, "quadratic_ms": 0.0019, "drift": 71.8, "slo": 0.98,
}  # fmt: skip
Bounds = Mapping[str, tuple[float, float, str]]


class Solver(Protocol):
    """One candidate at a time."""

    def ask(self) -> dict[str, float]: ...
    def tell(self, candidate: dict[str, float], value: float) -> None: ...


def sphere(x: list[float]) -> float:
    return sum((a - 1.7) ** 2 for a in x)


def rosenbrock(x: list[float]) -> float:
    return sum(100 * (b - a * a) ** 2 + (1 - a) ** 2 for a, b in pairwise(x))


def rastrigin(x: list[float]) -> float:
    return sum(10 + (a - 1.7) ** 2 - 10 * math.cos(2 * math.pi * (a - 1.7)) for a in x)


def branin(x: list[float]) -> float:
    a, b = x
    bowl = (b - 5.1 / (4 * math.pi**2) * a * a + 5 / math.pi * a - 6) ** 2
    return bowl + 10 * (1 - 1 / (8 * math.pi)) * math.cos(a) + 10 - 0.39788735772973816


def p99_ms(batch: float, wait_ms: float) -> float:
    return 20 + 2.5 * batch + 0.6 * wait_ms


def serving_cost(batch: float, wait_ms: float) -> float:
    return 10 / (1 + math.log(1 + batch)) + 3 * math.exp(-wait_ms / 60)


def least_serving_cost() -> float:
    batches = [1 + 63 * i / 200_000 for i in range(200_001)]
    return min(serving_cost(b, min((180 - 2.5 * b) / 0.6, 500)) for b in batches if (180 - 2.5 * b) / 0.6 >= 10)


LEAST = least_serving_cost()


def cliff(x: list[float]) -> float:
    return serving_cost(*x) - LEAST + (1000 if p99_ms(*x) > 200 else 0)


def quadratic(x: list[float]) -> float:
    return ((x[0] - 1200) / 1000) ** 2 + ((x[1] - 3100) / 1000) ** 2


def _box(count: int, low: float, high: float) -> Bounds:
    return {f"x{i}": (low, high, "Linear") for i in range(count)}


SERVING: Bounds = {"batch_size": (1, 64, "Log"), "max_wait_ms": (10, 500, "Linear")}
FUNCTIONS: Mapping[str, tuple[Callable[[list[float]], float], Bounds]] = {
    "sphere_4d": (sphere, _box(4, -5, 5)),
    "rosenbrock_2d": (rosenbrock, _box(2, -2.048, 2.048)),
    "rosenbrock_4d": (rosenbrock, _box(4, -2.048, 2.048)),
    "rastrigin_4d": (rastrigin, _box(4, -5.12, 5.12)),
    "branin": (branin, {"x0": (-5, 10, "Linear"), "x1": (0, 15, "Linear")}),
    "sla_cliff": (cliff, SERVING),
    "quadratic_ms": (quadratic, _box(2, 100, 5000)),
}


class Arqon:
    """`ask_one` and `seed` of arqonhpo's API; ours or theirs, by the module they come from."""

    def __init__(self, seed: int, budget: int, bounds: Bounds, module: ModuleType, **more: object) -> None:
        box = {name: {"min": low, "max": high, "scale": scale} for name, (low, high, scale) in bounds.items()}
        self._solver = module.ArqonSolver(json.dumps({"seed": seed, "budget": budget, "bounds": box, **more}))
        self._bounds = bounds

    def ask(self) -> dict[str, float]:
        asked: dict[str, float] = self._solver.ask_one()
        return {name: asked[name] for name in self._bounds}

    def tell(self, candidate: dict[str, float], value: float) -> None:
        self._solver.seed(json.dumps([{"params": candidate, "value": value, "cost": 1.0}]))


class Tpe:
    """Optuna's default sampler."""

    def __init__(self, seed: int, budget: int, bounds: Bounds) -> None:  # noqa: ARG002
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
        self._space = {
            name: optuna.distributions.FloatDistribution(low, high, log=scale == "Log")
            for name, (low, high, scale) in bounds.items()
        }

    def ask(self) -> dict[str, float]:
        self._trial = self._study.ask(self._space)
        return dict(self._trial.params)

    def tell(self, candidate: dict[str, float], value: float) -> None:  # noqa: ARG002
        self._study.tell(self._trial, value)


def best_regret(solver: Solver, function: Callable[[list[float]], float], budget: int) -> float:
    best = math.inf
    for _ in range(budget):
        candidate = solver.ask()
        value = function(list(candidate.values()))
        best = min(best, value)
        solver.tell(candidate, value)
    return best


def drift(solver: Solver, steps: int = 600) -> list[float]:
    """Regret of each step."""
    regrets = []
    for step in range(steps):
        centre, floor = (2.0, 0.0) if step < steps // 2 else (8.0, 1.0)
        candidate = solver.ask()
        regret = sum((v - centre) ** 2 for v in candidate.values())
        regrets.append(regret)
        solver.tell(candidate, regret + floor)
    return regrets


def slo(solver: Solver, sign: float, steps: int = 200) -> tuple[float, float]:
    """Share of violations and mean cost over the last 50 steps; the reward is told with this sign."""
    violations, costs = [], []
    for _ in range(steps):
        candidate = solver.ask()
        batch, wait_ms = int(candidate["batch_size"]), candidate["max_wait_ms"]
        broken = p99_ms(batch, wait_ms) > 200
        violations.append(broken)
        costs.append(serving_cost(batch, wait_ms))
        solver.tell(candidate, sign * (-1000.0 if broken else -costs[-1]))
    return sum(violations[-50:]) / 50, statistics.mean(costs[-50:])


def ask_tell_us(solver: Solver, bounds: Bounds, history: int, samples: int = 100) -> tuple[float, float]:
    """CPU microseconds of one ask and tell once the history is so long: median and p99."""
    import random

    noise = random.Random(0)
    taken = []
    for step in range(history + samples):
        start = time.process_time_ns()
        candidate = solver.ask()
        asked = time.process_time_ns()
        unit = [(candidate[n] - low) / (high - low) for n, (low, high, _) in bounds.items()]
        value = sum((u - 0.3) ** 2 for u in unit) + noise.gauss(0, 0.01)
        again = time.process_time_ns()
        solver.tell(candidate, value)
        if step >= history:
            taken.append((asked - start + time.process_time_ns() - again) / 1e3)
    taken.sort()
    return taken[len(taken) // 2], taken[int(0.99 * (len(taken) - 1))]


def guard_us(samples: int = 20_000) -> dict[str, float]:
    """CPU microseconds of an accepted guard-and-apply with two knobs, and of a plain loop of about the same length.

    Events go to a queue in memory. The loop's p99 shows what the machine itself adds: ticks, others' cache lines.
    """
    from flyball.core.clock import SystemClock
    from flyball.core.knobs import Knob, Space
    from flyball.tuner.audit import MemoryAudit
    from flyball.tuner.guard import Guard
    from flyball.tuner.guard_limits import Limits

    space = Space((
        Knob(name="batch_size", kind="int", default=8, low=1, high=64, log=True),
        Knob(name="max_wait_ms", kind="float", default=100.0, low=10.0, high=500.0),
    ))  # fmt: skip
    limits = Limits(min_interval_s=0, updates_per_second=1e9, cumulative=1e9, flips=10**9)
    engine: dict[str, object] = {}
    guard = Guard(space, space.defaults(), apply=engine.update, limits=limits, audit=MemoryAudit(1000),
                  clock=SystemClock())  # fmt: skip
    taken = []
    for i in range(samples):
        wish = {"batch_size": 8 + i % 2, "max_wait_ms": 100.0 + i % 40}
        start = time.thread_time_ns()
        decision = guard.propose(wish)
        taken.append((time.thread_time_ns() - start) / 1e3)
        assert decision.accepted
    plain = []
    for _ in range(samples):
        start = time.thread_time_ns()
        counted = dict.fromkeys(range(7), 0)
        for i in range(330):
            counted[i % 7] = i
        plain.append((time.thread_time_ns() - start) / 1e3)
    taken.sort()
    plain.sort()
    middle, high = samples // 2, int(0.99 * samples)
    return {"p50": taken[middle], "p99": taken[high], "loop_p50": plain[middle], "loop_p99": plain[high]}


def arqon_python(given: str | None) -> str | None:
    """A CPython 3.12 with arqonhpo, made if need be; None where it cannot be had."""
    folder = CACHE / "arqonhpo"
    python = folder / "bin" / "python"
    if given:
        return given
    if not python.exists():
        found = next((p for p in _candidates() if _is_312(p)), None)
        if found is None:
            print("no CPython 3.12 was found: arqonhpo's figures are its published ones", file=sys.stderr)
            return None
        try:
            subprocess.run([found, "-m", "venv", str(folder)], check=True, capture_output=True)
            subprocess.run([str(python), "-m", "pip", "install", "-q", "arqonhpo==0.3.3"], check=True, timeout=180)
        except (subprocess.SubprocessError, OSError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            print(f"arqonhpo could not be installed ({error}): its figures are its published ones", file=sys.stderr)
            return None
    return str(python)


def _candidates() -> list[str]:
    known = [shutil.which("python3.12")]
    known += [str(p) for p in sorted(Path.home().glob(".pyenv/versions/3.12*/bin/python"))]
    return [p for p in known if p]


def _is_312(python: str) -> bool:
    asked = subprocess.run([python, "-c", "import sys; print(sys.version_info[:2] == (3, 12))"], capture_output=True,
                           text=True, check=False)  # fmt: skip
    return asked.stdout.strip() == "True"


def theirs(python: str, seeds: int, parts: list[str]) -> dict[str, Any]:
    """Run this file's own parts over the real arqonhpo, in its own environment."""
    command = [python, str(Path(__file__).resolve()), "--worker", "--seeds", str(seeds), "--parts", ",".join(parts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": ""})
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        print(f"arqonhpo's run failed: {done.stderr[-500:]}", file=sys.stderr)
        return {}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def measure(make: Callable[..., Solver], seeds: int, parts: list[str], *, sign: float, histories: list[int],
            say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:  # fmt: skip
    """Every part for one contender: values by seed, and microseconds."""
    found: dict[str, Any] = {}
    if "functions" in parts:
        for name, (function, bounds) in FUNCTIONS.items():
            found[name] = [best_regret(make(seed, 100, bounds), function, 100) for seed in range(seeds)]
            say(f"{name}: median regret {statistics.median(found[name]):.3g}")
    if "drift" in parts:
        box = {"x": (0.0, 10.0, "Linear"), "y": (0.0, 10.0, "Linear")}
        found["drift"] = [statistics.mean(drift(make(seed, 600, box))[-100:]) for seed in range(min(seeds, 5))]
        say(f"drift: {statistics.median(found['drift']):.3g}")
    if "slo" in parts:
        runs = [slo(make(seed, 200, SERVING), sign) for seed in range(seeds)]
        found["slo"], found["slo_cost"] = [v for v, _ in runs], [c for _, c in runs]
        say(f"slo: {statistics.mean(found['slo']):.3g}")
    if "cost" in parts:
        for knobs in (2, 8):
            for history in histories:
                bounds = _box(knobs, 0, 1)
                solver = make(0, history + 1000, bounds)
                found[f"us_h{history}_d{knobs}"] = ask_tell_us(solver, bounds, history)
                say(f"{knobs} knobs, history {history}: {found[f'us_h{history}_d{knobs}'][0]:.0f} µs")
    return found


def worker(seeds: int, parts: list[str]) -> None:
    """In arqonhpo's environment: its figures as one line of JSON."""
    import arqonhpo  # type: ignore[import-not-found]  # only in its own environment

    def make(seed: int, budget: int, bounds: Bounds) -> Solver:
        return Arqon(seed, budget, bounds, arqonhpo)

    print(json.dumps(measure(make, seeds, parts, sign=1.0, histories=[100, 1000])))


def main() -> None:
    """Measure, print the table, then the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--parts", default="functions,drift,slo,cost")
    parser.add_argument("--arqon-python", help="a CPython 3.12 with arqonhpo 0.3.3")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    parts = args.parts.split(",")
    if args.worker:
        worker(args.seeds, parts)
        return
    from flyball.compat import arqonhpo as ours_module

    def ours(seed: int, budget: int, bounds: Bounds) -> Solver:
        return Arqon(seed, budget, bounds, ours_module)

    def rewarded(seed: int, budget: int, bounds: Bounds) -> Solver:
        return Arqon(seed, budget, bounds, ours_module, direction="maximize")

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    mine = measure(ours, args.seeds, [p for p in parts if p != "slo"], sign=1.0, histories=[100, 1000, 10_000], say=say)
    if "slo" in parts:
        mine |= measure(rewarded, args.seeds, ["slo"], sign=1.0, histories=[], say=say)
    quality = [p for p in parts if p != "cost"]
    tpe = measure(Tpe, args.seeds, quality, sign=-1.0, histories=[], say=lambda t: say(f"tpe {t}"))
    python = arqon_python(args.arqon_python)
    other = theirs(python, args.seeds, parts) if python else {}
    report(mine, tpe, other, guard_us() if "cost" in parts else None)


def report(mine: dict[str, Any], tpe: dict[str, Any], other: dict[str, Any], guard: dict[str, float] | None) -> None:
    """The table and the JSON lines; `rival` is Optuna's TPE, arqonhpo stands beside it."""
    from rich.console import Console
    from rich.table import Table

    from _figures import figure

    table = Table(title="Online tuner, medians over seeds (lower is better)")
    for column in ("", "ours", "Optuna TPE", "arqonhpo"):
        table.add_column(column, justify="right")
    names = [n for n in (*FUNCTIONS, "drift", "slo", "slo_cost") if n in mine]
    rows = []
    for name in names:
        middle = statistics.mean if name == "slo" else statistics.median
        arqon = middle(other[name]) if name in other else PUBLISHED.get(name)
        rows.append((name, middle(mine[name]), middle(tpe[name]), arqon))
        table.add_row(name, *(("-" if v is None else f"{v:.3g}") for v in rows[-1][1:]))
    for name, (median, p99) in ((n, v) for n, v in mine.items() if n.startswith("us_")):
        arqon_us = f"{other[name][0]:.0f}" if name in other else "-"
        table.add_row(f"{name} CPU µs, p50 / p99", f"{median:.0f} / {p99:.0f}", "-", arqon_us)
    if guard:
        table.add_row("guard and apply CPU µs, p50 / p99", f"{guard['p50']:.1f} / {guard['p99']:.1f}", "-", "-")
        table.add_row("a plain loop", f"{guard['loop_p50']:.1f} / {guard['loop_p99']:.1f}", "-", "-")
    Console().print(table)
    titles = {"drift": "drift_regret_last100", "slo": "sla_violations_last50", "slo_cost": "sla_cost_last50"}
    for name, value, rival, arqon in rows:
        figure(titles.get(name, f"{name}_regret"), value, "share" if name == "slo" else "1", rival=rival,
               spread=(min(mine[name]), max(mine[name])), rival_name="optuna_tpe", arqonhpo=arqon,
               arqonhpo_measured=name in other, seeds=len(mine[name]))  # fmt: skip
    for name, (median, p99) in ((n, v) for n, v in mine.items() if n.startswith("us_")):
        theirs_us = other.get(name)
        figure(f"decision_{name}", median, "us", rival=theirs_us[0] if theirs_us else None, p50=median, p99=p99,
               rival_name="arqonhpo")  # fmt: skip
    if guard:
        figure("guard_apply_us", guard["p99"], "us", p50=guard["p50"], p99=guard["p99"], loop_p50=guard["loop_p50"],
               loop_p99=guard["loop_p99"])  # fmt: skip


if __name__ == "__main__":
    main()
