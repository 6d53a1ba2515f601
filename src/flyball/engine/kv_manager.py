"""Blocks for requests: prefix lookup, growth, release. Says no instead of raising when memory is short."""

from __future__ import annotations

from collections.abc import Iterable

from flyball.engine.block_pool import BlockPool, hash_block
from flyball.engine.request import Request


class KVManager:
    """Gives each request the blocks that its computed and scheduled tokens need."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.epoch = 0  # of the prefix cache: what was begun in an earlier one is never shared any more

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold some tokens."""
        return -(-tokens // self.block_size)

    def flush(self) -> int:
        """Empty the prefix cache, also under load: who runs goes on and shares nothing; returns how many blocks."""
        self.epoch += 1
        return self.pool.flush()

    def find_prefix(self, request: Request) -> list[int]:
        """Blocks of the longest known prefix, always short of the last known token, whose logits are needed."""
        self._extend_hashes(request)
        usable = (request.num_known - 1) // self.block_size
        return self.pool.lookup(request.block_hashes[:usable])

    def shareable_blocks(self, request: Request) -> int:
        """Blocks of the prompt that other answers to it can share: the full ones before its last token."""
        return (len(request.prompt_ids) - 1) // self.block_size

    def promised(self, running: Iterable[Request]) -> int:
        """Blocks that running requests still need for what they know already."""
        size = self.block_size
        return sum(max(0, -(-r.num_known // size) - len(r.block_table)) for r in running)

    def admit(self, request: Request, prefix: list[int], tokens: int, *, reserve: int, alone: bool) -> bool:
        """Give a request its prefix blocks and room for `tokens` more, if all its known tokens would fit.

        `reserve` blocks stay untouched. A request that would be `alone` may use the whole pool: a limit set after it
        was accepted must not keep it waiting for ever. Changes nothing when the answer is False.
        """
        cached = len(prefix) * self.block_size
        whole = self.blocks_for(request.num_known) - len(prefix) + self.pool.num_idle_among(prefix)
        if whole + reserve > (self.pool.num_idle if alone else self.pool.room):
            return False
        self.pool.claim(prefix)
        new = self.pool.take(self.blocks_for(cached + tokens) - len(prefix), limited=not alone)
        assert new is not None, "counted as fitting"
        request.block_table = prefix + new
        request.num_computed = cached
        request.draft_computed = 0
        request.num_hashed_blocks = len(prefix)
        request.epoch = self.epoch
        return True

    def grow(self, request: Request, tokens: int, *, alone: bool) -> bool:
        """Make room for `tokens` more of a running request; False, and no change, if the pool is exhausted."""
        missing = self.blocks_for(request.num_computed + tokens) - len(request.block_table)
        if missing <= 0:
            return True
        new = self.pool.take(missing, limited=not alone)
        if new is None:
            return False
        request.block_table += new
        return True

    def commit(self, request: Request) -> None:
        """Name the blocks that are full of computed tokens, so that others can share them."""
        full = request.num_computed // self.block_size
        if full == request.num_hashed_blocks or request.epoch != self.epoch:
            return
        self._extend_hashes(request)
        for i in range(request.num_hashed_blocks, full):
            self.pool.name(request.block_table[i], request.block_hashes[i])
        request.num_hashed_blocks = full

    def free(self, request: Request) -> None:
        """Return all blocks; nothing of the request's KV is valid afterwards."""
        self.pool.release(request.block_table)
        request.block_table = []
        request.num_computed = 0
        request.draft_computed = 0
        request.num_hashed_blocks = 0

    def _extend_hashes(self, request: Request) -> None:
        size = self.block_size
        for i in range(len(request.block_hashes), request.num_known // size):
            parent = request.block_hashes[i - 1] if i else b""
            request.block_hashes.append(hash_block(parent, request.tokens(i * size, (i + 1) * size), request.salt))
