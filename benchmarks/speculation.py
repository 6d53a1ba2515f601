"""How much faster does guessing make the engine, by each proposer, and does it ever make it slower?

On real held-out text: the bundled model with its draft and heads, greedy, prompts of 96 tokens from a text it never saw
and 64 tokens out, at batch 1, 4 and 16; and the 153 M model of engine_throughput.py (random weights, so that prompt
lookup alone is tried on it). Methods take turns with speculation off; a ratio is wall clock over off in the same turn.
`--gate 0` opens the batch gate (spec_max_batch), to see what it is there for.

    python benchmarks/speculation.py [--rounds 5] [--threads 2] [--model bundled|153m|both] [--gate 8]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from _figures import figure
from engine_throughput import checkpoint
from flyball.engine.bundled import bundled_medusa_path, bundled_model_path
from flyball.engine.config import EngineConfig
from flyball.engine.core import EngineCore
from flyball.engine.request import SamplingParams

TEXT = Path(__file__).parent.parent / "tests" / "data" / "text" / "held_out.txt"
INPUT, OUTPUT = 96, 64
BATCHES = (1, 4, 16)


class Turn(NamedTuple):
    """One run of a batch."""

    wall: float  # tokens a second
    cpu: float  # tokens a CPU second
    per_step: float  # tokens a decode step of the model and request
    kept: float  # share of guessed tokens that were kept


def turn(core: EngineCore, method: str, prompts: list[list[int]]) -> tuple[Turn, list[list[int]]]:
    """Serve the prompts with a method."""
    core.update_runtime({"spec_method": method})
    before, wall, cpu = core.stats, time.perf_counter(), time.process_time()
    made = core.generate(prompts, SamplingParams(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    drafts = core.stats.spec_drafts - before.spec_drafts
    guessed = core.stats.spec_draft_tokens - before.spec_draft_tokens
    kept = core.stats.spec_accepted_tokens - before.spec_accepted_tokens
    tokens = sum(map(len, made))
    decode_rows = tokens - kept  # each step gives a request one token of its own, and those kept
    return Turn(tokens / wall, tokens / cpu, tokens / decode_rows, kept / guessed if drafts else 0.0), made


def measure(
    core: EngineCore, methods: list[str], batch: int, rounds: int, prompts_of: Callable[[int, int], list[list[int]]]
) -> tuple[dict[str, list[Turn]], dict[str, bool]]:
    """Turns of each method, and whether its answers were those of `off`."""
    turns: dict[str, list[Turn]] = {m: [] for m in methods}
    same = dict.fromkeys(methods, True)
    for number in range(rounds + 1):  # the first warms up, and lets the draft length settle
        prompts, wanted = prompts_of(number, batch), []
        for method in methods:
            result, made = turn(core, method, prompts)
            wanted = wanted or made
            same[method] &= made == wanted
            if number:
                turns[method].append(result)
    return turns, same


def report(model: str, batch: int, turns: dict[str, list[Turn]], same: dict[str, bool]) -> None:
    """One batch's table and JSON lines."""
    table = Table(title=f"{model}, batch {batch}: {INPUT} tokens in, {OUTPUT} out, greedy")
    for column in ("method", "tokens/s", "over off", "by CPU time", "tokens a step", "guesses kept", "same answers"):
        table.add_column(column, justify="right")
    suffix = "" if model == "bundled" else f"_{model}"
    ratios = {}
    for method, seen in turns.items():
        pairs = list(zip(seen, turns["off"], strict=True))
        ratios[method] = statistics.median(t.wall / off.wall for t, off in pairs)
        by_cpu = statistics.median(t.cpu / off.cpu for t, off in pairs)
        rate, per_step = (
            statistics.median(values) for values in zip(*[(t.wall, t.per_step) for t in seen], strict=True)
        )
        kept = statistics.median(t.kept for t in seen)
        table.add_row(method, f"{rate:.0f}", f"{ratios[method]:.2f}", f"{by_cpu:.2f}", f"{per_step:.2f}", f"{kept:.0%}",
                      str(same[method]))  # fmt: skip
        if method != "off":
            off = statistics.median(t.wall for t in turns["off"])
            figure(f"{method}_batch{batch}{suffix}", rate, "tokens/s", rival=off, paired_ratio=ratios[method],
                   ratio_by_cpu_time=by_cpu, tokens_per_step=per_step, kept=kept,
                   same_answers=same[method])  # fmt: skip
    best = max((m for m in ratios if m != "off"), key=ratios.__getitem__)
    off, rate = (statistics.median(t.wall for t in turns[m]) for m in ("off", best))
    figure(f"best_batch{batch}{suffix}", rate, "tokens/s", rival=off, method=best, paired_ratio=ratios[best])
    Console(width=120).print(table)


def main() -> None:
    """Measure both models and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4, help="num_speculative_tokens")
    parser.add_argument("--gate", type=int, default=8, help="spec_max_batch; 0: open")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--model", choices=["bundled", "153m", "both"], default="both")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    knobs = {"prefix_caching": False, "num_speculative_tokens": args.tokens, "spec_max_batch": args.gate}
    sizes = {"threads": args.threads, "max_num_seqs": max(BATCHES)}
    batches = [int(b) for b in args.batches.split(",")]
    if args.model != "153m":
        folder = bundled_model_path()
        core = EngineCore(EngineConfig(
            model=folder, draft_model=bundled_model_path("draft"), medusa_heads=bundled_medusa_path(), **sizes
        ))  # fmt: skip
        core.update_runtime(knobs)
        ids = core.tokenizer(TEXT.read_text(encoding="utf-8"), verbose=False)["input_ids"]

        def from_text(number: int, batch: int) -> list[list[int]]:
            starts = [(number * batch + i) * 61 % (len(ids) - INPUT) for i in range(batch)]
            return [ids[start : start + INPUT] for start in starts]

        methods = list(core.config.spec_methods)
        for batch in batches:
            report("bundled", batch, *measure(core, methods, batch, args.rounds, from_text))
        del core
    if args.model != "bundled":
        generator = torch.Generator().manual_seed(0)
        with checkpoint() as path:
            core = EngineCore(EngineConfig(model=path, max_model_len=512, **sizes))
            core.update_runtime(knobs)

            def at_random(_number: int, batch: int) -> list[list[int]]:
                return torch.randint(0, core.runner.shape.vocab_size, (batch, INPUT), generator=generator).tolist()

            for batch in batches:
                report("153m", batch, *measure(core, ["off", "ngram"], batch, args.rounds, at_random))


if __name__ == "__main__":
    main()
