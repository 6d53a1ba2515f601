"""What does each weight format cost in accuracy, and what does it give in memory and speed?

Accuracy: held-out loss of the bundled model, in nats a token, paired with bfloat16's on the same windows; the same on a
copy in which one input channel in a thousand is 50 times as large and its norm's weight a 50th, which says the same in
bfloat16; beside them int8 with one scale a tensor and an int2, which must fail visibly. Speed: tokens a second of the
153 M model of engine_throughput.py in every format in turns, 128 tokens in and 64 out, at batch 1, 8 and 64; ratios are
over our own bfloat16 of the same run. Peers run the same checkpoint in their own 8 and 4 bits, where installed.

    python benchmarks/quantization.py [--rounds 3] [--threads 2] [--formats int8_dynamic,int8,int4,fp8,nf4] [--no-head]
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

import _peers
from _figures import figure
from engine_throughput import INPUT, OUTPUT, SHAPE, Contender, checkpoint, elsewhere, flyball, here, take_turn
from engine_throughput import Case as Load
from flyball.engine.bundled import bundled_model_path
from flyball.engine.config import EngineConfig
from flyball.engine.core import EngineCore
from flyball.engine.quantization.formats import QuantizationConfig, QuantizationType
from flyball.engine.quantization.gptq import calibrate, text_windows
from flyball.engine.quantization.walk import quantize_model

FORMATS = tuple(str(kind) for kind in QuantizationType)
BATCHES = (1, 8, 64)
TEXT = Path(__file__).parent.parent / "tests" / "data" / "text" / "held_out.txt"  # the model never saw it
WINDOW, WINDOWS = 256, 24
OUTLIERS, FACTOR = 1000, 50.0
FOUR_BITS = {"int4", "nf4", "openvino_int4", "llama_cpp_q4_0"}  # the others have eight


def windows(tokenizer: Any) -> torch.Tensor:  # noqa: ANN401  # untyped library
    """Held-out token ids, [windows, tokens], from the last three quarters of the text: calibration sees the first."""
    ids = torch.tensor(tokenizer(TEXT.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    starts = torch.linspace(len(ids) // 4, len(ids) - WINDOW, WINDOWS).long().tolist()
    return torch.stack([ids[start : start + WINDOW] for start in starts])


@torch.no_grad()
def losses(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Nats of every token, by window [windows, tokens - 1]."""
    found = []
    for some in ids.split(8):
        logits = model(some).logits[:, :-1].float()
        found.append(F.cross_entropy(logits.transpose(1, 2), some[:, 1:], reduction="none"))
    return torch.cat(found)


def with_outliers(model: Any) -> Any:  # noqa: ANN401  # untyped library
    """A copy whose norms hand some channels on 50 times smaller and whose projections read them 50 times larger."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            chosen = torch.arange(max(1, norm.weight.numel() // OUTLIERS)) * 97 % norm.weight.numel()
            norm.weight[chosen] /= FACTOR
            for reader in readers:
                reader.weight[:, chosen] *= FACTOR
    return model


def coarse(model: nn.Module, bits: int, *, rows: bool) -> None:
    """Controls: one scale a row or for the whole tensor, in place."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            top = layer.weight.abs().amax(1, keepdim=True) if rows else layer.weight.abs().max()
            step = top / (2 ** (bits - 1) - 1)
            layer.weight.copy_((layer.weight / step).round() * step)


def accuracy(formats: list[str], table: Table) -> None:
    """Loss differences of every format and control, into the table and as figures."""
    folder = bundled_model_path()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    ids = windows(AutoTokenizer.from_pretrained(folder))
    models = {"": plain, "outliers": with_outliers(plain)}
    base = {name: losses(model, ids) for name, model in models.items()}
    ways: dict[str, Callable[[Any], float]] = {}
    for name in formats:
        ways[name] = lambda m, name=name: quantized(m, name)
    ways |= {
        "int8_asymmetric": lambda m: quantized(m, "int8", symmetric=False),
        "nf4_double_quant": lambda m: quantized(m, "nf4", group_size=64, use_double_quant=True),
        "int4_calibrated": lambda m: calibrated(m, folder),
        "control_int8_per_tensor": lambda m: coarse(m, 8, rows=False) or 8.0,
        "control_int2": lambda m: coarse(m, 2, rows=True) or 2.0,
    }
    for name, way in ways.items():
        row: list[float] = []
        bits = 0.0
        for kind, model in models.items():
            changed = copy.deepcopy(model)
            bits = way(changed)
            gaps = (losses(changed, ids) - base[kind]).mean(1)
            row += [float(gaps.mean()), float(gaps.std() / len(gaps) ** 0.5)]
        table.add_row(name, f"{bits:.2f}", f"{row[0]:+.4f} ± {row[1]:.4f}", f"{row[2]:+.4f} ± {row[3]:.4f}")
        figure(f"loss_{name}", row[0], "nats/token", bits_per_weight=bits, standard_error=row[1],
               outliers_loss=row[2], outliers_standard_error=row[3], rival_loss=float(base[""].mean()))  # fmt: skip


def quantized(model: nn.Module, kind: str, **more: Any) -> float:  # noqa: ANN401  # as the configuration's
    """Bits a weight after quantising in place."""
    return quantize_model(model, QuantizationConfig(quantization_type=QuantizationType(kind), **more)).bits_per_weight


def calibrated(model: nn.Module, folder: Path) -> float:
    """GPTQ on the first fifth of the text; bits a weight."""
    samples = text_windows(folder, TEXT, 24)[:5]
    return calibrate(model, QuantizationConfig(quantization_type=QuantizationType.INT4), samples).bits_per_weight


def engine(path: Path, kind: str | None, threads: int, *, head: bool) -> EngineCore:
    """Our engine in a format."""
    return EngineCore(
        EngineConfig(model=path, quantization=kind, quantize_head=head and kind is not None, threads=threads,  # type: ignore[arg-type]
                     max_num_seqs=max(BATCHES), max_model_len=INPUT + OUTPUT)
    )  # fmt: skip


@contextmanager
def peers_of(
    names: list[str], folder: Path, path: Path, threads: int, say: Callable[[str], None]
) -> Iterator[dict[str, Contender]]:
    """Peers that are installed, each told which weights to use."""
    settings = {"model": str(path), "max_seqs": max(BATCHES), "max_len": INPUT + OUTPUT}
    with _peers.running(names, folder, settings, threads, say) as peers:
        yield {name: elsewhere(peer) for name, peer in peers.items()}


def main() -> None:
    """Accuracy, then speed, then the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--peers", default=",".join(_peers.QUANTIZED), help="rivals; default: all, %(default)s")
    parser.add_argument("--peers-folder", type=Path, default=_peers.CACHE, help="where peers are installed")
    parser.add_argument("--no-head", action="store_true", help="leave the output layer in bfloat16")
    parser.add_argument("--only", choices=["accuracy", "speed"])
    args = parser.parse_args()
    formats = [name for name in args.formats.split(",") if name]
    if unknown := set(formats) - set(FORMATS):
        parser.error(f"unknown formats {sorted(unknown)}; there are {', '.join(FORMATS)}")
    rivals = [name for name in args.peers.split(",") if name]
    if unknown := set(rivals) - set(_peers.QUANTIZED):
        parser.error(f"unknown peers {sorted(unknown)}; there are {', '.join(_peers.QUANTIZED)}")
    torch.set_num_threads(args.threads)
    hf_logging.disable_progress_bar()
    say = Console(stderr=True, soft_wrap=True).print
    if args.only != "speed":
        table = Table(title="Held-out loss less bfloat16's, nats a token, ± standard error over windows")
        for column in ("format", "bits a weight", "bundled model", "with outliers"):
            table.add_column(column, justify="right")
        with torch.no_grad():
            accuracy(formats, table)
        Console(width=120).print(table)
    if args.only != "accuracy":
        with checkpoint() as path, peers_of(rivals, args.peers_folder, path, args.threads, say) as peers:
            speed(path, formats, [int(b) for b in args.batches.split(",")], args.rounds, args.threads, peers, say,
                  head=not args.no_head)  # fmt: skip
            for name in rivals:
                if name not in peers:
                    Console(width=120).print(f"{name} did not run here and is in no table; its reason stands above")


def weight_bytes(core: EngineCore) -> int:
    """Resident bytes of all weights, as the engine keeps them."""
    return core.runner.weight_bytes


def speed(
    path: Path, formats: list[str], batches: list[int], rounds: int, threads: int, peers: dict[str, Contender],
    say: Callable[[str], None], *, head: bool,
) -> None:  # fmt: skip
    """Tokens a second of every format in turns, against our bfloat16 and the peers."""
    cores = {"bf16": engine(path, None, threads, head=False)}
    cores |= {name: engine(path, name, threads, head=head) for name in formats}
    contenders = {name: here(flyball(core)) for name, core in cores.items()} | peers
    memory = {name: weight_bytes(core) for name, core in cores.items()}
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        load = Load(f"batch{batch}", batch, OUTPUT, OUTPUT)
        wall: dict[str, list[float]] = {name: [] for name in contenders}
        cpu: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(rounds + 1):  # the first warms up
            prompts = torch.randint(0, SHAPE.vocab_size, (batch, INPUT), generator=generator).tolist()
            for name in list(wall):
                try:
                    turn, _ = take_turn(contenders[name], prompts, load, OUTPUT if number else 2, threads)
                except _peers.PeerUnavailable as reason:
                    say(f"batch {batch}: {name} is left out: {reason}")
                    del wall[name], cpu[name], contenders[name]
                    continue
                if number:
                    wall[name].append(turn.wall)
                    cpu[name].append(turn.cpu)
                    say(f"batch {batch}, turn {number} of {rounds}: {name} {turn.wall:.1f} tokens/s, "
                        f"{turn.cpu:.1f} by CPU time")  # fmt: skip
        report(batch, wall, cpu, memory, {name: core.runner.kernels for name, core in cores.items()})


def best_rival(name: str, wall: dict[str, list[float]]) -> float | None:
    """Tokens a second of the fastest peer whose weights have as many bits, 4 or 8, as a format of ours."""
    same = [n for n in wall if n in _peers.QUANTIZED and (n in FOUR_BITS) == (name in FOUR_BITS)]
    return max((statistics.median(wall[n]) for n in same), default=None)


def report(
    batch: int,
    wall: dict[str, list[float]],
    cpu: dict[str, list[float]],
    memory: dict[str, int],
    kernels: dict[str, str],
) -> None:
    """One batch's table and JSON lines."""
    table = Table(title=f"batch {batch}: tokens/s, 153 M parameters, {INPUT} in, {OUTPUT} out")
    for column in ("contender", "wall", "by CPU time", "over bf16", "by CPU time", "weights over bf16", "over peer"):
        table.add_column(column, justify="right")
    base, base_cpu = statistics.median(wall["bf16"]), statistics.median(cpu["bf16"])
    rivals = {n: best_rival(n, wall) for n in memory if n != "bf16"}
    for name, turns in wall.items():
        rate, by_cpu = statistics.median(turns), statistics.median(cpu[name])
        share = memory[name] / memory["bf16"] if name in memory else None
        best = rivals.get(name)
        table.add_row(name, f"{rate:.1f}", f"{by_cpu:.1f}", f"{rate / base:.2f}", f"{by_cpu / base_cpu:.2f}",
                      f"{share:.2f}" if share else "", f"{rate / best:.2f}" if best else "")  # fmt: skip
        figure(f"{name}_batch{batch}", rate, "tokens/s", rival=base, spread=(min(turns), max(turns)),
               by_cpu_time=by_cpu, ratio_by_cpu_time=by_cpu / base_cpu, weights_share=share, kernels=kernels.get(name),
               over_best_peer=rate / best if best else None)  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
