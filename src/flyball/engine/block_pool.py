"""The truth about KV memory: which block is whose, which still holds a known prefix, which goes next.

A block is *used* (some request's table holds it), *cached* (nobody's, but its content is known by hash and a new
request may claim it) or *free*. Cached and free blocks stand in one queue, least recently used first, kept as two
integer arrays so that taking a block out of the middle is O(1). No tensor and no request is known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np


def hash_block(parent: bytes, tokens: Sequence[int], extra: bytes = b"") -> bytes:
    """Name a full block by its content and everything before it (128 bits of BLAKE2b).

    `extra` separates what must not be shared: a tenant's salt, an epoch.

    >>> hash_block(b"", [1, 2]) == hash_block(b"", [1, 2])
    True
    >>> hash_block(hash_block(b"", [1, 2]), [3, 4]) == hash_block(b"", [3, 4])
    False
    """
    digest = blake2b(parent, digest_size=16, key=extra[:64])
    digest.update(np.asarray(tokens, dtype=np.int32).tobytes())
    return digest.digest()


class BlockPool:
    """A fixed number of KV blocks with reference counts, prefix lookup by hash and LRU eviction."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        # Ring of idle blocks through the sentinel `num_blocks`: _next[sentinel] is evicted first.
        self._next = [*range(1, num_blocks + 1), 0]
        self._prev = [num_blocks, *range(num_blocks)]
        self.num_idle = num_blocks  # free and cached
        self.num_cached = 0  # idle, and content known by hash

    @property
    def num_used(self) -> int:
        """Blocks held by at least one request."""
        return self.num_blocks - self.num_idle

    def take(self, count: int) -> list[int] | None:
        """Hand out blocks with one reference each, least recently used first; None, and no change, if too few."""
        if count > self.num_idle:
            return None
        taken = []
        for _ in range(count):
            block = self._next[self.num_blocks]
            self._unlink(block)
            self._forget(block)
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
        """How many of these blocks would leave the idle queue if they were claimed."""
        return sum(self.ref_counts[block] == 0 for block in blocks)

    def claim(self, blocks: Iterable[int]) -> None:
        """Add one reference to each block; idle ones leave the queue."""
        for block in blocks:
            if self.ref_counts[block] == 0:
                self._unlink(block)
            self.ref_counts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference from each block of a table, given in table order.

        The last blocks of a chain are queued first, so that a prefix outlives its continuations; blocks without a
        known content go to the front, since nothing is lost with them.
        """
        for block in reversed(blocks):
            self.ref_counts[block] -= 1
            assert self.ref_counts[block] >= 0, f"block {block} released more often than taken"
            if self.ref_counts[block] == 0:
                self._link(block, at_front=self._hash_of[block] is None)

    def name(self, block: int, digest: bytes) -> None:
        """Remember the content of a full block; a second block of equal content stays nameless."""
        if self._hash_of[block] is None and digest not in self._block_of:
            self._hash_of[block] = digest
            self._block_of[digest] = block

    def flush(self) -> int:
        """Forget every known content, at once and under load; tables in use keep their blocks. Returns how many."""
        count = len(self._block_of)
        for block in self._block_of.values():
            self._hash_of[block] = None
        self._block_of.clear()
        self.num_cached = 0
        return count

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that counts, queue and hashes agree with the tables that hold blocks; O(pool), for tests and idle."""
        held = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), "a table holds one block twice"
            for block in table:
                held[block] += 1
        assert held == self.ref_counts, "reference counts differ from the tables"
        queue, block = [], self._next[self.num_blocks]
        while block != self.num_blocks:
            assert self._prev[self._next[block]] == block, "the idle queue is torn"
            queue.append(block)
            block = self._next[block]
        assert len(queue) == len(set(queue)) == self.num_idle, "the idle queue lost or repeated a block"
        assert {block for block, count in enumerate(held) if count == 0} == set(queue), "an idle block is not queued"
        named = {digest: block for block, digest in enumerate(self._hash_of) if digest is not None}
        assert named == self._block_of, "hashes and blocks disagree"
        assert self.num_cached == sum(held[block] == 0 for block in named.values()), "cached blocks are miscounted"

    def _forget(self, block: int) -> None:
        digest = self._hash_of[block]
        if digest is not None:
            del self._block_of[digest]
            self._hash_of[block] = None

    def _unlink(self, block: int) -> None:
        before, after = self._prev[block], self._next[block]
        self._next[before], self._prev[after] = after, before
        self.num_idle -= 1
        self.num_cached -= self._hash_of[block] is not None

    def _link(self, block: int, *, at_front: bool) -> None:
        end = self.num_blocks
        before = end if at_front else self._prev[end]
        after = self._next[before]
        self._next[before] = self._prev[after] = block
        self._prev[block], self._next[block] = before, after
        self.num_idle += 1
        self.num_cached += self._hash_of[block] is not None
