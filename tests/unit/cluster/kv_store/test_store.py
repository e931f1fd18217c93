"""Quota, age, pins and documents: what is kept and dropped. Reading and writing: test_stored_kv."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from cluster.common.errors import StageError
from cluster.config.schema import KvStoreSection
from cluster.kv_store.store import KvStore
from tests.support.fakes.kv import FakeDisk
from tests.support.fakes.stage import Rig, eventually

DOCUMENT = list(range(1000, 1320))  # ten blocks
BLOCK_BYTES = 200  # of two shards


class Events:
    """Notes what it is told; of documents that are `gone`, nothing."""

    def __init__(self, disk: FakeDisk) -> None:
        self.disk = disk
        self.account: dict[str, list[bytes]] = {}
        self.pinned: frozenset[bytes] = frozenset()
        self.dropped: list[bytes] = []
        self.gone: set[str] = set()
        self.told: list[tuple[str, int]] = []

    def before_store(self, document_id: str, pinned_len: int, keys: Sequence[bytes]) -> bool:
        if document_id in self.gone:
            return False
        self.told += [(document_id, pinned_len)] * len(keys)
        self.account.setdefault(document_id, []).extend(keys)
        return True

    def on_dropped(self, keys: Sequence[bytes]) -> None:
        assert not self.disk.written.keys() & set(keys), "it is on disk"
        self.dropped += keys

    def retained(self) -> frozenset[bytes]:
        return self.pinned


class Unavailable(Exception):
    """As of gRPC, of a process that is gone or slow."""

    def code(self) -> SimpleNamespace:
        return SimpleNamespace(name="UNAVAILABLE")


def settle(rig: Rig) -> None:
    eventually(lambda: not len(rig.store.backlog) and not rig.store.backlog.busy)


def read(rig: Rig, base: int, document_id: str = "", tokens: int = 320) -> None:
    """Read a document and wait until it is stored."""
    rig.run([*range(base, base + tokens), 1], 1, document_id=document_id)
    settle(rig)


def start(disk: FakeDisk, **store: object) -> Rig:
    rig = Rig(disk=disk, pages=200, **store)
    rig.store.events = Events(disk)
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


def test_a_document_is_told_once_of_each_block_also_of_those_that_others_have_stored() -> None:
    disk = FakeDisk()
    with start(disk) as rig:
        ready(rig)
        noted: list[bool] = []
        disk.on_write = lambda key: noted.append(key in rig.store.events.account.get("one", ()))
        read(rig, 1000, "one")
        assert noted == [True] * 20, "by two shards, each time after it is noted"
        read(rig, 1000, "two")
        read(rig, 1000, "one")
        events = rig.store.events
        assert events.account["one"] == events.account["two"]
        assert events.told == [("one", 0)] * 10 + [("two", 0)] * 10
        assert rig.store.stats.stored_blocks == 10


def test_a_deleted_document_leaves_nothing_on_disk_and_in_memory() -> None:
    disk = FakeDisk()
    with start(disk) as rig:
        ready(rig)
        read(rig, 1000, "one")
        keys = list(rig.store.events.account["one"])
        rig.store.forget_document(keys)
        assert (disk.written, rig.store.size_bytes) == ({}, 0)
        assert sorted(rig.store.events.dropped) == sorted(keys)
        eventually(lambda: not rig.pool.published())
        result, _ = rig.run([*DOCUMENT, 1], 1, document_id="one")
        assert result.cached_tokens == 0
        settle(rig)
        assert len(disk.written) == 10, "read again, stored again"
        assert rig.store.events.account["one"] == keys * 2


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
        keys = rig.store.events.account["one"]
        store = rig.store
    store.forget_document(keys[3:])
    assert len(disk.written) == 10
    again = start(disk)
    again.store = store
    with again:
        eventually(lambda: len(disk.written) == 3)
    assert store.stored_prefix(keys) == (3, 3 * BLOCK_BYTES)


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


def test_a_callback_that_raises_stores_nothing_and_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Events, *_: object) -> None:
        raise RuntimeError("the database is locked")

    disk = FakeDisk()
    with start(disk) as rig:
        ready(rig)
        with monkeypatch.context() as patch:
            patch.setattr(Events, "before_store", refuse)
            read(rig, 1000, "one")
        assert disk.written == {}
        read(rig, 1000, "one")
        assert len(disk.written) == 10
        monkeypatch.setattr(Events, "on_dropped", refuse)
        rig.store.forget_document(list(disk.written))
        assert disk.written == {}


def test_nothing_is_stored_of_a_document_that_is_gone() -> None:
    disk = FakeDisk()
    with start(disk) as rig:
        ready(rig)
        rig.store.events.gone = {"one"}
        read(rig, 1000, "one")
        assert (disk.written, rig.store.stats.not_stored_blocks) == ({}, 10)
        read(rig, 2000, "two")
        assert len(disk.written) == 10


def test_a_block_is_not_written_while_it_is_dropped_and_not_dropped_while_it_is_written() -> None:
    disk = FakeDisk()
    with start(disk) as rig:
        ready(rig)
        read(rig, 1000, "one", tokens=32)
        (key,) = disk.written
        assert rig.store.claims.take([key]) == {key}
        rig.store.forget_document([key])
        rig.store.sweep()
        assert list(disk.written) == [key], "somebody is at work on it"
        rig.store.claims.give_back([key])
        rig.store.sweep()
        assert (disk.written, rig.store.events.dropped) == ({}, [key])
        rig.store.claims.take([key])
        eventually(lambda: not rig.pool.published())
        read(rig, 1000, "one", tokens=32)
        assert disk.written == {}


def test_a_shard_that_may_still_write_keeps_its_blocks_from_being_dropped() -> None:
    """It is dropped with the next pipeline, and stays in the account until then."""
    disk = FakeDisk()
    with start(disk) as rig:
        ready(rig)
        lost = StageError("no answer")
        lost.__cause__ = Unavailable()
        rig.shards[0].store_kv = lambda blocks: (_ for _ in ()).throw(lost)
        read(rig, 1000, "one", tokens=32)
        store, (key,) = rig.store, rig.store.events.account["one"]
        store.forget_document([key])
        assert store.events.dropped == []
        disk.written[key] = {(0, 0)}  # it has written it after all
    again = start(disk)
    again.store = store
    with again:
        eventually(lambda: store.events.dropped == [key])
        assert disk.written == {}


def test_blocks_stay_in_the_account_while_a_node_does_not_answer() -> None:
    disk = FakeDisk()
    with start(disk) as rig:
        ready(rig)
        read(rig, 1000, "one")
        keys = set(disk.written)
        rig.shards[0].broken_kv = True
        rig.store.forget_document(keys)
        assert rig.store.events.dropped == []
        rig.shards[0].broken_kv = False
        rig.store.sweep()
        assert (disk.written, set(rig.store.events.dropped)) == ({}, keys)


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
