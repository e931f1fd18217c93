"""Quota, age, pins and documents: what is kept and dropped. Reading and writing: test_stored_kv."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from cluster.config.schema import KvStoreSection
from cluster.kv_store.store import KvStore
from protos.stage.messages import KvBlock
from tests.support.fakes.kv import FakeDisk
from tests.support.fakes.stage import Rig, eventually

DOCUMENT = list(range(1000, 1320))  # ten blocks
BLOCK_BYTES = 200  # of two shards


class Events:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.stored: dict[str, list[bytes]] = {}
        self.dropped: list[bytes] = []
        self.sizes: set[int] = set()
        self.calls = 0

    def on_stored(self, document_id: str, key: bytes, size: int) -> None:
        self.calls += 1
        self.sizes.add(size)
        self.stored.setdefault(document_id, []).append(key)

    def on_dropped(self, keys: Sequence[bytes]) -> None:
        self.dropped += keys


def settle(rig: Rig) -> None:
    eventually(lambda: not len(rig.store.backlog) and not rig.store.backlog.busy)


def read(rig: Rig, base: int, document_id: str = "", tokens: int = 320) -> None:
    """Read a document and wait until it is stored."""
    rig.run([*range(base, base + tokens), 1], 1, document_id=document_id)
    settle(rig)


def start(disk: FakeDisk, **store: object) -> Rig:
    rig = Rig(disk=disk, pages=200, **store)
    rig.store.events = Events()
    return rig


def ready(rig: Rig) -> None:
    eventually(lambda: rig.store.max_bytes)


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
        keys = rig.store.events.stored["pinned"]
        rig.store.retained(keys)
        assert rig.store.stored_prefix(keys) == (10, 10 * BLOCK_BYTES)
        assert rig.store.events.sizes == {BLOCK_BYTES}
        for base in (2000, 3000, 4000):
            read(rig, base)
        rig.store.sweep()
        assert rig.store.stored_prefix(keys) == (10, 10 * BLOCK_BYTES)
        assert rig.store.size_bytes <= 12 * BLOCK_BYTES
        rig.store.retained([])
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


def test_a_document_is_told_once_of_each_block_also_of_those_that_others_have_stored() -> None:
    with start(FakeDisk()) as rig:
        ready(rig)
        read(rig, 1000, "one")
        read(rig, 1000, "two")
        read(rig, 1000, "one")
        events = rig.store.events
        assert events.stored["one"] == events.stored["two"]
        assert (len(events.stored["one"]), events.calls) == (10, 20)
        assert rig.store.stats.stored_blocks == 10


def test_a_deleted_document_leaves_nothing_on_disk_and_in_memory() -> None:
    disk = FakeDisk()
    with start(disk) as rig:
        ready(rig)
        read(rig, 1000, "one")
        keys = list(rig.store.events.stored["one"])
        rig.store.forget_document(keys)
        assert (disk.written, rig.store.size_bytes) == ({}, 0)
        assert sorted(rig.store.events.dropped) == sorted(keys)
        eventually(lambda: not rig.pool.published())
        result, _ = rig.run([*DOCUMENT, 1], 1, document_id="one")
        assert result.cached_tokens == 0
        settle(rig)
        assert len(disk.written) == 10, "read again, stored again"
        assert rig.store.events.stored["one"] == keys * 2


def test_a_document_that_is_deleted_while_it_is_written_leaves_nothing() -> None:
    disk = FakeDisk()
    with start(disk) as rig:
        ready(rig)
        gate = rig.shards[0].kv_gate = threading.Event()
        rig.run([*DOCUMENT, 1], 1, document_id="one")
        eventually(lambda: rig.store.backlog.busy)
        busy = set(rig.store.backlog.busy)
        keys = [*busy, *(offer.key for offer in rig.store.backlog._offers)]
        assert len(keys) == 10
        rig.store.forget_document(keys)
        gate.set()
        settle(rig)
        eventually(lambda: not disk.written)


def test_what_is_forgotten_without_a_pipeline_goes_with_the_next_one() -> None:
    disk = FakeDisk()
    with start(disk) as rig:
        read(rig, 1000, "one")
        keys = rig.store.events.stored["one"]
        store = rig.store
    store.forget_document(keys[3:])
    assert len(disk.written) == 10
    again = start(disk)
    again.store = store
    with again:
        eventually(lambda: len(disk.written) == 3)
        eventually(lambda: store.stored_prefix(keys) == (3, 3 * BLOCK_BYTES))


def test_a_store_that_is_off_does_nothing() -> None:
    rig = Rig()
    assert (rig.store.is_enabled, rig.store.block_tokens) == (False, 0)
    rig.store.forget_document([b"key"])
    assert rig.store.detach()
    assert (rig.store.size_bytes, rig.store.stored_prefix([b"key"])) == (0, (0, 0))
    with rig:
        result, _ = rig.run(DOCUMENT)
        assert result.cached_tokens == 0
        assert rig.shards[0].kv_calls == []


def test_a_callback_that_raises_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Events, *_: object) -> None:
        raise RuntimeError("the database is locked")

    monkeypatch.setattr(Events, "on_stored", refuse)
    monkeypatch.setattr(Events, "on_dropped", refuse)
    disk = FakeDisk()
    with start(disk) as rig:
        ready(rig)
        read(rig, 1000, "one")
        assert len(disk.written) == 10
        rig.store.forget_document(list(disk.written))
        assert disk.written == {}


def test_detaching_writes_what_is_left_and_says_when_no_shard_is_at_work() -> None:
    disk = FakeDisk()
    rig = start(disk)
    with rig:
        rig.run([*DOCUMENT, 1], 1)
        assert rig.store.detach()
        assert len(disk.written) == 10
        assert rig.store.detach(), "twice"
    with start(disk) as rig:
        rig.shards[0].kv_gate = threading.Event()
        rig.run([*range(5000, 5320), 1], 1)
        eventually(lambda: "store" in rig.shards[0].kv_calls)
        rig.store._calls.close(0)
        assert not rig.store._calls.close(0.05)
        rig.shards[0].kv_gate.set()


def test_settings_may_switch_it_off() -> None:
    assert KvStore(KvStoreSection()).block_tokens == 512
    assert KvStore(KvStoreSection(enabled=False)).block_tokens == 0
    assert not KvStore(KvStoreSection(), is_enabled=False).is_enabled


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


def test_a_writer_that_ends_late_takes_nothing_from_the_next_pipeline() -> None:
    with start(FakeDisk()) as rig:
        ready(rig)
        gate = rig.shards[0].kv_gate = threading.Event()
        rig.run([*DOCUMENT, 1], 1)
        eventually(lambda: "store" in rig.shards[0].kv_calls)
        late = rig.store._writer
        assert not rig.store.detach(0.0, 0.05)
        rig.shards[0].kv_gate = None
        rig.store.attach(rig.shards, rig.engine.post, rig.pool)
        rig.store.backlog.busy = frozenset([b"being written"])
        gate.set()
        late.join(10)
        assert not late._thread.is_alive()
        assert rig.store.backlog.busy == {b"being written"}, "that of the next writer"
        rig.store.backlog.done()


@pytest.mark.parametrize("at", ["find", "load"])
def test_an_engine_that_outlives_the_store_computes(at: str) -> None:
    disk = FakeDisk()
    with start(disk) as rig:
        ready(rig)
        read(rig, 1000)
    with start(disk) as rig:
        if at == "load":
            found = rig.shards[0].find_kv
            rig.shards[0].find_kv = lambda keys: (rig.store._reader._loaders.shutdown(), found(keys))[1]  # type: ignore[method-assign]
        else:
            rig.store.detach()
        result, _ = rig.run([*DOCUMENT, 1], 1)
        assert (result.cached_tokens, len(result.token_ids), rig.engine.error) == (0, 1, "")


def test_a_look_up_says_nothing_of_what_was_written_after_it_began() -> None:
    disk = FakeDisk()
    with start(disk) as rig:
        ready(rig)
        began = rig.store.now()
        read(rig, 1000)
        keys = sorted(disk.written, key=lambda key: disk.blocks[key].start)
        rig.store.note_found(keys, 4, began)
        assert rig.store.stored_prefix(keys)[0] == 10
        rig.store.note_found(keys, 4, rig.store.now())
        assert rig.store.stored_prefix(keys)[0] == 4


def test_imported_blocks_count_against_the_quota() -> None:
    disk = FakeDisk()
    with start(disk, max_bytes=10 * BLOCK_BYTES) as rig:
        ready(rig)
        read(rig, 1000)
        assert rig.store.size_bytes == 10 * BLOCK_BYTES
        assert rig.store.note_imported(b"k0", b"", 0, 2 * BLOCK_BYTES)
        assert rig.store.chained([b"k0"]) == [(b"k0", b"", 0)]
        assert rig.store.size_bytes <= 10 * BLOCK_BYTES
        assert len(disk.dropped) == 3, "room was made, and a little more"
        rig.store.retained(disk.blocks)
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
