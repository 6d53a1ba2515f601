"""Calibrated int4: rounding errors of early columns are made up for by later ones (GPTQ, Frantar et al. 2022,
arXiv:2210.17323, algorithm 1).

Symbols: X inputs of a layer [T, K] from a sample of text, H = 2 X'X / T their second moments, U the upper Cholesky
factor of the damped inverse of H, w weight, q what its code stands for, e = (w - q) / U[k, k] the error of column k,
of which U[k, j] e is taken from each later column j.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from flyball.core.errors import InvalidInput
from flyball.engine.quantization.formats import QuantizationConfig, QuantizationType, quantizer_of
from flyball.engine.quantization.integer import Int4Quantizer
from flyball.engine.quantization.linear import QuantizedLinear
from flyball.engine.quantization.walk import (
    DEFAULT_SKIP,
    LayerError,
    QuantizationReport,
    is_skipped,
    layer_error,
    linear_layers,
    quantization_config,
)

DAMPING = 0.01  # share of H's mean diagonal added to it
_WINDOW = 256  # tokens of one sample
_BLOCK = 128  # columns whose errors reach the later ones in one product


class Moments:
    """Second moments of what a layer sees, gathered by a forward hook."""

    def __init__(self, columns: int) -> None:
        self.total = torch.zeros(columns, columns)
        self.rows = 0

    def see(self, x: Tensor) -> None:
        """Add inputs [.., K]."""
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        self.total += flat.T @ flat
        self.rows += len(flat)

    @property
    def hessian(self) -> Tensor:
        """H [K, K]."""
        return 2 * self.total / max(1, self.rows)


def gptq(weight: Tensor, hessian: Tensor, quantizer: Int4Quantizer) -> dict[str, Tensor]:
    """Codes and scales of a weight [N, K] that keep its products with what was seen, under second moments H [K, K]."""
    w = weight.detach().float().clone()
    columns = w.shape[1]
    h = hessian.clone()
    dead = h.diagonal() == 0  # inputs that were never other than 0
    h[dead, dead] = 1.0
    w[:, dead] = 0.0
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    size = quantizer.group_size
    codes = torch.empty_like(w)
    scales, zeros = [], []
    scale = zero = w[:, :1]
    for first in range(0, columns, _BLOCK):
        last = min(first + _BLOCK, columns)
        errors = torch.zeros(len(w), last - first)
        for k in range(first, last):
            if k % size == 0:
                # The group's later columns, updated so far, set the grid.
                inside = w[:, k : k + size] - errors[:, : k - first] @ upper[first:k, k : k + size]
                scale, zero = quantizer.grid(inside)
                scales.append(scale)
                zeros.append(zero)
            column = w[:, k : k + 1] - errors[:, : k - first] @ upper[first:k, k : k + 1]
            codes[:, k : k + 1] = quantizer.codes(column, scale, zero)
            kept = (codes[:, k : k + 1] - zero) * scale
            errors[:, k - first : k - first + 1] = (column - kept) / upper[k, k]
        w[:, last:] -= errors @ upper[first:last, last:]
    return quantizer.parts(codes, torch.cat(scales, dim=1), torch.cat(zeros, dim=1))


def calibrate(
    model: Any,  # noqa: ANN401  # a transformers model, untyped here
    config: QuantizationConfig,
    samples: Sequence[Tensor],
    *,
    skip: Sequence[str] = DEFAULT_SKIP,
    progress: Callable[[str], None] = lambda _name: None,
) -> QuantizationReport:
    """Quantise a model's linear layers to int4, in place, decoder layer by decoder layer, on samples of token ids [T].

    Each decoder layer sees what the layers before it, quantised already, make of the samples. The model must be one
    that can be called directly (transformers' own attention). `lm_head` outside the decoder is never calibrated.
    """
    if config.quantization_type is not QuantizationType.INT4:
        raise InvalidInput(f"calibration is for int4, not for {config.quantization_type}; leave the text out")
    if not samples:
        raise InvalidInput("calibration needs text; give a file with at least one window of tokens")
    quantizer = quantizer_of(config)
    assert isinstance(quantizer, Int4Quantizer)
    decoder = model.model
    names = {id(layer): f"model.layers.{i}" for i, layer in enumerate(decoder.layers)}
    report: list[LayerError] = []
    skipped = [name for name, *_ in linear_layers(model) if is_skipped(name, skip)]
    for block in decoder.layers:
        chosen = [
            (f"{names[id(block)]}.{name}", owner, attribute, linear)
            for name, owner, attribute, linear in linear_layers(block)
            if not is_skipped(f"{names[id(block)]}.{name}", skip)
        ]
        moments = _gather(decoder, [linear for *_, linear in chosen], samples)
        for (name, owner, attribute, linear), seen in zip(chosen, moments, strict=True):
            parts = gptq(linear.weight, seen.hessian, quantizer)
            made = QuantizedLinear.from_parts(linear, config, parts)
            report.append(layer_error(name, linear.weight, made))
            setattr(owner, attribute, made)
            progress(name)
    if not report:
        raise InvalidInput(f"no linear layer is left to quantise after skipping {', '.join(skip)}")
    return QuantizationReport(tuple(report), tuple(skipped))


def load_for_calibration(path: Path) -> Any:  # noqa: ANN401  # untyped library
    """A checkpoint in transformers' own code and in its own type; raises InvalidInput for a quantised one."""
    try:
        quantized = quantization_config(AutoConfig.from_pretrained(path, local_files_only=True))
        hf_logging.disable_progress_bar()
        model: Any = quantized or AutoModelForCausalLM.from_pretrained(path, dtype="auto", local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InvalidInput(f"cannot load the model in {path}: {reason}; give a decoder-only checkpoint") from error
    if quantized:
        raise InvalidInput(f"the weights in {path} are quantised already; give the original checkpoint")
    return model.eval().requires_grad_(False)


def text_windows(path: Path, text: Path, count: int) -> list[Tensor]:
    """Up to `count` windows of 256 token ids, evenly spread over a text, by the checkpoint's tokenizer."""
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot read {text} as text ({error}); give a plain UTF-8 text file") from error
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    ids = torch.tensor(tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) < _WINDOW:
        raise InvalidInput(f"{text} makes {len(ids)} tokens; calibration needs at least {_WINDOW}: give more text")
    starts = torch.linspace(0, len(ids) - _WINDOW, min(count, len(ids) // _WINDOW)).long().tolist()
    return [ids[start : start + _WINDOW] for start in starts]


@torch.no_grad()
def _gather(decoder: Any, layers: Sequence[nn.Linear], samples: Sequence[Tensor]) -> list[Moments]:  # noqa: ANN401
    moments = [Moments(layer.in_features) for layer in layers]
    hooks = [
        layer.register_forward_pre_hook(lambda _module, inputs, seen=seen: seen.see(inputs[0]))
        for layer, seen in zip(layers, moments, strict=True)
    ]
    try:
        for ids in samples:
            decoder(ids[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return moments
