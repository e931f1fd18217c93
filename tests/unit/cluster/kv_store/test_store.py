"""A store over pipelines that come and go, and its account of documents. Reading and writing: test_stored_kv."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from cluster.common.errors import StageError
from cluster.config.schema import KvStoreSection
from cluster.kv_store.store import KvStore
from tests.support.fakes.kv import FakeDisk
from tests.support.fakes.stage import Rig, eventually
from tests.support.rigs.kv_store import BLOCK_BYTES, Events, read, ready, settle, start

DOCUMENT = list(range(1000, 1320))  # ten blocks


class Unavailable(Exception):
    """As of gRPC, of a process that is gone or slow."""

    def code(self) -> SimpleNamespace:
        return SimpleNamespace(name="UNAVAILABLE")


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


def test_a_block_whose_write_ends_while_others_are_dropped_goes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FakeDisk()
    with start(disk) as rig:
        ready(rig)
        read(rig, 1000)
        late, *others = sorted(disk.written)
        assert rig.store.claims.take([late]) == {late}
        calls = rig.store._upkeep._calls
        drop = calls.drop

        def dropping(indices: list[int], keys: list[bytes]) -> str:
            rig.store.claims.give_back([late])
            return drop(indices, keys)

        monkeypatch.setattr(calls, "drop", dropping)
        rig.store.forget_document([late, *others])
        assert not disk.written
