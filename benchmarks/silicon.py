"""How well are engines on real accelerators predicted that were not measured? 2504 configurations on H100 and B200.

Rows are NVIDIA's measurements shipped with aiconfigurator-core (14 models; vLLM, SGLang, TensorRT-LLM). Two things are
left out in turn: one load of a deployment (with all its repetitions), and a whole deployment (model, accelerator,
engine, version, precision, parallelism), of which then nothing was measured. The rival is the fitted queue law alone,
fitted to what is left of the deployment, or of the model on that accelerator and engine. Another tool's published model
shows 23 % (TPOT) and 51 % (TTFT) on such rows. The interval is the stated 80 % one.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from _figures import figure
from flyball.performance.featured import interval_factor
from flyball.performance.silicon import Measured, fit_queue_law, learn_tpot, learn_ttft, queue_law

DATA = Path(__file__).parent / "data" / "silicon.csv.gz"
TARGET = {"tpot": 0.10, "ttft": 0.20}
ELSEWHERE = {"tpot": 0.23, "ttft": 0.51}
LEAST = 3  # rows that a queue law is fitted to


def read() -> tuple[list[Measured], np.ndarray, np.ndarray]:
    """Configurations, TTFT and TPOT in seconds."""
    with gzip.open(DATA, "rt", newline="") as lines:
        rows = list(csv.DictReader(lines))

    def degree(text: str) -> float:
        return float(text) if text not in {"", "0"} else 1.0

    measured = [
        Measured(
            model=r["model"], system=r["system"], engine=r["engine"], version=r["version"], precision=r["precision"],
            quantization=f"{r['gemm']} {r['moe']}", concurrency=float(r["concurrency"]), input_tokens=float(r["isl"]),
            output_tokens=float(r["osl"]), tensor=degree(r["tp"]), data=degree(r["dp"]), expert=degree(r["ep"]),
            expert_tensor=degree(r["moe_tp"]),
        )
        for r in rows
    ]  # fmt: skip
    ttft, tpot = (np.array([float(r[name]) for r in rows]) / 1e3 for name in ("ttft_ms", "tpot_ms"))
    return measured, ttft, tpot


def numbered(names: Sequence[str]) -> np.ndarray:
    """Equal names, equal numbers."""
    return np.unique(np.array(names), return_inverse=True)[1]


def queue_law_left_out(rows: list[Measured], ttft: np.ndarray, tpot: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """[2, R] What the queue law alone says of every block from the nearest rows that are left."""
    deployments = numbered([r.deployment for r in rows])
    groups = numbered([f"{r.system} {r.engine} {r.model}" for r in rows])
    said = np.full((2, len(rows)), np.nan)
    for block in np.unique(blocks):
        out = np.flatnonzero(blocks == block)
        for relatives in (deployments, groups, np.zeros_like(groups)):
            left = np.flatnonzero((relatives == relatives[out[0]]) & (blocks != block))
            if len(left) >= LEAST:
                break
        found = fit_queue_law([rows[i] for i in left], ttft[left], tpot[left])
        said[:, out] = queue_law([rows[i] for i in out], found)
    return said


def main() -> None:
    """Print both ways of leaving out, and the figures."""
    rows, ttft, tpot = read()
    deployments = numbered([r.deployment for r in rows])
    loads = numbered([f"{r.deployment} {r.concurrency} {r.input_tokens} {r.output_tokens}" for r in rows])
    laws = {"tpot": (learn_tpot(rows, tpot), tpot), "ttft": (learn_ttft(rows, ttft), ttft)}
    print(f"{len(rows)} rows, {loads.max() + 1} configurations, {deployments.max() + 1} deployments\n")
    names = ("median", "mean", "P90", "in 80 %")
    print(f"{'left out':12} {'latency':8} {' '.join(f'{n:>8}' for n in names)} {'queue law':>10} {'target':>7}")
    lines = []
    for name, blocks in (("load", loads), ("deployment", deployments)):
        alone = queue_law_left_out(rows, ttft, tpot, blocks)
        for row, latency in ((1, "tpot"), (0, "ttft")):
            law, measured = laws[latency]
            seen = law.left_out(blocks)
            errors = np.abs(np.expm1(seen.mean - np.log(measured)))
            width = interval_factor(seen, np.log(measured), blocks) * seen.deviation
            inside = float(np.mean(np.abs(seen.mean - np.log(measured)) <= width))
            rival = float(np.median(np.abs(alone[row] / measured - 1)))
            median = float(np.median(errors))
            print(
                f"{name:12} {latency:8} {median:8.1%} {errors.mean():8.1%} {np.percentile(errors, 90):8.1%} "
                f"{inside:8.1%} {rival:10.1%} {TARGET[latency]:7.0%}"
            )
            lines.append((f"silicon_{latency}_{name}_left_out", median, rival, inside, ELSEWHERE[latency]))
    print()
    for name, median, rival, inside, elsewhere in lines:
        figure(name, median, "median relative error", rival=rival, interval_coverage=inside, another_tool=elsewhere)


if __name__ == "__main__":
    main()
