"""Paged attention behind the one function that transformers' modelling code calls.

A step is flat: decode tokens and prefill chunks of many requests stand in one row of T tokens. `StepBatch` says whose
they are; `paged_attention` writes their keys and values into the paged cache and attends each query to its own past.

Symbols: T tokens of the step, H query heads, K key-value heads, G = H / K, D head size, S cache positions.
Decode rows are gathered block by block into a few padded groups of similar length; each prefill chunk attends alone.
On CUDA torch's varlen kernel reads the blocks where they lie, in one call for all; `varlen_trouble` tries it first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from flyball.core.errors import InvalidInput

NAME = "flyball_paged"


class PagedTensors:
    """Keys and values of every layer, each [(blocks + 1) * block_size, K, D]; it knows no request.

    The block after the last is never written: tables are padded with it, and what is masked must be finite, since
    0 times not-a-number is not 0.
    """

    def __init__(
        self, layers: int, blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str
    ) -> None:
        shape = ((blocks + 1) * block_size, kv_heads, head_dim)
        # Zeroed pages of a CPU tensor take no memory before they are first written.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.block_size = block_size
        self.padding = blocks

    def clear(self, blocks: Tensor) -> None:
        """Zero some blocks [N], after a request left in them what is not a number."""
        for cache in (*self.keys, *self.values):
            cache.view(-1, self.block_size * cache[0].numel()).index_fill_(0, blocks, 0.0)

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store the step's keys and values, each [T, K, D], at their slots [T]."""
        self.keys[layer].index_copy_(0, slots, keys)
        self.values[layer].index_copy_(0, slots, values)

    def gather(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of some tables [B, M] as [B, K, M * block_size, D] views."""
        rows, width = blocks.shape
        out = []
        for cache in (self.keys[layer], self.values[layer]):
            _, heads, dim = cache.shape
            flat = cache.view(-1, self.block_size * heads * dim).index_select(0, blocks.flatten())
            out.append(flat.view(rows, width * self.block_size, heads, dim).transpose(1, 2))
        return out[0], out[1]


@dataclass(slots=True)
class DecodeGroup:
    """Rows with one query each and similar lengths, padded to the longest."""

    rows: Tensor  # [B] places in the flat step
    blocks: Tensor  # [B, M] block tables, padded
    lengths: Tensor  # [B] positions to attend to, the query's own included
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, block_size: int) -> Tensor:
        """Which of the M * block_size gathered positions each row sees, [B, 1, 1, S] bool."""
        if window not in self._masks:
            places = torch.arange(self.blocks.shape[1] * block_size, device=self.blocks.device)[None, :]
            seen = places < self.lengths[:, None]
            if window is not None:
                seen &= places >= (self.lengths - window)[:, None]
            self._masks[window] = seen[:, None, None, :]
        return self._masks[window]


@dataclass(slots=True)
class PrefillChunk:
    """Some consecutive tokens of one request."""

    first: int  # place in the flat step
    count: int
    past: int  # positions before the chunk
    blocks: Tensor  # [1, M] block table up to the chunk's end
    _masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor | None:
        """What each query of the chunk sees, [count, past + count] bool; None: plain causal from position 0."""
        if window is not None and self.past + self.count <= window:
            window = None
        if window not in self._masks:
            if self.past == 0 and window is None:
                self._masks[window] = None
            else:
                device = self.blocks.device
                query = torch.arange(self.past, self.past + self.count, device=device)[:, None]
                place = torch.arange(self.past + self.count, device=device)[None, :]
                seen = place <= query
                self._masks[window] = seen if window is None else seen & (place > query - window)
        return self._masks[window]


@dataclass(slots=True)
class VarlenStep:
    """A step of N requests as `torch.nn.attention.varlen.varlen_attn` takes it; integers are int32."""

    cu_seq_q: Tensor  # [N + 1] where each request's queries begin in the flat step
    lengths: Tensor  # [N] positions of each request, the step's own included
    blocks: Tensor  # [N, M] block tables, padded
    max_q: int
    max_k: int

    def attend(
        self, query: Tensor, cache: PagedTensors, layer: int, scaling: float | None, window: int | None
    ) -> Tensor:
        """Causal attention of query [T, H, D] to the cached past, [T, H, D]."""
        from torch.nn.attention.varlen import varlen_attn  # CUDA only: it loads slowly and not everywhere

        keys, values = (t.view(-1, cache.block_size, *t.shape[1:]) for t in (cache.keys[layer], cache.values[layer]))
        seen = varlen_attn(
            query, keys, values, self.cu_seq_q, None, self.max_q, self.max_k, scale=scaling,
            window_size=(-1 if window is None else window - 1, 0), enable_gqa=keys.shape[2] != query.shape[1],
            seqused_k=self.lengths, block_table=self.blocks,
            num_splits=1,  # a request's bits must not depend on its company
        )  # fmt: skip
        assert isinstance(seen, Tensor)  # a pair only where the sums of exponentials are asked for
        return seen


@dataclass(slots=True)
class StepBatch:
    """Where each token of a flat step belongs; made once a step, read by every layer."""

    cache: PagedTensors
    slots: Tensor  # [T] cache slot of each token
    decodes: Sequence[DecodeGroup]
    prefills: Sequence[PrefillChunk]
    alone: bool  # the decode rows are the whole step, in order: no scatter is needed
    varlen: VarlenStep | None = None  # then decodes and prefills are empty


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001  # transformers makes none for our attention
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    paged: StepBatch | None = None,
    **ignored: Any,  # noqa: ANN401  # whatever else a model's code passes
) -> tuple[Tensor, None]:
    """Attend the flat step: query [1, H, T, D], key and value [1, K, T, D] to [1, T, H, D]."""
    if paged is None:
        raise InvalidInput("this model was loaded for Flyball's engine; load it anew to call it directly")
    if ignored.get("s_aux") is not None:
        raise InvalidInput("attention sinks are not supported; serve a model without them")
    if not getattr(module, "is_causal", True):
        raise InvalidInput("bidirectional attention is not supported; serve a decoder-only model")
    layer: int = module.layer_idx  # type: ignore[assignment]
    cache = paged.cache
    keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    cache.write(layer, paged.slots, keys, values)
    if paged.varlen is not None:
        return paged.varlen.attend(query[0].transpose(0, 1), cache, layer, scaling, sliding_window)[None], None
    heads, tokens, dim = query.shape[1:]
    kv_heads = keys.shape[1]
    out = query.new_empty((tokens, heads, value.shape[-1]))
    for group in paged.decodes:
        rows = query[0].transpose(0, 1) if paged.alone else query[0].index_select(1, group.rows).transpose(0, 1)
        grouped = rows.reshape(-1, kv_heads, heads // kv_heads, dim)
        past_keys, past_values = cache.gather(layer, group.blocks)
        mask = group.mask(sliding_window, cache.block_size)
        seen = _attend(grouped, past_keys, past_values, mask, scaling, softcap)
        if paged.alone:
            out = seen.reshape(-1, heads, value.shape[-1])
        else:
            out.index_copy_(0, group.rows, seen.reshape(-1, heads, value.shape[-1]))
    for chunk in paged.prefills:
        here = slice(chunk.first, chunk.first + chunk.count)
        if chunk.past == 0:
            k, v = key[:, :, here], value[:, :, here]
        else:
            length = chunk.past + chunk.count
            k, v = (t[:, :, :length] for t in cache.gather(layer, chunk.blocks))
        out[here] = _attend(query[:, :, here], k, v, chunk.mask(sliding_window), scaling, softcap)[0].transpose(0, 1)
    return out[None], None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None
) -> Tensor:
    """[B, H, Q, D] queries on [B, K, S, D] keys; mask None means causal over equal lengths."""
    if softcap is None:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None and query.shape[2] > 1, scale=scaling,
            enable_gqa=grouped,
        )  # fmt: skip
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1:
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    scores = query @ key.transpose(-1, -2) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32).to(query.dtype)
    return weights @ value


def varlen_trouble(cache: PagedTensors, heads: int, softcap: float | None) -> str | None:
    """Why torch's varlen kernel cannot be used with this cache, or None: then a trial gave what gathering gives.

    The trial is a prefill chunk with a past and a decode, with and without a sliding window, in the cache's first
    blocks, which are zeroed again.
    """
    keys = cache.keys[0]
    if keys.device.type != "cuda":
        return f"it runs on CUDA, not on {keys.device.type}"
    if softcap is not None:
        return "it knows no soft cap"
    return trial(cache, heads)


def trial(cache: PagedTensors, heads: int) -> str | None:
    """Compare the varlen kernel with gathering, on random values in the cache's first blocks."""
    size, (_, kv_heads, dim), device = cache.block_size, cache.keys[0].shape, cache.keys[0].device
    if cache.padding < 3:
        return "the cache is too small to try it"
    generator = torch.Generator(device).manual_seed(0)

    def integers(values: Sequence[object], dtype: torch.dtype = torch.long) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(cache.keys[0].dtype)

    past, count, length = size - 1, 4, size // 2 + 1  # a chunk over the end of block 0 into 2, and a decode in block 1
    slots = integers([past, 2 * size, 2 * size + 1, 2 * size + 2, size + length - 1])
    groups = [DecodeGroup(integers([count]), integers([[1]]), integers([length]))]
    chunks = [PrefillChunk(0, count, past, integers([[0, 2]]))]
    gathered = StepBatch(cache, slots, groups, chunks, alone=False)
    ints = torch.int32
    step = VarlenStep(
        cu_seq_q=integers([0, count, count + 1], ints), lengths=integers([past + count, length], ints),
        blocks=integers([[0, 2], [1, cache.padding]], ints), max_q=count, max_k=past + count,
    )  # fmt: skip
    layer = torch.nn.Module()
    layer.layer_idx = 0  # type: ignore[assignment]
    try:
        for window in (None, 3):
            for tensor in (cache.keys[0], cache.values[0]):
                tensor[: 3 * size] = random(3 * size, kv_heads, dim)
            query, key, value = (random(1, n, count + 1, dim) for n in (heads, kv_heads, kv_heads))
            expected, seen = (
                paged_attention(layer, query, key, value, None, sliding_window=window, paged=batch)[0]
                for batch in (gathered, StepBatch(cache, slots, [], [], alone=False, varlen=step))
            )
            if not torch.allclose(seen, expected, atol=0.02, rtol=0.02):
                return "its result differs from what gathering gives"
    except (RuntimeError, TypeError, ImportError) as error:
        return str(error).splitlines()[0][:120]
    finally:
        cache.clear(integers([0, 1, 2]))
    return None


AttentionInterface.register(NAME, paged_attention)
