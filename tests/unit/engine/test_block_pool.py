"""The pool is the truth about KV memory: nothing leaks or is owned twice, prefixes outlive their continuations."""

import pytest

from flyball.core.errors import EngineFailed
from flyball.engine.block_pool import BlockPool, hash_block


def named(pool: BlockPool, block: int, *tokens: int) -> bytes:
    """Name a block by some tokens; returns the hash."""
    digest = hash_block(b"", tokens)
    pool.name(block, digest)
    return digest


def test_taking_more_than_is_idle_changes_nothing() -> None:
    """A refused take leaves every block where it was."""
    pool = BlockPool(3)
    assert pool.take(4) is None
    assert pool.num_idle == 3
    pool.check_integrity([])


def test_blocks_without_content_are_reused_before_cached_ones() -> None:
    """What costs nothing to lose goes first."""
    pool = BlockPool(3)
    blocks = pool.take(3)
    assert blocks is not None
    named(pool, blocks[0], 1)
    pool.release(blocks)
    assert pool.num_cached == 1
    assert blocks[0] not in (pool.take(2) or [])


def test_the_end_of_a_chain_is_evicted_before_its_start() -> None:
    """A shared prefix outlives the answers that continued it."""
    pool = BlockPool(3)
    chain = pool.take(3)
    assert chain is not None
    for i, block in enumerate(chain):
        named(pool, block, i)
    pool.release(chain)
    assert pool.take(3) == chain[::-1]


def test_a_cached_block_is_found_claimed_and_kept_from_eviction() -> None:
    """A prefix hit takes the block out of the queue, whatever its place in it."""
    pool = BlockPool(3)
    first = pool.take(1)
    assert first is not None
    digest = named(pool, first[0], 7)
    pool.release(first)
    assert pool.lookup([digest]) == first
    pool.claim(first)
    taken = pool.take(2)
    assert taken is not None
    assert first[0] not in taken
    assert pool.take(1) is None
    pool.check_integrity([first, taken])


def test_a_shared_block_is_idle_only_when_its_last_holder_lets_go() -> None:
    """References are counted, not flagged."""
    pool = BlockPool(1)
    block = pool.take(1)
    assert block is not None
    pool.claim(block)
    pool.release(block)
    assert pool.num_idle == 0
    pool.release(block)
    assert pool.num_idle == 1
    with pytest.raises(AssertionError):
        pool.release(block)


def test_a_flush_forgets_content_at_once_and_leaves_tables_alone() -> None:
    """After a flush no lookup hits, while running requests keep their blocks."""
    pool = BlockPool(2)
    blocks = pool.take(2)
    assert blocks is not None
    digests = [named(pool, block, block) for block in blocks]
    pool.release(blocks[1:])
    assert pool.flush() == 2
    assert pool.lookup(digests) == []
    assert (pool.num_used, pool.num_cached) == (1, 0)
    pool.check_integrity([blocks[:1]])


def test_hashes_depend_on_everything_before_and_on_the_tenant() -> None:
    """Equal tokens after another prefix, or of another tenant, are another block."""
    parent = hash_block(b"", [1, 2])
    assert hash_block(parent, [3]) != hash_block(b"", [3])
    assert hash_block(b"", [3], b"tenant-a") != hash_block(b"", [3], b"tenant-b")


def cached(pool: BlockPool, count: int) -> tuple[list[int], list[bytes]]:
    """Some blocks with content that nobody holds, the first named first."""
    blocks = pool.take(count)
    assert blocks is not None
    digests = [named(pool, block, block) for block in blocks]
    for block in blocks:
        pool.release([block])
    return blocks, digests


def test_eviction_takes_the_least_recently_used_or_the_oldest() -> None:
    """A hit makes a block young under lru; under fifo its content keeps its age. The knob may change at any time."""
    for before, after, victim in (("lru", "lru", 1), ("fifo", "fifo", 0), ("lru", "fifo", 0), ("fifo", "lru", 1)):
        pool = BlockPool(3)
        pool.set_policy(limit=3, eviction=before)  # type: ignore[arg-type]
        blocks, digests = cached(pool, 3)
        for _ in range(20):  # again and again
            pool.claim(pool.lookup(digests[:1]))
            pool.release(blocks[:1])
        pool.set_policy(limit=3, eviction=after)  # type: ignore[arg-type]
        assert pool.take(1) == [blocks[victim]], (before, after)
        pool.check_integrity([[blocks[victim]]])


def test_fifo_keeps_no_list_of_every_release() -> None:
    """A prefix that is claimed and let go for ever costs no memory."""
    pool = BlockPool(4)
    pool.set_policy(limit=4, eviction="fifo")
    blocks, digests = cached(pool, 3)
    for i in range(500):
        pool.claim(pool.lookup(digests[:1]))
        pool.release(blocks[:1])
        other = pool.take(2)  # the free block, and the oldest cached one
        assert other is not None
        named(pool, other[0], 1000 + i)
        pool.release(other)
        pool.check_integrity([])
        digests[0] = digests[0] if pool.lookup(digests[:1]) else named_again(pool, blocks[0], i)
    assert len(pool._by_age) <= 2 * pool.num_blocks + 8


def named_again(pool: BlockPool, block: int, salt: int) -> bytes:
    """Give the first free block new content, as a later request would."""
    taken = pool.take(1)
    assert taken is not None
    digest = named(pool, taken[0], block, salt)
    pool.release(taken)
    return digest


def test_a_lower_limit_gives_up_cached_blocks_and_touches_no_used_one() -> None:
    """Cached ones go, least recently used first; more than the limit is not handed out; raising it gives all back."""
    pool = BlockPool(6)
    used = pool.take(3)
    assert used is not None
    _, digests = cached(pool, 3)
    pool.set_policy(limit=4, eviction="lru")
    assert pool.num_cached == 1
    assert pool.lookup(digests[2:]) != []
    assert pool.take(2) is None
    assert pool.take(1) is not None
    assert (pool.num_cached, pool.num_used, pool.room) == (0, 4, 0)
    pool.set_policy(limit=2, eviction="lru")
    assert (pool.num_used, pool.room) == (4, 0)
    assert pool.take(2, limited=False) is not None
    pool.set_policy(limit=6, eviction="lru")
    assert pool.room == 0
    pool.release(used)
    assert pool.room == 3


def test_blocks_over_the_limit_are_not_kept_for_their_content() -> None:
    """What a request leaves behind is cached only as far as the limit allows."""
    pool = BlockPool(4)
    blocks = pool.take(4)
    assert blocks is not None
    for block in blocks:
        named(pool, block, block)
    pool.set_policy(limit=1, eviction="lru")
    pool.release(blocks)
    assert (pool.num_cached, pool.num_idle) == (1, 4)
    pool.check_integrity([])


def test_a_leak_is_found_at_idle() -> None:
    """A block still held when no request is left is an error, not a smaller pool."""
    pool = BlockPool(2)
    pool.check_idle()
    pool.take(1)
    with pytest.raises(EngineFailed, match="1 of 2 KV blocks"):
        pool.check_idle()
