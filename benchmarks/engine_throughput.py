"""How many tokens a second does the engine make, against transformers on the same checkpoint in the same run?

A random-init Llama of 153 M parameters (hidden 768, 12 layers, 12 heads, 4 KV heads, intermediate 3072, vocabulary
32 000, untied) in bfloat16 on 2 threads: 64 prompts of 128 tokens with 64 output tokens each, one such prompt alone,
and prefill only. Contenders take turns, so that a noisy machine disturbs all alike.

    python benchmarks/engine_throughput.py [--rounds 3] [--threads 2] [--rivals generate,generate_batch]
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

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, LlamaConfig
from transformers.utils import logging as hf_logging

from _figures import figure
from flyball.engine.config import EngineConfig
from flyball.engine.core import EngineCore
from flyball.engine.request import SamplingParams

INPUT, OUTPUT, BATCH = 128, 64, 64
# name, prompts, output tokens, and whether output or prompt tokens are counted
CASES = (
    ("batch_bf16", BATCH, OUTPUT, "output"),
    ("single_bf16", 1, OUTPUT, "output"),
    ("prefill_bf16", 16, 1, "prompt"),
)
SHAPE = LlamaConfig(
    vocab_size=32_000, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4,
    intermediate_size=3072, max_position_embeddings=2048, tie_word_embeddings=False,
)  # fmt: skip
Contender = Callable[[list[list[int]], int], int]  # prompts, output tokens each -> output tokens made


@contextlib.contextmanager
def checkpoint() -> Iterator[Path]:
    """A fresh random checkpoint on disk."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(SHAPE, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        del model
        yield Path(folder)


def flyball(core: EngineCore) -> Contender:
    """Our engine, offline, every request added at once; prefix reuse off, as the rivals have none to reuse."""
    core.update_runtime({"prefix_caching": False})

    def run(prompts: list[list[int]], output: int) -> int:
        made = core.generate(prompts, SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True))
        return sum(map(len, made))

    return run


def generate(path: Path) -> Contender:
    """transformers' `generate`: one static batch with its own dynamic cache."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()

    def run(prompts: list[list[int]], output: int) -> int:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=output,
                min_new_tokens=output, pad_token_id=0,
            )  # fmt: skip
        return made.numel() - ids.numel()

    return run


def generate_batch(path: Path) -> Contender:
    """transformers' `generate_batch`: its continuous batching over a paged cache."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    batching = ContinuousBatchingConfig(num_blocks=BATCH, max_batch_tokens=2048, use_cuda_graph=False)

    def run(prompts: list[list[int]], output: int) -> int:
        config = GenerationConfig(max_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0)
        made = model.generate_batch(
            inputs=prompts, generation_config=config, continuous_batching_config=batching, warmup=False
        )
        return sum(len(m.generated_tokens) for m in made.values())

    return run


RIVALS = {"generate": generate, "generate_batch": generate_batch}


def main() -> None:
    """Measure every case in turns and print the table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rivals", default=",".join(RIVALS))
    parser.add_argument("--kernels", choices=["auto", "compiled", "torch"], default="auto")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    hf_logging.disable_progress_bar()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    console = Console(stderr=True)
    rates: dict[tuple[str, str], list[float]] = {}
    with checkpoint() as path:
        core = EngineCore(
            EngineConfig(
                model=path, max_num_seqs=BATCH, max_model_len=INPUT + OUTPUT, threads=args.threads, kernels=args.kernels
            )
        )
        kernels = core.runner.kernels
        contenders = {"flyball": flyball(core)}
        contenders |= {name: RIVALS[name](path) for name in args.rivals.split(",") if name}
        generator = torch.Generator().manual_seed(1)
        for case, count, output, counted in CASES:
            for turn in range(args.rounds + 1):  # the first turn warms up
                prompts = torch.randint(0, SHAPE.vocab_size, (count, INPUT), generator=generator).tolist()
                for name, contender in contenders.items():
                    console.print(f"{case}: {name}, turn {turn} of {args.rounds}")
                    started = time.perf_counter()
                    with contextlib.redirect_stderr(io.StringIO()):
                        made = contender(prompts, output)
                    seconds = time.perf_counter() - started
                    assert made == count * output, f"{name} made {made} tokens, not {count * output}"
                    if turn:
                        tokens = count * (output if counted == "output" else INPUT)
                        rates.setdefault((case, name), []).append(tokens / seconds)
    table = Table(title=f"tokens/s, 153 M Llama, bfloat16, {args.threads} threads (median of {args.rounds})")
    for column in ("case", *contenders, "ours / best rival"):
        table.add_column(column, justify="right")
    medians = {key: statistics.median(values) for key, values in rates.items()}
    best = {case: max((medians[case, n] for n in contenders if n != "flyball"), default=None) for case, *_ in CASES}
    for case, *_ in CASES:
        rival = best[case]
        ratio = f"{medians[case, 'flyball'] / rival:.2f}" if rival else "-"
        table.add_row(case, *(f"{medians[case, n]:.1f}" for n in contenders), ratio)
    Console().print(table)
    for case, *_ in CASES:
        for name in contenders:
            ours = name == "flyball"
            values = rates[case, name]
            low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
            figure(
                case if ours else f"{case}_{name}", medians[case, name], "tokens/s",
                rival=best[case] if ours else None, spread=(low, high), kernels=kernels if ours else None,
            )  # fmt: skip


if __name__ == "__main__":
    main()
