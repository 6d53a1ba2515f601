"""How many trials does a tuner need to come within 5 % of the best known, and how many of them fail?

Each tuner tries the default configuration first, then as many as the budget has. A suggestion that breaks a known
constraint is refused free of charge, up to a hundred times a trial; random search and our proposer never make one. A
configuration that fails costs a trial. Optuna's TPE is told of failures as a broken constraint, Ax as a broken outcome
constraint, Optuna's GP and HEBO, which have nothing for it at this price, as the worst value seen so far.

Runs are cached under `~/.cache/flyball/tuner_quality`, ours by the hash of the proposer's source, so that the whole can
be made in pieces: `--minutes 4` stops after that time, `--minutes 0` prints what there is.
"""

# ruff: noqa: ARG002  # tuners share a signature, of which each uses its part
from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import optuna

from _figures import figure
from _landscapes import CACHE, Config, Landscape, landscapes
from _peers import CACHE as PEERS
from _peers import Environment, PeerUnavailable
from flyball.core.knobs import Knob
from flyball.tuner.pool import Pool
from flyball.tuner.proposer import Proposer

ROOT = Path(__file__).parent.parent
BUDGETS = (10, 20, 30)
FREE_REFUSALS = 100
NEAR = 0.05  # of the best known value
OURS = ("flyball", "flyball-forest")
SOURCES = ("tuner/bayes.py", "tuner/feasibility.py", "tuner/pool.py", "tuner/proposer.py", "tuner/space.py",
           "numerics/gaussian_process.py", "numerics/expected_improvement.py")  # fmt: skip


class Tuner(Protocol):
    """A tuner on one problem."""

    def ask(self) -> Config: ...
    def tell(self, config: Config, value: float | None, worst: float) -> None: ...
    def refuse(self, config: Config, worst: float) -> None: ...


class Run(NamedTuple):
    """One tuner on one problem with one seed: values in order (None: failed), CPU seconds a suggestion."""

    values: list[float | None]
    cpu_s: float


class Ours:
    def __init__(self, problem: Landscape, seed: int, feasibility: str) -> None:
        self._proposer = Proposer(problem.lattice, seed=seed, feasibility=feasibility)
        self._proposer.ask()  # the default, which is told without being asked for

    def ask(self) -> Config:
        return self._proposer.ask()

    def tell(self, config: Config, value: float | None, worst: float) -> None:
        self._proposer.tell(config, value, failed=value is None)

    def refuse(self, config: Config, worst: float) -> None:
        raise AssertionError("our proposer broke a known constraint")


class Random:
    """Uniform over the legal points of the lattice, none twice."""

    def __init__(self, problem: Landscape, seed: int) -> None:
        self._lattice, self._pool = problem.lattice, Pool(problem.lattice)
        self._rng = np.random.default_rng(seed)
        self._taken = {self._lattice.point(self._lattice.default)}

    def ask(self) -> Config:
        free = self._pool.candidates(self._taken, self._rng)
        point = tuple(free[self._rng.integers(len(free))].tolist())
        self._taken.add(point)
        return self._lattice.values(point)

    def tell(self, config: Config, value: float | None, worst: float) -> None:
        """Learn nothing."""

    refuse = tell


class Optuna:
    def __init__(self, problem: Landscape, seed: int, sampler: str) -> None:
        self._constrained = sampler == "tpe"
        made = (optuna.samplers.TPESampler(seed=seed) if self._constrained
                else optuna.samplers.GPSampler(seed=seed, deterministic_objective=True))  # fmt: skip
        self._study = optuna.create_study(direction="maximize", sampler=made)
        self._space = {knob.name: _distribution(knob) for knob in problem.space}
        self._study.enqueue_trial(dict(problem.lattice.default))
        self._trial = self._study.ask(self._space)

    def ask(self) -> Config:
        self._trial = self._study.ask(self._space)
        return self._trial.params

    def tell(self, config: Config, value: float | None, worst: float) -> None:
        if self._constrained:
            self._trial.set_constraint("failed", 1.0 if value is None else -1.0)
        self._study.tell(self._trial, worst if value is None else value)

    def refuse(self, config: Config, worst: float) -> None:
        self.tell(config, None, worst)


def _distribution(knob: Knob) -> optuna.distributions.BaseDistribution:
    if knob.kind == "bool":
        return optuna.distributions.CategoricalDistribution((False, True))
    if knob.kind == "choice":
        return optuna.distributions.CategoricalDistribution(knob.choices)
    assert knob.low is not None
    assert knob.high is not None
    if knob.kind == "int":
        return optuna.distributions.IntDistribution(int(knob.low), int(knob.high), log=knob.log)
    return optuna.distributions.FloatDistribution(knob.low, knob.high, log=knob.log)


class Worker:
    """A tuner in an environment of its own, spoken to in JSON lines; its CPU time is its own account."""

    def __init__(self, name: str, problem: Landscape, seed: int) -> None:
        python = _environment(name).python
        self._process = subprocess.Popen(
            [str(python), str(Path(__file__).parent / "peers" / f"{name}_worker.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        knobs = [{"name": k.name, "kind": k.kind, "low": k.low, "high": k.high, "log": k.log, "choices": k.choices,
                  "default": k.default} for k in problem.space]  # fmt: skip
        self._say({"knobs": knobs, "seed": seed})
        self.cpu_s = 0.0

    def _say(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(message), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise PeerUnavailable("its worker ended; run it by hand to see why")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self) -> Config:
        answer = self._say({"ask": True})
        self.cpu_s += answer["cpu_s"]
        values: Config = answer["values"]
        return values

    def tell(self, config: Config, value: float | None, worst: float) -> None:
        self._say({"tell": dict(config), "value": worst if value is None else value, "failed": value is None})

    def refuse(self, config: Config, worst: float) -> None:
        self.tell(config, None, worst)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


INSTALL = {"ax": ("ax-platform",), "hebo": ("hebo==0.3.6", "numpy<2", "gpy>=1.13")}  # older gpy has no wheel


def _environment(name: str) -> Environment:
    env = Environment(folder=PEERS / name, say=lambda text: print(text, file=sys.stderr, flush=True))
    done = env.folder / f".{name}-installed"
    if not done.exists():
        if not env.python.exists():
            env.step(sys.executable, "-m", "venv", env.folder)
            env.pip("torch", "uv")
        env.uv(*INSTALL[name])
        done.touch()
    return env


METHODS: dict[str, Callable[[Landscape, int], Tuner]] = {
    "flyball": lambda p, s: Ours(p, s, "gp"),
    "flyball-forest": lambda p, s: Ours(p, s, "forest"),
    "random": Random,
    "tpe": lambda p, s: Optuna(p, s, "tpe"),
    "optuna-gp": lambda p, s: Optuna(p, s, "gp"),
    "ax": lambda p, s: Worker("ax", p, s),
    "hebo": lambda p, s: Worker("hebo", p, s),
}


def tune(problem: Landscape, method: str, seed: int, budget: int) -> Run:
    """The default, then the tuner's choice."""
    np.random.seed(seed)  # noqa: NPY002  # for rivals that draw from the global generator
    tuner = METHODS[method](problem, seed)
    default = dict(problem.lattice.default)
    values: list[float | None] = [problem.value(default)]
    cpu_s = 0.0
    try:
        tuner.tell(default, values[0], 0.0)
        while len(values) < budget:
            worst = min((v for v in values if v is not None), default=0.0)
            for _ in range(FREE_REFUSALS):
                began = time.process_time()
                config = tuner.ask()
                cpu_s += time.process_time() - began
                if problem.legal(config):
                    break
                tuner.refuse(config, worst)
            value = problem.value(config) if problem.legal(config) else None
            values.append(value)
            tuner.tell(config, value, worst)
    finally:
        if isinstance(tuner, Worker):
            cpu_s += tuner.cpu_s
            tuner.close()
    return Run(values, cpu_s / (budget - 1))


class Store:
    """Finished runs, by problem, method and seed."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        digest = hashlib.blake2b(digest_size=4)
        for source in SOURCES:
            digest.update((ROOT / "src" / "flyball" / source).read_bytes())
        self._version = digest.hexdigest()
        CACHE.mkdir(parents=True, exist_ok=True)

    def _file(self, problem: str, method: str) -> Path:
        tag = f"-{self._version}" if method in OURS else ""
        return CACHE / f"{problem}-{method}{tag}-{self._budget}.jsonl"

    def runs(self, problem: str, method: str) -> dict[int, Run]:
        with suppress(FileNotFoundError):
            lines = [json.loads(line) for line in self._file(problem, method).read_text().splitlines()]
            return {line["seed"]: Run(line["values"], line["cpu_s"]) for line in lines}
        return {}

    def add(self, problem: str, method: str, seed: int, run: Run) -> None:
        with self._file(problem, method).open("a") as file:
            file.write(json.dumps({"seed": seed, **run._asdict()}) + "\n")


class Result(NamedTuple):
    """A tuner on a problem, over its seeds."""

    problem: Landscape
    method: str
    seeds: int
    regret: dict[int, float]  # by budget, median, share of the best known
    trials: float  # median trials to within 5 %; infinite if more than half of the runs did not get there
    mean_trials: float  # mean, a run that did not get there counted as one more than the budget
    reached: float  # share of runs that got there
    invalid: float  # share of failed trials, of trials 11 to the last
    cpu_s: float


def wall_s(problem: Landscape, workers: int, seed: int, budget: int) -> float:
    """Virtual seconds until a trial within 5 % of the best known ends, with so many engines at once; none: infinite.

    A trial takes a minute, give or take a third; one that fails, a quarter of that. Nothing waits for its neighbours.
    """
    rng = np.random.default_rng([seed, workers])
    goal = problem.best_known() * (1 - NEAR)
    proposer = Proposer(problem.lattice, seed=seed)
    running: list[tuple[float, int, Config]] = []
    now, asked = 0.0, 0
    while asked < budget or running:
        while len(running) < workers and asked < budget:
            config = proposer.ask()
            lasts = rng.uniform(40, 80) * (0.25 if problem.value(config) is None else 1.0)
            heapq.heappush(running, (now + lasts, asked, config))
            asked += 1
        now, _, config = heapq.heappop(running)
        value = problem.value(config)
        if value is not None and value >= goal:
            return now
        proposer.tell(config, value, failed=value is None)
    return math.inf


def parallel(problems: Sequence[Landscape], seeds: int, workers: int = 4, budget: int = 60) -> None:
    """How much of one engine's wall time several need on the simulated landscapes, for the same result."""
    shares = []
    for problem in problems:
        if problem.group != "simulated":
            continue
        one, many = ([wall_s(problem, q, seed, budget) for seed in range(seeds)] for q in (1, workers))
        shares.append(statistics.median(many) / statistics.median(one))
        print(f"{problem.name:17} to within 5 %: {statistics.median(one):6.0f} s with one engine, "
              f"{statistics.median(many):6.0f} s with {workers}: {shares[-1]:.2f}")  # fmt: skip
    unit = f"wall time with {workers} engines over with one"
    figure("parallel_share", statistics.median(shares), unit, problems=len(shares))


def judge(problem: Landscape, method: str, runs: Sequence[Run], budget: int) -> Result:
    best = problem.best_known()
    goal = best - NEAR * abs(best)
    needed, late, regrets = [], [], {b: [] for b in BUDGETS if b <= budget}
    for run in runs:
        seen = [-math.inf if v is None else v for v in run.values]
        needed.append(next((i + 1 for i, v in enumerate(seen) if v >= goal), math.inf))
        late += [v is None for v in run.values[10:]]
        for b, into in regrets.items():
            top = max(seen[:b])
            into.append(min(max(best - top, 0.0) / abs(best), 1.0))
    return Result(
        problem=problem, method=method, seeds=len(runs), regret={b: statistics.median(r) for b, r in regrets.items()},
        trials=statistics.median(needed), mean_trials=statistics.fmean(min(n, budget + 1) for n in needed),
        reached=statistics.fmean(n < math.inf for n in needed), invalid=statistics.fmean(late) if late else 0.0,
        cpu_s=statistics.fmean(r.cpu_s for r in runs),
    )  # fmt: skip


def pending(
    problems: Sequence[Landscape], methods: Sequence[str], seeds: int, store: Store
) -> Iterator[tuple[Landscape, str, int]]:
    """Runs that are missing, a seed of everything before the next seed."""
    have = {(p.name, m): store.runs(p.name, m) for p in problems for m in methods}
    for seed in range(seeds):
        for method in methods:
            for problem in problems:
                if seed not in have[problem.name, method]:
                    yield problem, method, seed


def table(results: Sequence[Result], budget: int) -> None:
    """Every problem and method, losses included."""
    shown = [b for b in BUDGETS if b <= budget]
    print(f"{'problem':17} {'method':15} {'seeds':>5} {'trials to 5 %':>13} {'mean':>5} {'reached':>7} "
          + " ".join(f"{f'regret@{b}':>9}" for b in shown) + f" {'invalid':>7} {'s/ask':>6}")  # fmt: skip
    for r in results:
        print(f"{r.problem.name + ('*' if r.problem.held_out else ''):17} {r.method:15} {r.seeds:5} "
              f"{f'{r.trials:g}' if r.trials < math.inf else f'>{budget}':>13} {r.mean_trials:5.1f} {r.reached:7.0%} "
              + " ".join(f"{r.regret[b]:9.3f}" for b in shown) + f" {r.invalid:7.1%} {r.cpu_s:6.3f}")  # fmt: skip
    print("* held out: not looked at while the proposer was made")


def figures(results: Sequence[Result]) -> None:
    """One line a problem and method, then what the tuner is judged by."""
    for r in results:
        figure(
            "tuner", r.mean_trials, "trials to within 5 %, mean", problem=r.problem.name, method=r.method,
            held_out=r.problem.held_out, seeds=r.seeds, median_trials=r.trials if r.trials < math.inf else None,
            reached=r.reached, median_regret=r.regret, invalid=r.invalid, cpu_s=r.cpu_s,
        )  # fmt: skip
    by = {(r.problem.name, r.method): r for r in results}
    names = list(dict.fromkeys(r.problem.name for r in results))
    complete = [n for n in names if (n, "flyball") in by and sum(name == n for name, _ in by) > 1]
    wins = [n for n in complete if all(_rank(by[n, "flyball"]) <= _rank(r) for (name, m), r in by.items()
                                       if name == n and m not in OURS)]  # fmt: skip
    if complete:
        figure("wins_share", len(wins) / len(complete), "share of problems", problems=len(complete), won=wins)
    both = [n for n in complete if (n, "random") in by]
    ours, theirs = (sum(by[n, m].invalid for n in both) for m in ("flyball", "random"))
    if theirs:
        figure("invalid_ratio", ours / theirs, "our invalid share over random's, trials 11 to 30", problems=len(both))


def _rank(result: Result) -> tuple[float, float]:
    """Fewest median trials; where no method's median run gets there, the smaller median regret at the end."""
    last = max(result.regret)
    return (result.trials, result.regret[last] if result.trials == math.inf else 0.0)


def main() -> None:
    """Make the missing runs as far as the time goes, then print everything there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(m for m in METHODS if m != "flyball-forest"))
    parser.add_argument("--problems", default="", help="names, separated by commas; default: all")
    parser.add_argument("--dev", action="store_true", help="leave the held-out problems out")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--budget", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop making runs after this time")
    parser.add_argument("--parallel", action="store_true", help="four engines against one as well, in virtual time")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    wanted = set(filter(None, arguments.problems.split(",")))
    problems = [p for p in landscapes() if (not wanted or p.name in wanted) and not (arguments.dev and p.held_out)]
    methods = arguments.methods.split(",")
    store = Store(arguments.budget)
    ends = time.monotonic() + 60 * arguments.minutes
    absent: dict[str, str] = {}
    todo = list(pending(problems, methods, arguments.seeds, store))
    for done, (problem, method, seed) in enumerate(todo):
        if time.monotonic() > ends:
            print(f"stopped with {len(todo) - done} of {len(todo)} runs to do", file=sys.stderr)
            break
        if method in absent:
            continue
        try:
            store.add(problem.name, method, seed, tune(problem, method, seed, arguments.budget))
        except PeerUnavailable as error:
            absent[method] = str(error)
        print(f"\r{done + 1}/{len(todo)} {problem.name} {method} {seed}      ", end="", file=sys.stderr, flush=True)
    for method, why in absent.items():
        print(f"{method} is left out: {why}")
    results = []
    for problem in problems:
        for method in methods:
            runs = [r for s, r in store.runs(problem.name, method).items() if s < arguments.seeds]
            if runs:
                results.append(judge(problem, method, runs, arguments.budget))
    table(results, arguments.budget)
    if arguments.parallel:
        parallel(problems, arguments.seeds)
    figures(results)


if __name__ == "__main__":
    main()
