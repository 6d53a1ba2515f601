"""Problems for tuners: knobs, known constraints, and what a configuration is worth, or that it fails.

analytic    functions of the literature, bent into mixed spaces and into rates (100 at best), with regions that fail
serving     a formula of a serving engine with nine knobs, three known constraints and too little memory for some
simulated   goodput or latency of the engine in `tests/helpers`, over a grid, with an out-of-memory corner

Half of each are held out: the proposer was developed on the others alone.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from flyball.core.knobs import Knob, Space, Value
from flyball.tuner.pool import Pool
from flyball.tuner.space import Lattice

sys.path.append(str(Path(__file__).parent.parent / "tests"))

CACHE = Path.home() / ".cache" / "flyball" / "tuner_quality"
Config = Mapping[str, Value]


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """A problem; `value` gives what a legal configuration is worth (larger is better), None if it fails."""

    name: str
    group: str
    space: Space
    constraints: tuple[str, ...]
    value: Callable[[Config], float | None]
    held_out: bool = False

    @property
    def lattice(self) -> Lattice:
        return Lattice.of(self.space, constraints=self.constraints)

    def legal(self, config: Config) -> bool:
        return self.lattice.broken(config) is None

    @cache  # noqa: B019  # a handful of problems live as long as the process
    def best_known(self) -> float:
        """The largest value that 40 000 random points and climbing from the 20 best of them found, on the lattice."""
        file = CACHE / f"best-{self.name}.json"
        if file.exists():
            return float(json.loads(file.read_text()))
        pool = Pool(self.lattice)
        rng = np.random.default_rng(12345)
        points = pool.listed if pool.listed is not None else np.vstack([pool.candidates((), rng) for _ in range(20)])
        scored = {tuple(p): self._at(p) for p in map(tuple, points.tolist())}
        if pool.listed is None:
            for start in sorted(scored, key=scored.__getitem__)[-20:]:
                here = start
                while True:
                    near = [tuple(p) for p in pool.around(np.array([here])).tolist()]
                    scored |= {p: self._at(p) for p in near if p not in scored}
                    top = max(near, key=scored.__getitem__)
                    if scored[top] <= scored[here]:
                        break
                    here = top
        CACHE.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(max(scored.values())))
        return max(scored.values())

    def _at(self, point: tuple[int, ...]) -> float:
        value = self.value(self.lattice.values(point))
        return -math.inf if value is None else value


def _real(name: str, low: float, high: float, default: float, *, log: bool = False) -> Knob:
    return Knob(name=name, kind="float", low=low, high=high, default=default, log=log)


def _whole(name: str, low: int, high: int, default: int, *, log: bool = True) -> Knob:
    return Knob(name=name, kind="int", low=low, high=high, default=default, log=log)


def _switch(name: str, default: bool) -> Knob:
    return Knob(name=name, kind="bool", default=default)


def _choice(name: str, *choices: str) -> Knob:
    return Knob(name=name, kind="choice", choices=choices, default=choices[0])


# analytic


def _branin(c: Config) -> float | None:
    x, y = float(c["x"]), float(c["y"])
    if (x - 3) ** 2 + (y - 9) ** 2 < 14:
        return None
    f = (y - 5.1 / (4 * math.pi**2) * x**2 + 5 / math.pi * x - 6) ** 2 + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10
    f += {"plain": 0.0, "steep": 4.0, "flat": 9.0}[str(c["form"])]
    return 100 / (1 + (f - 0.397887) / 15)


HARTMANN_A = np.array([[10, 3, 17, 3.5, 1.7, 8], [0.05, 10, 17, 0.1, 8, 14], [3, 3.5, 1.7, 10, 17, 8],
                       [17, 8, 0.05, 10, 0.1, 14]])  # fmt: skip
HARTMANN_P = 1e-4 * np.array([[1312, 1696, 5569, 124, 8283, 5886], [2329, 4135, 8307, 3736, 1004, 9991],
                              [2348, 1451, 3522, 2883, 3047, 6650], [4047, 8828, 8732, 5743, 1091, 381]])  # fmt: skip


def _hartmann(c: Config) -> float | None:
    x = np.array([float(c[f"x{i}"]) for i in range(6)])
    if x[3] > 0.7 or x[0] + x[5] > 1.5:
        return None
    heights = np.array([1.0, 1.2, 3.0, 3.2])
    return float(100 * (heights @ np.exp(-(HARTMANN_A * (x - HARTMANN_P) ** 2).sum(axis=1))) / 3.32237)


def _valley(c: Config) -> float | None:
    """Rosenbrock's valley over logarithms, and a choice that shifts it."""
    a, b = math.log10(float(c["rate"])) + 3, math.log2(int(c["width"])) / 2 - 2
    shift = {"red": 0.0, "green": 0.5, "blue": -0.5}[str(c["kind"])]
    if float(c["drop"]) > 0.6 and int(c["width"]) > 64:
        return None
    f = 5 * (b - a**2 / 2 - shift) ** 2 + (a - 1) ** 2 + 8 * (float(c["drop"]) - 0.2) ** 2
    f += 0.5 * (not c["warm"]) + abs(shift)
    return 100 / (1 + f)


def _mixed(c: Config) -> float | None:
    """Eight knobs, two of which matter little, with interactions between choices and numbers."""
    threads, chunk = math.log2(int(c["threads"])), math.log2(int(c["chunk"]))
    fast = {"auto": 0.0, "flash": 1.0, "eager": -1.5, "paged": 0.6}[str(c["backend"])]
    if chunk + threads > 14.5 or (c["fuse"] and c["backend"] == "eager"):
        return None
    f = (threads - 3 - (0.8 if c["pin"] else 0)) ** 2 / 3 + (chunk - 8 - fast) ** 2 / 6 + (1.2 - fast) ** 2
    f += 0.6 * (float(c["ratio"]) - 0.35 - 0.1 * fast) ** 2 * 10 + 0.8 * (not c["fuse"]) + 0.02 * int(c["retries"])
    f += 0.1 * abs(float(c["alpha"]) - 0.5)
    return 100 / (1 + 0.5 * f)


# serving


def _serving(c: Config, *, memory_gb: float, rate: float, long: bool) -> float | None:
    """Requests/s within a latency promise of a made-up engine on four devices; None when it has too little memory."""
    tp, seqs, tokens = int(c["tensor_parallel"]), int(c["max_num_seqs"]), int(c["max_num_batched_tokens"])
    share, block = float(c["memory_share"]), int(c["block_size"])
    cached, chunked, graphs = bool(c["prefix_caching"]), bool(c["chunked_prefill"]), bool(c["graphs"])
    kv8 = c["kv_dtype"] == "fp8"
    weights_gb, prompt, answer = 16.0 / tp, 3000 if long else 700, 250
    activations_gb = tokens * 2.2e-4 / tp + (1.5 if graphs else 0.0) + 0.004 * seqs
    free_gb = memory_gb * share - weights_gb - activations_gb
    if free_gb < 1.2 or memory_gb * (1 - share) < 0.35 + 0.002 * seqs:
        return None
    kv_tokens = free_gb * tp * (1.9 if kv8 else 1.0) * 7000
    batch = min(seqs, kv_tokens / ((prompt + answer) * (0.7 if cached else 1.0)) * (1 - block / 400), 400)
    step_s = 0.006 + 0.05 / tp**0.8 * (0.25 + 0.75 * min(1, batch / 200)) * (0.8 if graphs and batch < 160 else 1.0)
    step_s += 0.0016 * (tp - 1) + (0.001 if kv8 else 0.0) + 0.0012 * math.log2(32 / block + 1)
    prefill_rate = tp**0.75 * 9000 * tokens / (tokens + 900) * (0.9 if kv8 else 1.0)
    prompt_s = prompt * (0.62 if cached else 1.0) / prefill_rate
    stall = 0.0 if chunked else 0.2 * prompt_s * min(batch, 20) / 10
    chunk_s = min(tokens, prompt * 8) / prefill_rate * (0.3 if chunked else 0.0)
    itl_s = step_s + stall + chunk_s
    capacity = 1 / (prompt_s + answer * itl_s / max(batch, 1))
    load = rate / capacity
    ttft_s = prompt_s * (1 + 3 * min(load, 1.6) ** 3) + (0.4 * tokens / 65536)
    good = 1 / (1 + (ttft_s / 1.5) ** 2) / (1 + (itl_s / 0.09) ** 2)
    return min(rate, capacity) * good


def _serving_space() -> Space:
    return Space((
        _whole("tensor_parallel", 1, 4, 1),
        _whole("max_num_seqs", 8, 2048, 256),
        _whole("max_num_batched_tokens", 256, 32768, 8192),
        _real("memory_share", 0.5, 0.98, 0.9),
        _whole("block_size", 8, 128, 16),
        _switch("prefix_caching", False),
        _switch("chunked_prefill", True),
        _switch("graphs", True),
        _choice("kv_dtype", "auto", "fp8"),
    ))  # fmt: skip


SERVING_RULES = ("max_num_batched_tokens >= max_num_seqs", "chunked_prefill or max_num_batched_tokens >= 4096",
                 "not graphs or max_num_seqs <= 1024")  # fmt: skip


# simulated


@cache
def _simulated(kind: str) -> dict[str, float | None]:
    """Every configuration of the simulated engine, measured once and kept in the cache."""
    from flyball.core.slo import Slo
    from helpers.simulated_engine import CONSTRAINTS, KNOBS, SimulatedEngine, poisson

    file = CACHE / f"simulated-{kind}.json"
    if file.exists():
        return dict(json.loads(file.read_text()))
    engines = {
        "chat": (SimulatedEngine(), poisson(rate_rps=16, count=60), Slo(ttft_s=1.0, itl_s=0.06)),
        "long": (SimulatedEngine(token_s=0.00008, seq_s=0.00005), poisson(rate_rps=5, count=50, inputs=1200),
                 Slo(ttft_s=2.0, itl_s=0.09)),
        "burst": (SimulatedEngine(base_s=0.002, seq_s=0.0002), poisson(rate_rps=60, count=80, inputs=60, outputs=20),
                  Slo(ttft_s=0.5, itl_s=0.03)),
        "late": (SimulatedEngine(seq_s=0.00015), poisson(rate_rps=12, count=60), Slo()),
    }  # fmt: skip
    engine, load, slo = engines[kind]
    lattice = Lattice.of(KNOBS, {"prefix_caching": "true"}, CONSTRAINTS)
    table: dict[str, float | None] = {}
    for point in lattice.points():
        values = lattice.values(point)
        if lattice.broken(values) is None:
            seqs, tokens = int(values["max_num_seqs"]), int(values["max_num_batched_tokens"])
            if seqs * 24 + tokens > 1900 or tokens < 4:  # no memory for these, no progress with those
                table[f"{seqs},{tokens}"] = None
                continue
            engine.apply(values)
            window = engine.run(load, slo, "")
            e2e = window.summary("e2e").p95
            table[f"{seqs},{tokens}"] = (
                10 / e2e if kind in ("late", "long") else window.goodput_rps + 0.05 * window.attainment
            )
    CACHE.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(table))
    return table


def _simulated_landscape(kind: str, *, held_out: bool) -> Landscape:
    space = Space((
        _whole("max_num_seqs", 1, 64, 2 if kind == "chat" else 48), _whole("max_num_batched_tokens", 1, 2048, 512),
        _switch("prefix_caching", True),
    ))  # fmt: skip

    def value(c: Config) -> float | None:
        table = _simulated(kind)
        key = f"{int(c['max_num_seqs'])},{int(c['max_num_batched_tokens'])}"
        return table[key] if key in table else table[_nearest(table, c)]

    return Landscape(
        name=f"simulated-{kind}", group="simulated", space=space, held_out=held_out,
        constraints=("max_num_seqs <= max_num_batched_tokens",), value=value,
    )  # fmt: skip


def _nearest(table: Mapping[str, float | None], c: Config) -> str:
    """The measured configuration nearest by ratio, for tuners that propose between the levels."""
    seqs, tokens = math.log(int(c["max_num_seqs"])), math.log(int(c["max_num_batched_tokens"]))

    def away(key: str) -> float:
        a, b = map(int, key.split(","))
        return abs(math.log(a) - seqs) + abs(math.log(b) - tokens)

    return min(table, key=away)


def landscapes() -> list[Landscape]:
    """Every problem, those for development first."""
    return [
        Landscape(name="branin-choice", group="analytic", value=_branin, constraints=("x + y >= -1",), space=Space((
            _real("x", -5, 10, 8), _real("y", 0, 15, 13), _choice("form", "flat", "plain", "steep")))),
        Landscape(name="valley-log", group="analytic", value=_valley, constraints=("width >= 8 or rate <= 0.1",),
                  space=Space((_real("rate", 1e-4, 1, 1e-3, log=True), _whole("width", 4, 512, 256),
                               _real("drop", 0, 1, 0.5), _choice("kind", "blue", "green", "red"),
                               _switch("warm", False)))),
        Landscape(name="serving-chat", group="serving", space=_serving_space(), constraints=SERVING_RULES,
                  value=lambda c: _serving(c, memory_gb=24, rate=12, long=False)),
        _simulated_landscape("chat", held_out=False),
        _simulated_landscape("late", held_out=False),
        Landscape(name="hartmann6", group="analytic", value=_hartmann, constraints=("x0 + x1 + x2 <= 2.2",),
                  space=Space(tuple(_real(f"x{i}", 0, 1, 0.5) for i in range(6))), held_out=True),
        Landscape(name="mixed8", group="analytic", value=_mixed, held_out=True,
                  constraints=("threads <= chunk", "ratio <= 0.9 or not fuse"),
                  space=Space((_whole("threads", 1, 128, 64), _whole("chunk", 16, 8192, 64),
                               _choice("backend", "auto", "eager", "flash", "paged"), _switch("pin", False),
                               _switch("fuse", False), _real("ratio", 0, 1, 0.9), _real("alpha", 0, 1, 0.1),
                               _whole("retries", 0, 10, 3, log=False)))),
        Landscape(name="serving-long", group="serving", space=_serving_space(), constraints=SERVING_RULES,
                  value=lambda c: _serving(c, memory_gb=22, rate=3, long=True), held_out=True),
        _simulated_landscape("long", held_out=True),
        _simulated_landscape("burst", held_out=True),
    ]  # fmt: skip
