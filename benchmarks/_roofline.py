"""What this machine could do at best: its DRAM read rate and its bfloat16 GEMM rate, and what they allow a Llama."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import LlamaConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """Two rates, each the best of many tries, since other work can only lower them."""

    read_bytes_per_s: float
    gemm_flop_per_s: float

    @classmethod
    def measure(cls, tries: int = 5) -> Roofline:
        """Sum 512 MiB of float32, far more than any cache; multiply bfloat16 matrices of 2048."""
        block, a, b = torch.ones(2**27), torch.randn(2048, 2048).bfloat16(), torch.randn(2048, 2048).bfloat16()

        def best(work: Callable[[], object]) -> float:
            times = []
            for _ in range(tries + 1):
                started = time.perf_counter()
                work()
                times.append(time.perf_counter() - started)
            return min(times)

        return cls(
            read_bytes_per_s=block.numel() * 4 / best(block.sum),
            gemm_flop_per_s=2 * 2048**3 / best(lambda: torch.nn.functional.linear(a, b)),
        )

    def better(self, other: Roofline) -> Roofline:
        """The faster of two measurements, rate by rate."""
        return Roofline(
            read_bytes_per_s=max(self.read_bytes_per_s, other.read_bytes_per_s),
            gemm_flop_per_s=max(self.gemm_flop_per_s, other.gemm_flop_per_s),
        )

    def seconds(self, shape: LlamaConfig, prompts: int, tokens: int, output: int) -> float:
        """Least time for `prompts` prompts of `tokens` each, decoded in one batch to `output` tokens each.

        Every prompt token passes all layers, every made token all layers and the output head; a decode step also reads
        all those weights once from memory, and takes the longer of the two. Attention, 1 % here, is not counted.
        """
        layers, head = weights(shape)
        prefill = (2 * prompts * (tokens * layers + head)) / self.gemm_flop_per_s
        read = 2 * (layers + head) / self.read_bytes_per_s
        compute = 2 * prompts * (layers + head) / self.gemm_flop_per_s
        return prefill + (output - 1) * max(read, compute)


def weights(shape: LlamaConfig) -> tuple[int, int]:
    """Weights of all layers' matrices, and of the output head."""
    kv = shape.hidden_size * shape.num_key_value_heads // shape.num_attention_heads
    attention = shape.hidden_size * (2 * shape.hidden_size + 2 * kv)
    layers = shape.num_hidden_layers * (attention + 3 * shape.hidden_size * shape.intermediate_size)
    return layers, shape.hidden_size * shape.vocab_size
