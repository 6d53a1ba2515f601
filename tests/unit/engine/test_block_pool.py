"""The pool is the truth about KV memory: nothing leaks or is owned twice, prefixes outlive their continuations."""

import pytest

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
