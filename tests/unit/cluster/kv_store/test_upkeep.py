"""Quota, age, pins and listings: what is known, kept and dropped."""

from __future__ import annotations

import threading

import pytest

from protos.stage.messages import KvBlock
from tests.support.fakes.kv import FakeDisk
from tests.support.fakes.stage import eventually
from tests.support.rigs.kv_store import BLOCK_BYTES, read, ready, start


def test_the_quota_evicts_the_oldest_documents_from_their_ends() -> None:
    disk = FakeDisk()
    with start(disk, max_bytes=25 * BLOCK_BYTES) as rig:
        ready(rig)
        for base in (1000, 2000):
            read(rig, base)
        assert (rig.store.size_bytes, rig.store.max_bytes) == (20 * BLOCK_BYTES, 25 * BLOCK_BYTES)
        read(rig, 1000)  # used again
        read(rig, 3000)
        rig.store.sweep()
        assert rig.store.size_bytes <= 25 * BLOCK_BYTES
        starts = sorted(disk.blocks[key].start for key in disk.dropped)
        assert {disk.blocks[key].token_ids[0] // 1000 for key in disk.dropped} == {2}
        assert starts == [320 - 32 * n for n in range(len(starts), 0, -1)]
        assert rig.store.stats.evicted_blocks == len(starts) == len(rig.store.events.dropped)
        dropped = set(disk.dropped)
        eventually(lambda: not {block.key for block in rig.pool.stored_blocks()} & dropped)


def test_a_protected_prompt_outlives_those_that_were_used_later() -> None:
    disk = FakeDisk()
    with start(disk, max_bytes=25 * BLOCK_BYTES) as rig:
        ready(rig)
        read(rig, 1000, cache_ttl_s=3600)
        for base in (2000, 3000, 4000):
            read(rig, base)
        rig.store.sweep()
        kept = {disk.blocks[key].token_ids[0] // 1000 for key in disk.written}
        dropped = {disk.blocks[key].token_ids[0] // 1000 for key in disk.dropped}
        assert 1 in kept
        assert dropped == {2, 3}, "the oldest that are not protected"


def test_the_default_quota_is_a_tenth_of_what_is_free_and_what_it_has() -> None:
    disk = FakeDisk(free_bytes=9000)
    with start(disk) as rig:
        ready(rig)
        assert rig.store.max_bytes == 900
        read(rig, 1000)
    held = len(disk.written) * BLOCK_BYTES
    with start(disk) as rig:
        ready(rig)
        assert rig.store.max_bytes == (9000 + held) // 10


def test_retained_blocks_stay_and_what_has_no_room_is_not_stored() -> None:
    disk = FakeDisk()
    with start(disk, max_bytes=12 * BLOCK_BYTES) as rig:
        ready(rig)
        read(rig, 1000, "pinned")
        keys = rig.store.events.account["pinned"]
        rig.store.events.pinned = frozenset(keys)
        assert rig.store.stored_prefix(keys) == (10, 10 * BLOCK_BYTES)
        for base in (2000, 3000, 4000):
            read(rig, base)
        rig.store.sweep()
        assert rig.store.stored_prefix(keys) == (10, 10 * BLOCK_BYTES)
        assert rig.store.size_bytes <= 12 * BLOCK_BYTES
        rig.store.events.pinned = frozenset()
        for base in (5000, 6000):
            read(rig, base)
        assert rig.store.stored_prefix(keys)[0] < 10


def test_blocks_that_nobody_used_for_long_are_dropped() -> None:
    disk = FakeDisk()
    with start(disk, ttl_s=100.0) as rig:
        ready(rig)
        read(rig, 1000)
        read(rig, 2000)
        now = rig.store.now()
        rig.store.now = lambda: now + 60
        read(rig, 2000)
        rig.store.now = lambda: now + 130
        rig.store.sweep()
        assert {disk.blocks[key].token_ids[0] // 1000 for key in disk.dropped} == {1}
        assert len(disk.dropped) == 10


def test_a_document_that_is_used_from_memory_stays_young_on_disk() -> None:
    """Its files are not touched at every use, but by a sweep, within an eighth of the time to live."""
    disk = FakeDisk()
    with start(disk, ttl_s=80.0) as rig:
        ready(rig)
        read(rig, 1000, tokens=160)
        read(rig, 2000, tokens=160)
        begun = rig.store.now()

        def later(seconds: float) -> None:
            rig.store.now = disk.clock = lambda: begun + seconds

        later(0)
        disk.used = dict.fromkeys(disk.used, begun)
        calls = [shard.kv_calls for shard in rig.shards]
        for seconds, touches in ((5, 0), (9, 0), (15, 1), (24, 1), (30, 2), (79, 3)):
            later(seconds)
            read(rig, 1000, tokens=160)
            rig.store.sweep()
            assert [called.count("touch") for called in calls] == [touches, 0], "one shard of the node"
        ages = {disk.blocks[key].token_ids[0] // 1000: begun + 79 - used for key, used in disk.used.items()}
        assert ages == {1: 0, 2: 79}
        assert "load" not in calls[0]
        rig.shards[0].broken_kv = True
        later(100)
        rig.store.index.touch(list(disk.written), begun + 100)
        rig.store._upkeep.renew()
        rig.shards[0].broken_kv = False
        rig.store._upkeep.renew()
        assert calls[0].count("touch") == 4, "not again and again"
        rig.store.refresh()
        rig.store._upkeep.renew()
        assert set(disk.used.values()) == {begun + 100}, "the listing has shown that it failed"
        count = calls[0].count("touch")
        rig.store.refresh()
        rig.store._upkeep.renew()
        assert calls[0].count("touch") == count
    with start(disk, ttl_s=80.0) as rig:
        rig.store.now = lambda: begun + 179
        ready(rig)
        rig.store.sweep()
        assert disk.dropped == []


def test_what_is_loaded_need_not_be_renewed() -> None:
    disk = FakeDisk()
    with start(disk, ttl_s=800.0) as rig:
        read(rig, 1000)
    with start(disk, ttl_s=800.0) as rig:
        ready(rig)
        now = rig.store.now()
        rig.store.now = disk.clock = lambda: now + 500
        read(rig, 1000)
        rig.store.sweep()
        assert "load" in rig.shards[0].kv_calls
        assert "touch" not in rig.shards[0].kv_calls


@pytest.mark.parametrize("answers", [False, True])
def test_blocks_stay_in_the_account_while_a_node_cannot_remove_them(answers: bool) -> None:
    disk = FakeDisk()
    with start(disk) as rig:
        ready(rig)
        read(rig, 1000, "one")
        keys = set(disk.written)
        rig.shards[0].broken_kv, disk.is_read_only = not answers, answers
        rig.store.forget_document(keys)
        assert rig.store.events.dropped == []
        rig.shards[0].broken_kv = disk.is_read_only = False
        rig.store.sweep()
        assert (disk.written, set(rig.store.events.dropped)) == ({}, keys)


def test_blocks_that_somebody_puts_there_are_known_after_a_refresh() -> None:
    disk = FakeDisk()
    with start(disk) as rig:
        read(rig, 1000)
        keys = list(disk.written)
    with start(FakeDisk()) as rig:
        ready(rig)
        assert rig.store.node_shards() == rig.shards[:1]
        other = rig.shards[0].disk
        other.blocks, other.written = disk.blocks, disk.written
        assert rig.store.stored_prefix(keys) == (0, 0)
        rig.store.refresh()
        assert rig.store.stored_prefix(keys) == (10, 10 * BLOCK_BYTES)
    assert rig.store.node_shards() == []
    rig.store.refresh()


def test_what_is_written_before_the_first_listing_is_read_counts_and_goes_on() -> None:
    disk, gate = FakeDisk(), threading.Event()
    rig = start(disk)
    for shard in rig.shards:
        shard.list_kv = lambda listing=shard.list_kv: (gate.wait(20), listing())[1]  # type: ignore[method-assign]
    with rig:
        read(rig, 1000)
        assert len(disk.written) == 10
        gate.set()
        ready(rig)
        assert rig.store.stored_prefix(disk.written) == (10, 10 * BLOCK_BYTES)
        read(rig, 1000, tokens=480)
        assert len(disk.written) == 15, "the blocks after them are stored too"


def test_imported_blocks_count_against_the_quota() -> None:
    disk = FakeDisk()
    with start(disk, max_bytes=10 * BLOCK_BYTES) as rig:
        ready(rig)
        read(rig, 1000)
        assert rig.store.size_bytes == 10 * BLOCK_BYTES
        rig.store.limits["a node that is gone"] = 1
        assert rig.store.note_imported(b"k0", b"", 0, 2 * BLOCK_BYTES)
        assert rig.store.index.has(next(iter(disk.written))), "that the gone node has no block of it does not matter"
        assert rig.store.chained([b"k0"]) == [(b"k0", b"", 0)]
        assert rig.store.size_bytes <= 10 * BLOCK_BYTES
        assert len(disk.dropped) == 3, "room was made, and a little more"
        rig.store.events.pinned = frozenset(disk.blocks)
        assert not rig.store.note_imported(b"k1", b"k0", 32, 9 * BLOCK_BYTES)
        assert not rig.store.index.has(b"k1")


def test_a_listing_of_a_pipeline_that_is_left_says_nothing() -> None:
    disk, gate = FakeDisk(), threading.Event()
    rig = start(disk)
    late, listing = rig.shards[0], rig.shards[0].list_kv
    late.list_kv = lambda: (listing(), gate.wait(20))[0]  # type: ignore[method-assign]
    with rig:
        eventually(lambda: "list" in late.kv_calls)
        thread = rig.store._upkeep._thread
        rig.store.detach(0.0, 0.0)
        late.list_kv = listing  # type: ignore[method-assign]
        rig.store.attach(rig.shards, rig.engine.post, rig.pool)
        ready(rig)
        block = KvBlock(b"k" * 32, b"", 0, range(32), (0, 1))
        rig.store.note_stored([block], [100, 100], 0.1)
        gate.set()
        thread.join(10)
        assert rig.store.stored_prefix([block.key]) == (1, BLOCK_BYTES)


def test_one_shard_of_a_node_lists_it_once_the_nodes_are_known() -> None:
    with start(FakeDisk()) as rig:
        ready(rig)
        first, second = rig.shards
        assert (first.kv_calls.count("list"), second.kv_calls.count("list")) == (1, 1)
        rig.store.refresh()
        assert (first.kv_calls.count("list"), second.kv_calls.count("list")) == (2, 1)
        first.broken_kv = True
        rig.store.refresh()
        assert rig.store.node_shards() == [second]
        rig.store.refresh()
        assert second.kv_calls.count("list") == 3
