"""The truth about KV memory: which block is whose, which still holds a known prefix, which goes next.

A block is *used* (some request's table holds it), *cached* (nobody's, but its content is known by hash and a new
request may claim it) or *free*. Free blocks go first; then cached ones, the least recently used or the oldest first.
A limit below the pool's size may be set at any time: cached blocks are given up for it, used ones are never touched.
No tensor and no request is known here.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Literal

import numpy as np

from flyball.core.errors import EngineFailed

Eviction = Literal["lru", "fifo"]


def hash_block(parent: bytes, tokens: Sequence[int], extra: bytes = b"") -> bytes:
    """Name a full block by its content and everything before it (128 bits of BLAKE2b).

    `extra` separates what must not be shared: a tenant's salt.

    >>> hash_block(b"", [1, 2]) == hash_block(b"", [1, 2])
    True
    >>> hash_block(hash_block(b"", [1, 2]), [3, 4]) == hash_block(b"", [3, 4])
    False
    """
    key = extra if len(extra) <= 64 else blake2b(extra).digest()
    digest = blake2b(parent, digest_size=16, key=key)
    digest.update(np.asarray(tokens, dtype=np.int32).tobytes())
    return digest.digest()


class BlockPool:
    """A fixed number of KV blocks with reference counts, prefix lookup by hash and eviction."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.limit = num_blocks  # most blocks with content, used and cached together
        self.eviction: Eviction = "lru"
        self.evictions = 0  # cached blocks whose content was given up for room
        self.ref_counts = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._named_at = [0] * num_blocks  # a count of namings: the age of a block's content
        self._namings = 0
        self._free = list(range(num_blocks - 1, -1, -1))  # taken from the end: memory just left is still warm
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._by_age: list[tuple[int, int]] = []  # under fifo, a heap of (named at, block) that holds all cached ones

    @property
    def num_cached(self) -> int:
        """Blocks of nobody whose content is known."""
        return len(self._cached)

    @property
    def num_idle(self) -> int:
        """Free and cached blocks."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks held by at least one request."""
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def room(self) -> int:
        """Blocks that can be taken under the limit."""
        return max(0, self.limit - self.num_used)

    def take(self, count: int, *, limited: bool = True) -> list[int] | None:
        """Hand out blocks with one reference each; None, and no change, if too few."""
        if count > (self.room if limited else self.num_idle):
            return None
        taken = []
        for _ in range(count):
            if not self._free or self._full:
                self._evict()
            block = self._free.pop()
            self.ref_counts[block] = 1
            taken.append(block)
        return taken

    def lookup(self, hashes: Iterable[bytes]) -> list[int]:
        """The longest run of leading hashes that the pool knows, as blocks; takes no reference."""
        found = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def num_idle_among(self, blocks: Iterable[int]) -> int:
        """How many of these blocks would become used if they were claimed."""
        return sum(self.ref_counts[block] == 0 for block in blocks)

    def claim(self, blocks: Iterable[int]) -> None:
        """Add one reference to each block; cached ones become used."""
        for block in blocks:
            if self.ref_counts[block] == 0:
                del self._cached[block]
            self.ref_counts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference from each block of a table, given in table order.

        The last blocks of a chain are evicted first, so that a prefix outlives its continuations; blocks without a
        known content are free at once, since nothing is lost with them.
        """
        for block in reversed(blocks):
            self.ref_counts[block] -= 1
            assert self.ref_counts[block] >= 0, f"block {block} released more often than taken"
            if self.ref_counts[block] == 0:
                if self._hash_of[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None
                    if self.eviction == "fifo":
                        heapq.heappush(self._by_age, (self._named_at[block], block))
        self._trim()

    def name(self, block: int, digest: bytes) -> None:
        """Remember the content of a full block; a second block of equal content stays nameless."""
        if self._hash_of[block] is None and digest not in self._block_of:
            self._hash_of[block] = digest
            self._block_of[digest] = block
            self._namings += 1
            self._named_at[block] = self._namings

    def flush(self) -> int:
        """Forget every known content, at once and under load; tables in use keep their blocks. Returns how many."""
        count = len(self._block_of)
        for block in self._block_of.values():
            self._hash_of[block] = None
        self._block_of.clear()
        self._free += self._cached
        self._cached.clear()
        self._by_age.clear()
        return count

    def set_policy(self, *, limit: int, eviction: Eviction) -> None:
        """Set the limit, giving up cached blocks for it, and which cached block goes first."""
        self.limit = limit
        if eviction != self.eviction:
            self.eviction = eviction
            self._age_anew()
        self._trim()

    def check_idle(self) -> None:
        """Raise EngineFailed unless no block is used: the cheap form of `check_integrity`, when no request is left."""
        if self.num_used or any(self.ref_counts):
            raise EngineFailed(
                f"{self.num_used} of {self.num_blocks} KV blocks are still held though no request is left; "
                "this is an error of the engine's: restart it and report what was sent"
            )

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that counts, queues and hashes agree with the tables that hold blocks; O(pool), for tests."""
        held = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), "a table holds one block twice"
            for block in table:
                held[block] += 1
        assert held == self.ref_counts, "reference counts differ from the tables"
        assert len(set(self._free)) == len(self._free), "a free block is listed twice"
        named = {digest: block for block, digest in enumerate(self._hash_of) if digest is not None}
        assert named == self._block_of, "hashes and blocks disagree"
        cached = {block for block in named.values() if held[block] == 0}
        assert set(self._cached) == cached, "cached blocks are those of nobody with a known content"
        idle = {block for block, count in enumerate(held) if count == 0}
        assert set(self._free) == idle - cached, "free blocks are those of nobody without one"
        assert len(idle) + self.num_used == self.num_blocks, "used, cached and free blocks make up the pool"
        assert self._cached.keys() <= {block for _, block in self._by_age} or self.eviction == "lru", "age unknown"

    @property
    def _full(self) -> bool:
        """Whether a block with content must go before another may come."""
        return bool(self._cached) and self.num_blocks - len(self._free) >= self.limit

    def _trim(self) -> None:
        while self._cached and self.num_blocks - len(self._free) > self.limit:
            self._evict()

    def _evict(self) -> None:
        """Free the cached block whose content is worth least."""
        block = self._oldest() if self.eviction == "fifo" else next(iter(self._cached))
        del self._cached[block]
        digest = self._hash_of[block]
        assert digest is not None
        del self._block_of[digest]
        self._hash_of[block] = None
        self._free.append(block)
        self.evictions += 1

    def _oldest(self) -> int:
        if len(self._by_age) > 2 * self.num_blocks:  # a block claimed and released again and again is listed as often
            self._age_anew()
        while True:
            age, block = heapq.heappop(self._by_age)
            if block in self._cached and self._named_at[block] == age:
                return block

    def _age_anew(self) -> None:
        fifo = self.eviction == "fifo"
        self._by_age = [(self._named_at[block], block) for block in self._cached] if fifo else []
        heapq.heapify(self._by_age)
