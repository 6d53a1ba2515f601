"""The model and its tensors: load a Hugging Face checkpoint, lay a step out flat, run it, return the sampled rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.initialization import no_init_weights
from transformers.utils import logging as hf_logging

from flyball.core.errors import InvalidInput
from flyball.engine.attention import (
    NAME,
    DecodeGroup,
    PagedTensors,
    PrefillChunk,
    StepBatch,
    VarlenStep,
    varlen_trouble,
)
from flyball.engine.config import EngineConfig, pool_blocks
from flyball.engine.cpu.build import KernelsUnavailable
from flyball.engine.cpu.fused import FusedModel
from flyball.engine.cpu.quantized import FORMATS, QuantizedFusedModel
from flyball.engine.quantization.files import METHOD, load_quantized
from flyball.engine.quantization.walk import parameter_count, quantization_config, quantization_of, quantize_loaded
from flyball.engine.scheduler import Scheduled

# Decode rows are sorted by length and cut where padding would exceed this share of the gathered positions.
_PADDING_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What the engine needs to know of a checkpoint."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    dtype: torch.dtype
    eos_token_ids: frozenset[int]

    def block_bytes(self, block_size: int) -> int:
        """Bytes of one KV block over all layers."""
        return 2 * self.layers * block_size * self.kv_heads * self.head_dim * self.dtype.itemsize


class ModelRunner:
    """Holds the weights and the paged cache; computes one flat step at a time."""

    def __init__(self, config: EngineConfig) -> None:
        self.model, self.shape = load_model(config.model, config.dtype, config.device)
        if config.quantization is not None:
            quantize_loaded(self.model, config.quantization, head=config.quantize_head)
        self.quantization = quantization_of(self.model)
        self.device = config.device
        self.block_size = config.block_size
        self.num_blocks = pool_blocks(config, self.shape.block_bytes(config.block_size), self.shape.max_positions)
        self.parameters = parameter_count(self.model)
        s = self.shape
        self.cache = PagedTensors(
            s.layers, self.num_blocks, config.block_size, s.kv_heads, s.head_dim, s.dtype, config.device
        )
        self.fused: FusedModel | None = None
        self._hidden: Tensor | None = None
        self.kernels = "torch"  # what computes the steps, and why not something faster
        if config.kernels != "torch":
            try:
                self.fused = self._fused()
                self.kernels = "compiled"
            except KernelsUnavailable as reason:
                if config.kernels == "compiled":
                    raise InvalidInput(
                        f"kernels=compiled cannot be used: {reason}; use kernels=auto or torch"
                    ) from None
                self.kernels = f"torch ({reason})"
        self.varlen = False  # one call for all attention of a step; else blocks are gathered
        if config.device.startswith("cuda"):
            trouble = varlen_trouble(self.cache, s.heads, getattr(self.model.config, "attn_logit_softcapping", None))
            self.varlen = trouble is None
            self.kernels = f"torch, {f'gathered attention ({trouble})' if trouble else 'varlen attention'}"

    def _fused(self) -> FusedModel:
        kind = QuantizedFusedModel if self.quantization in FORMATS else FusedModel
        if self.quantization and kind is FusedModel:
            raise KernelsUnavailable(f"the kernels do not know weights in {self.quantization}")
        return kind(self.model, self.cache, self.shape.max_positions)

    def describe(self) -> dict[str, str | int | None]:
        """What was loaded, for people and dashboards."""
        return {
            "architecture": type(self.model).__name__,
            "parameters": self.parameters,
            "dtype": str(self.shape.dtype).removeprefix("torch."),
            "device": self.device,
            "quantization": self.quantization,
            "kernels": self.kernels,
            "vocab_size": self.shape.vocab_size,
            "kv_cache_bytes": self.num_blocks * self.shape.block_bytes(self.block_size),
        }

    @torch.inference_mode()
    def forward(self, parts: Sequence[Scheduled]) -> Tensor:
        """Compute a step; returns logits [R, V] of the parts that sample, in their order."""
        if self.fused is not None:
            return self.fused.forward(parts)
        ids: list[int] = []
        positions: list[int] = []
        sampled: list[int] = []
        for part in parts:
            ids += part.request.tokens(part.start, part.start + part.count)
            positions += range(part.start, part.start + part.count)
            if part.samples:
                sampled.append(len(ids) - 1)
        logits: Tensor = self.model(
            input_ids=self._long([ids]),
            position_ids=self._long([positions]),
            use_cache=False,
            logits_to_keep=self._long(sampled),
            paged=self._batch(parts, positions),
        ).logits
        return logits[0]

    @property
    def weight_bytes(self) -> int:
        """Resident memory of all weights, in whatever form they are kept; tied ones count once."""
        if self.fused is not None:
            return self.fused.weight_bytes
        kept = {t.data_ptr(): t.nbytes for t in (*self.model.parameters(), *self.model.buffers())}
        return sum(kept.values())

    def states(self) -> Tensor | None:
        """States [R, d] before the output layer, of the rows that the last step sampled; None: they are not kept."""
        return self._hidden if self.fused is None else self.fused.states()

    def keep_hidden(self) -> None:
        """Keep the states of sampled rows of each step from now on."""
        if self.fused is not None:  # which leaves them behind anyway
            return

        def keep(_module: Any, inputs: tuple[Tensor, ...]) -> None:  # noqa: ANN401  # untyped
            self._hidden = inputs[0][0]

        self.model.get_output_embeddings().register_forward_pre_hook(keep)

    def logits_of(self, states: Tensor) -> Tensor:
        """Logits of states [R, d] as the output layer makes them."""
        if self.fused is not None:
            return self.fused.logits_of(states)
        layer = self.model.get_output_embeddings()
        logits: Tensor = type(layer).forward(layer, states)  # without the hook that keeps what goes in
        return logits

    def clear(self, blocks: list[int]) -> None:
        """Zero KV blocks that hold what is not a number, before others get them."""
        self.cache.clear(self._long(blocks))

    def _batch(self, parts: Sequence[Scheduled], positions: list[int]) -> StepBatch:
        size = self.block_size
        slots: list[int] = []
        decodes: list[tuple[int, Scheduled]] = []
        prefills: list[PrefillChunk] = []
        place = 0
        for part in parts:
            table = part.request.block_table
            slots += [table[p // size] * size + p % size for p in positions[place : place + part.count]]
            if part.count == 1:
                decodes.append((place, part))
            elif not self.varlen:
                needed = table[: -(-(part.start + part.count) // size)]
                prefills.append(PrefillChunk(place, part.count, part.start, self._long([needed])))
            place += part.count
        if self.varlen:
            return StepBatch(self.cache, self._long(slots), [], [], alone=False, varlen=self._varlen(parts))
        groups = self._decode_groups(decodes)
        alone = len(groups) == 1 and not prefills
        return StepBatch(self.cache, self._long(slots), groups, prefills, alone)

    def _varlen(self, parts: Sequence[Scheduled]) -> VarlenStep:
        counts = [part.count for part in parts]
        ends = [part.start + part.count for part in parts]
        width = max(-(-end // self.block_size) for end in ends)
        tables = [part.request.block_table[:width] for part in parts]
        padded = [table + [self.cache.padding] * (width - len(table)) for table in tables]
        return VarlenStep(
            cu_seq_q=self._int32([0, *accumulate(counts)]), lengths=self._int32(ends), blocks=self._int32(padded),
            max_q=max(counts), max_k=max(ends),
        )  # fmt: skip

    def _decode_groups(self, decodes: list[tuple[int, Scheduled]]) -> list[DecodeGroup]:
        """Group rows of similar length, so that gathered padding stays small; order is kept within one group."""
        if not decodes:
            return []
        size = self.block_size
        widths = {id(part): part.start // size + 1 for _, part in decodes}
        total = sum(widths.values())
        if len(decodes) * max(widths.values()) <= total * (1 + _PADDING_SHARE):
            return [self._group(decodes, widths)]
        groups: list[DecodeGroup] = []
        current: list[tuple[int, Scheduled]] = []
        for item in sorted(decodes, key=lambda d: -widths[id(d[1])]):
            widest = widths[id(current[0][1])] if current else 0
            if current and widths[id(item[1])] * 2 <= widest:
                groups.append(self._group(current, widths))
                current = []
            current.append(item)
        groups.append(self._group(current, widths))
        return groups

    def _group(self, decodes: list[tuple[int, Scheduled]], widths: dict[int, int]) -> DecodeGroup:
        decodes = sorted(decodes, key=lambda d: d[0])  # in the step's order, so that a lone group needs no scatter
        width = max(widths[id(part)] for _, part in decodes)
        tables = [part.request.block_table[: widths[id(part)]] for _, part in decodes]
        padded = [table + [self.cache.padding] * (width - len(table)) for table in tables]
        return DecodeGroup(
            self._long([place for place, _ in decodes]),
            self._long(padded),
            self._long([part.start + 1 for _, part in decodes]),
        )

    def _int32(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def _long(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


def load_model(path: Path, dtype: str, device: str) -> tuple[Any, ModelShape]:
    """Load a local decoder-only checkpoint through transformers with Flyball's attention."""
    if not (path / "config.json").is_file():
        raise InvalidInput(f"{path} holds no config.json; give a folder with a Hugging Face checkpoint")
    hf_logging.disable_progress_bar()
    try:
        raw = AutoConfig.from_pretrained(path, local_files_only=True)
        described = quantization_config(raw)
        if described.get("quant_method") == METHOD:
            model = _load_ours(path, raw, described, dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                attn_implementation=NAME,
                local_files_only=True,
            )
    except ImportError as error:
        method = described.get("quant_method", "an unknown method")
        raise InvalidInput(
            f"the weights in {path} are quantised with {method}, which transformers cannot load here "
            f"({str(error).strip().splitlines()[0]}); install what it names, or quantise the original with "
            "flyball quantize"
        ) from error
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InvalidInput(
            f"cannot load the model in {path}: {reason}; give a decoder-only checkpoint that transformers can load"
        ) from error
    model = model.to(device).eval().requires_grad_(False)
    eos = model.generation_config.eos_token_id if model.generation_config else raw.eos_token_id
    return model, shape_of(raw, model.dtype, eos)


def _load_ours(path: Path, raw: Any, described: Mapping[str, Any], dtype: str) -> Any:  # noqa: ANN401  # untyped library
    """A checkpoint that `flyball quantize` wrote: the architecture without content, then what was saved."""
    del raw.quantization_config
    wanted = getattr(raw, "dtype", None) or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(raw, dtype=wanted, attn_implementation=NAME)
    load_quantized(path, model, described)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model


def read_shape(path: Path, dtype: str) -> ModelShape:
    """The sizes of a checkpoint, without its weights; raises InvalidInput where it cannot be read."""
    try:
        raw = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InvalidInput(f"cannot read the model in {path}: {reason}; give a decoder-only checkpoint") from error
    own = getattr(raw, "dtype", None) or torch.float32
    return shape_of(raw, own if dtype == "auto" else getattr(torch, dtype), raw.eos_token_id)


def shape_of(raw: Any, dtype: torch.dtype, eos: int | list[int] | None) -> ModelShape:  # noqa: ANN401  # untyped here
    """The sizes that a checkpoint's configuration tells."""
    config = raw.get_text_config(decoder=True)
    heads = config.num_attention_heads
    return ModelShape(
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        dtype=dtype,
        eos_token_ids=frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos]),
    )


def load_tokenizer(path: Path) -> Any:  # noqa: ANN401  # transformers is untyped here
    """The checkpoint's tokenizer, or None where the folder has none."""
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    return AutoTokenizer.from_pretrained(path, local_files_only=True)
