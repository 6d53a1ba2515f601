"""How many tokens a second does the engine make, against other engines on the same checkpoint in the same run?

A random-init Llama of 153 M parameters (hidden 768, 12 layers, 12 heads, 4 KV heads, intermediate 3072, vocabulary
32 000, untied) in bfloat16 on 2 threads: 64 prompts of 128 tokens with 64 output tokens each, one such prompt alone,
and prefill only. Contenders take turns, so that a noisy machine disturbs all alike; beside tokens a wall second stand
tokens a CPU second times threads, which what else runs on the cores hardly moves. Rivals other than transformers run
in virtual environments of their own, made on first use (vLLM's takes 2.3 GB); one that cannot is named and left out.

    python benchmarks/engine_throughput.py [--rounds 3] [--threads 2] [--rivals generate,vllm,llama_cpp]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, LlamaConfig
from transformers.utils import logging as hf_logging

import _peers
from _figures import figure
from _roofline import Roofline
from flyball.engine.config import EngineConfig
from flyball.engine.core import EngineCore
from flyball.engine.request import SamplingParams

INPUT, OUTPUT, BATCH = 128, 64, 64
WARM_OUTPUT = 4  # output tokens of the turn that is not counted
SHAPE = LlamaConfig(
    vocab_size=32_000, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4,
    intermediate_size=3072, max_position_embeddings=2048, tie_word_embeddings=False,
)  # fmt: skip
Generate = Callable[[list[list[int]], int], list[list[int]]]  # prompts, output tokens each -> the tokens made


class Case(NamedTuple):
    """One row: what is asked, and which tokens count."""

    name: str
    prompts: int
    output: int
    counted: int  # tokens of one request that the rate counts


CASES = (
    Case("batch_bf16", BATCH, OUTPUT, OUTPUT),
    Case("single_bf16", 1, OUTPUT, OUTPUT),
    Case("prefill_bf16", 16, 1, INPUT),
)


class Contender(NamedTuple):
    """Something that generates: it returns the tokens and its own wall seconds, and can tell its CPU seconds so far."""

    run: Callable[[list[list[int]], int], tuple[list[list[int]], float]]
    cpu_seconds: Callable[[], float]


class Turn(NamedTuple):
    """One measured run, in tokens a second."""

    wall: float
    cpu: float  # tokens a CPU second times threads


@contextlib.contextmanager
def checkpoint() -> Iterator[Path]:
    """A fresh random checkpoint on disk."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(SHAPE, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        del model
        yield Path(folder)


def here(generate: Generate) -> Contender:
    """A contender in this process."""

    def run(prompts: list[list[int]], output: int) -> tuple[list[list[int]], float]:
        started = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()):
            made = generate(prompts, output)
        return made, time.perf_counter() - started

    return Contender(run, time.process_time)


def elsewhere(peer: _peers.Peer) -> Contender:
    """A contender in a worker of its own."""
    return Contender(peer.run, lambda: _peers.cpu_seconds(peer.pid))


def flyball(core: EngineCore) -> Generate:
    """Our engine, offline, every request added at once; prefix reuse off, as the rivals have none to reuse."""
    core.update_runtime({"prefix_caching": False})

    def run(prompts: list[list[int]], output: int) -> list[list[int]]:
        return core.generate(prompts, SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True))

    return run


def generate(path: Path) -> Generate:
    """transformers' `generate`: one static batch with its own dynamic cache."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()

    def run(prompts: list[list[int]], output: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=output,
                min_new_tokens=output, pad_token_id=0,
            )  # fmt: skip
        tokens: list[list[int]] = made[:, ids.shape[1] :].tolist()
        return tokens

    return run


def generate_batch(path: Path) -> Generate:
    """transformers' `generate_batch`: its continuous batching over a paged cache."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    batching = ContinuousBatchingConfig(num_blocks=BATCH, max_batch_tokens=2048, use_cuda_graph=False)

    def run(prompts: list[list[int]], output: int) -> list[list[int]]:
        config = GenerationConfig(max_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0)
        made = model.generate_batch(
            inputs=prompts, generation_config=config, continuous_batching_config=batching, warmup=False
        )
        return [m.generated_tokens for m in made.values()]

    return run


TRANSFORMERS = {"generate": generate, "generate_batch": generate_batch}
RIVALS = (*TRANSFORMERS, *_peers.NAMES)


def take_turn(
    contender: Contender, prompts: list[list[int]], case: Case, output: int, threads: int
) -> tuple[Turn, list[int]]:
    """One run: its rates and the first token of each answer."""
    cpu = contender.cpu_seconds()
    made, seconds = contender.run(prompts, output)
    cpu = contender.cpu_seconds() - cpu
    lengths = {len(tokens) for tokens in made}
    assert len(made) == len(prompts), f"{len(made)} answers to {len(prompts)} prompts"
    assert lengths == {output}, f"answers of {lengths} tokens, not {output}"
    tokens = case.prompts * case.counted
    return Turn(tokens / seconds, tokens / cpu * threads), [answer[0] for answer in made]


def compare(
    contenders: dict[str, Contender], case: Case, rounds: int, threads: int, seed: int, say: Callable[[str], None]
) -> tuple[dict[str, list[Turn]], dict[str, float]]:
    """Every contender's turns at one case, and how often its answers open with the token ours open with.

    One whose turn fails is said to be left out from there on.
    """
    generator = torch.Generator().manual_seed(seed)
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    same: dict[str, list[bool]] = {name: [] for name in contenders}
    for number in range(rounds + 1):  # the first warms up
        prompts = torch.randint(0, SHAPE.vocab_size, (case.prompts, INPUT), generator=generator).tolist()
        ours: list[int] = []
        for name in list(turns):
            try:
                turn, first = take_turn(
                    contenders[name], prompts, case, case.output if number else min(WARM_OUTPUT, case.output), threads
                )
            except _peers.PeerUnavailable as reason:
                say(f"{case.name}: {name} is left out: {reason}")
                del turns[name], same[name]
                continue
            ours = ours or first
            same[name] += [a == b for a, b in zip(first, ours, strict=True)]
            if number:
                turns[name].append(turn)
                rates = f"{turn.wall:.1f} tokens/s, {turn.cpu:.1f} by CPU time"
                say(f"{case.name}, turn {number} of {rounds}: {name} {rates}")
    return turns, {name: statistics.mean(seen) for name, seen in same.items()}


def spread(values: list[float]) -> tuple[float, float]:
    """The quartiles."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return low, high


def main() -> None:
    """Measure every case in turns and print the tables and the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rivals", default=",".join(RIVALS), help="default: all, %(default)s")
    parser.add_argument(
        "--cases", default=",".join(case.name for case in CASES), help="in this order; default: %(default)s"
    )
    parser.add_argument("--kernels", choices=["auto", "compiled", "torch"], default="auto")
    parser.add_argument("--peers-folder", type=Path, default=_peers.CACHE, help="where peers are installed")
    args = parser.parse_args()
    rivals = [name for name in args.rivals.split(",") if name]
    if unknown := set(rivals) - set(RIVALS):
        parser.error(f"unknown rivals {sorted(unknown)}; there are {', '.join(RIVALS)}")
    by_name = {case.name: case for case in CASES}
    cases = [name for name in args.cases.split(",") if name]
    if unknown := set(cases) - set(by_name):
        parser.error(f"unknown cases {sorted(unknown)}; there are {', '.join(by_name)}")
    torch.set_num_threads(args.threads)
    hf_logging.disable_progress_bar()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    console = Console(stderr=True, soft_wrap=True)
    settings = {"max_seqs": BATCH, "max_len": INPUT + OUTPUT}
    with checkpoint() as path:
        foreign = [name for name in rivals if name in _peers.NAMES]
        with _peers.running(
            foreign, args.peers_folder, {"model": str(path), **settings}, args.threads, console.print
        ) as peers:
            core = EngineCore(
                EngineConfig(
                    model=path,
                    max_num_seqs=BATCH,
                    max_model_len=INPUT + OUTPUT,
                    threads=args.threads,
                    kernels=args.kernels,
                )
            )
            contenders = {"flyball": here(flyball(core))}
            contenders |= {name: here(TRANSFORMERS[name](path)) for name in rivals if name in TRANSFORMERS}
            contenders |= {name: elsewhere(peer) for name, peer in peers.items()}
            roof = Roofline.measure()
            for seed, case in enumerate(by_name[name] for name in cases):
                turns, same = compare(contenders, case, args.rounds, args.threads, seed, console.print)
                roof = roof.better(Roofline.measure())
                report(case, turns, same, roof, core.runner.kernels, {n: p.version for n, p in peers.items()})


def report(
    case: Case,
    turns: dict[str, list[Turn]],
    same: dict[str, float],
    roof: Roofline,
    kernels: str,
    versions: dict[str, str],
) -> None:
    """One case's table and JSON lines."""
    floor = case.prompts * case.counted / roof.seconds(SHAPE, case.prompts, INPUT, case.output)
    wall = {name: statistics.median(turn.wall for turn in seen) for name, seen in turns.items()}
    cpu = {name: statistics.median(turn.cpu for turn in seen) for name, seen in turns.items()}
    best = max((name for name in wall if name != "flyball"), key=wall.__getitem__, default=None)
    table = Table(title=f"{case.name}: tokens/s, median of {len(turns['flyball'])}; roofline {floor:.0f}")
    for column in (
        "contender",
        "wall",
        "by CPU time",
        "ours / it",
        "ours / it, by CPU time",
        "of the roofline",
        "first tokens as ours",
    ):
        table.add_column(column, justify="right")
    for name, rate in wall.items():
        table.add_row(
            name, f"{rate:.1f}", f"{cpu[name]:.1f}", f"{wall['flyball'] / rate:.2f}",
            f"{cpu['flyball'] / cpu[name]:.2f}", f"{rate / floor:.2f}", f"{same[name]:.0%}",
        )  # fmt: skip
    Console(width=120).print(table)
    for name, rate in wall.items():
        ours = name == "flyball"
        extra = (
            {"rival_name": best, "rival_by_cpu_time": cpu[best] if best else None, "kernels": kernels}
            if ours
            else {"version": versions.get(name, "transformers"), "first_token_agreement": same[name]}
        )
        figure(
            case.name if ours else f"{case.name}_{name}", rate, "tokens/s",
            rival=wall[best] if ours and best else None, spread=spread([turn.wall for turn in turns[name]]),
            by_cpu_time=cpu[name], roofline_share=rate / floor, roofline=floor,
            read_gb_per_s=roof.read_bytes_per_s / 1e9, gemm_gflop_per_s=roof.gemm_flop_per_s / 1e9, **extra,
        )  # fmt: skip


if __name__ == "__main__":
    main()
