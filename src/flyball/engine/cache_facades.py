"""KV caches for programs that bring their own model: a paged one by sequence, and a least-recently-used one by request.

Both stand on the engine's own parts: `BlockPool` knows which block is whose, `PagedTensors` holds the numbers. Keys and
values go in and out as [T, K, D]: T tokens, K key-value heads, D head size.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from flyball.core.errors import InvalidInput, RequestRefused
from flyball.engine.attention import PagedTensors
from flyball.engine.block_pool import BlockPool

Layers = Sequence[tuple[Tensor, Tensor]]  # keys and values of each layer


class CacheFull(RequestRefused):
    """The KV cache has no room for what was asked; nothing was changed."""


@dataclass(slots=True)
class _Sequence:
    blocks: list[int]
    length: list[int]  # tokens written, by layer


class PagedKVCache:
    """Keys and values of many sequences in blocks of fixed size, shared between forks until one of them writes.

    >>> cache = PagedKVCache(block_size=2, num_blocks=3, num_layers=1, num_kv_heads=1, head_dim=1)
    >>> cache.allocate_blocks("a", 3)
    >>> cache.write_kv("a", 0, 0, torch.ones(3, 1, 1), torch.ones(3, 1, 1))
    >>> cache.read_kv("a", 0)[0].flatten().tolist(), cache.num_free_blocks
    ([1.0, 1.0, 1.0], 1)
    """

    def __init__(
        self,
        block_size: int = 16,
        num_blocks: int = 1024,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        if min(block_size, num_blocks, num_layers, num_kv_heads, head_dim) < 1:
            raise InvalidInput("a KV cache needs at least one block, token, layer, head and number in each; give more")
        self.block_size = block_size
        self.block_bytes = 2 * num_layers * block_size * num_kv_heads * head_dim * dtype.itemsize
        self._layers = num_layers
        self._device = device
        self._pool = BlockPool(num_blocks)
        self._tensors = PagedTensors(num_layers, num_blocks, block_size, num_kv_heads, head_dim, dtype, device)
        self._sequences: dict[str, _Sequence] = {}

    def __contains__(self, sequence_id: object) -> bool:
        return sequence_id in self._sequences

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return self._pool.num_idle

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold some tokens."""
        return -(-tokens // self.block_size)

    def releasable(self, sequence_ids: Iterable[str]) -> int:
        """Blocks that would be free if these sequences were: those that nobody else shares."""
        held = Counter(block for sequence_id in sequence_ids for block in self._of(sequence_id).blocks)
        return sum(self._pool.ref_counts[block] == count for block, count in held.items())

    def missing(self, sequence_id: str, position: int, tokens: int) -> int:
        """Blocks that writing so many tokens from a position on would take: new ones, and copies of shared ones."""
        sequence = self._of(sequence_id)
        last = self.blocks_for(position + tokens)
        return max(0, last - len(sequence.blocks)) + len(self._shared(sequence, position // self.block_size, last))

    def length(self, sequence_id: str) -> int:
        """Tokens that are written in every layer."""
        return min(self._of(sequence_id).length)

    def allocate_blocks(self, sequence_id: str, num_tokens: int) -> None:
        """Make room for that many tokens in all; what the sequence holds and has written stays.

        Raises CacheFull, and then nothing has changed.
        """
        sequence = self._sequences.get(sequence_id, _Sequence([], [0] * self._layers))
        missing = self.blocks_for(num_tokens) - len(sequence.blocks)
        if missing > 0:
            sequence.blocks += self._take(missing)
        self._sequences[sequence_id] = sequence

    def write_kv(self, sequence_id: str, layer: int, position: int, keys: Tensor, values: Tensor) -> None:
        """Write T tokens from a position on, which must leave no gap; room is made for them, all or none.

        Blocks shared with a fork are copied first.
        """
        sequence = self._of(sequence_id)
        written = sequence.length[layer]
        if not 0 <= position <= written:
            raise InvalidInput(
                f"position {position} of {sequence_id!r} leaves a gap: layer {layer} holds {written} tokens; "
                "write the ones between first"
            )
        end = position + len(keys)
        shared = self._shared(sequence, position // self.block_size, self.blocks_for(end))
        fresh = self._take(self.missing(sequence_id, position, len(keys)))
        for place, copy in zip(shared, fresh, strict=False):
            self._move(sequence, place, copy)
        sequence.blocks += fresh[len(shared) :]
        slots = self._slots(sequence)[position:end]
        self._tensors.write(layer, slots, keys.to(self._tensors.keys[layer]), values.to(self._tensors.values[layer]))
        sequence.length[layer] = max(sequence.length[layer], end)

    def read_kv(self, sequence_id: str, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of every token written, in order, each [T, K, D]."""
        sequence = self._of(sequence_id)
        slots = self._slots(sequence)[: sequence.length[layer]]
        return self._tensors.keys[layer].index_select(0, slots), self._tensors.values[layer].index_select(0, slots)

    def fork(self, sequence_id: str, new_id: str) -> None:
        """Begin a sequence with another's tokens, without copying them."""
        if new_id in self._sequences:
            raise InvalidInput(f"sequence {new_id!r} exists; free it first or choose another name")
        source = self._of(sequence_id)
        self._pool.claim(source.blocks)
        self._sequences[new_id] = _Sequence(list(source.blocks), list(source.length))

    def free(self, sequence_id: str) -> None:
        """Return a sequence's blocks; an unknown one is ignored."""
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is not None:
            self._pool.release(sequence.blocks)

    def check_integrity(self) -> None:
        """Assert that every block is somebody's or free; for tests."""
        self._pool.check_integrity(sequence.blocks for sequence in self._sequences.values())

    def _of(self, sequence_id: str) -> _Sequence:
        try:
            return self._sequences[sequence_id]
        except KeyError:
            raise InvalidInput(f"there is no sequence {sequence_id!r}; allocate its blocks first") from None

    def _take(self, count: int) -> list[int]:
        taken = self._pool.take(count)
        if taken is None:
            raise CacheFull(f"{count} KV blocks are needed and {self._pool.num_idle} are free; free a sequence first")
        return taken

    def _shared(self, sequence: _Sequence, first: int, last: int) -> list[int]:
        places = range(first, min(last, len(sequence.blocks)))
        return [place for place in places if self._pool.ref_counts[sequence.blocks[place]] > 1]

    def _move(self, sequence: _Sequence, place: int, copy: int) -> None:
        """Give a sequence a copy of its own of a shared block."""
        size, old = self.block_size, sequence.blocks[place]
        for cache in (*self._tensors.keys, *self._tensors.values):
            cache[copy * size : (copy + 1) * size] = cache[old * size : (old + 1) * size]
        self._pool.release([old])
        sequence.blocks[place] = copy

    def _slots(self, sequence: _Sequence) -> Tensor:
        blocks = torch.tensor(sequence.blocks, dtype=torch.long, device=self._device)
        return (blocks[:, None] * self.block_size + torch.arange(self.block_size, device=self._device)).flatten()


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """What a `KVCacheManager` holds and has seen."""

    entries: int
    size_bytes: int
    max_bytes: int
    hits: int
    misses: int
    evictions: int


class KVCacheManager:
    """KV caches of whole requests within a budget of bytes; the least recently used of those not in use goes first."""

    def __init__(
        self,
        max_cache_size_gb: float,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        block_bytes = 2 * num_layers * block_size * num_kv_heads * head_dim * dtype.itemsize
        blocks = int(max_cache_size_gb * 2**30 // block_bytes)
        if blocks < 1:
            raise InvalidInput(
                f"max_cache_size_gb={max_cache_size_gb} holds no block of {block_bytes} bytes; give more"
            )
        self._pages = PagedKVCache(
            block_size, blocks, num_layers=num_layers, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype,
            device=device,
        )  # fmt: skip
        self._blocks = blocks
        self._layers = num_layers
        self._pins: OrderedDict[str, int] = OrderedDict()  # by request, least recently used first: how often in use
        self._hits = self._misses = self._evictions = 0

    def set_cache(self, request_id: str, cache: Layers) -> None:
        """Store a request's keys and values, in place of what was stored for it.

        Raises CacheFull, and then nothing has changed, where it exceeds the budget or what is not in use.
        """
        tokens = self._check(cache)
        own = self._pages.releasable([request_id]) if request_id in self._pages else 0
        self._make_room(self._pages.blocks_for(tokens) - own, keep=request_id)
        pins = self._pins.get(request_id, 0)
        self._pages.free(request_id)
        self._pages.allocate_blocks(request_id, tokens)
        self._write(request_id, cache, 0)
        self._pins[request_id] = pins
        self._pins.move_to_end(request_id)

    def extend_cache(self, request_id: str, cache: Layers) -> None:
        """Append tokens to a stored cache; what is stored is not copied.

        Raises InvalidInput where nothing is stored, and CacheFull, and then nothing has changed.
        """
        length = self._pages.length(request_id)
        self._make_room(self._pages.missing(request_id, length, self._check(cache)), keep=request_id)
        self._write(request_id, cache, length)
        self._pins.move_to_end(request_id)

    def get_cache(self, request_id: str) -> list[tuple[Tensor, Tensor]] | None:
        """Keys and values of each layer, or None where nothing is stored (any more); counted as hit or miss."""
        if request_id not in self._pages:
            self._misses += 1
            return None
        self._hits += 1
        self._pins.move_to_end(request_id)
        return [self._pages.read_kv(request_id, layer) for layer in range(self._layers)]

    def fork(self, request_id: str, new_id: str) -> None:
        """Store for another request what is stored for this one, sharing the memory until one of them grows."""
        self._pages.fork(request_id, new_id)
        self._pins[new_id] = 0

    def delete_cache(self, request_id: str) -> None:
        """Forget a request; an unknown one is ignored."""
        self._pages.free(request_id)
        self._pins.pop(request_id, None)

    @contextmanager
    def using(self, request_id: str) -> Iterator[None]:
        """While in use, a request's cache is never evicted."""
        if request_id not in self._pages:
            raise InvalidInput(f"nothing is stored for request {request_id!r}; set its cache first")
        self._pins[request_id] += 1
        try:
            yield
        finally:
            if request_id in self._pins:
                self._pins[request_id] -= 1

    def stats(self) -> CacheStats:
        """Sizes of now, counts since the start; the size is what the blocks in use take."""
        used = self._blocks - self._pages.num_free_blocks
        return CacheStats(
            entries=len(self._pins),
            size_bytes=used * self._pages.block_bytes,
            max_bytes=self._blocks * self._pages.block_bytes,
            hits=self._hits,
            misses=self._misses,
            evictions=self._evictions,
        )

    def _check(self, cache: Layers) -> int:
        lengths = {len(tensor) for pair in cache for tensor in pair}
        if len(cache) != self._layers or len(lengths) != 1:
            raise InvalidInput(
                f"a cache of {len(cache)} layers with {sorted(lengths)} tokens was given; "
                f"give keys and values of {self._layers} layers, all of one length"
            )
        return lengths.pop()

    def _make_room(self, blocks: int, *, keep: str) -> None:
        """Evict until that many blocks are free; refuse before anything is lost if that cannot be."""
        if blocks <= self._pages.num_free_blocks:
            return
        idle = [request_id for request_id, pins in self._pins.items() if not pins and request_id != keep]
        most = self._pages.num_free_blocks + self._pages.releasable(idle)
        if blocks > most:
            raise CacheFull(
                f"{blocks} more KV blocks are needed and {most} can be had beside what is in use; "
                "raise max_cache_size_gb or delete a cache"
            )
        while self._pages.num_free_blocks < blocks:
            self.delete_cache(idle.pop(0))
            self._evictions += 1

    def _write(self, request_id: str, cache: Layers, position: int) -> None:
        for layer, (keys, values) in enumerate(cache):
            self._pages.write_kv(request_id, layer, position, keys, values)
