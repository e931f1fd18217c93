"""The account of stored KV: nothing of a deleted document stays, whatever is under way and whenever the head dies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import pytest

from cluster.common.errors import JobStoreError
from cluster.jobs.document.kv import DocumentKv
from cluster.jobs.documents import DocumentStore
from cluster.jobs.store import JobStore


class Killed(BaseException):
    """SIGKILL: nothing after this point happens."""


class Kv:
    """What is on disk, by key, and in memory, by document; a head that writes, drops, and may die at each action."""

    is_enabled = True

    def __init__(self, store: JobStore, disk: dict[bytes, int] | None = None) -> None:
        self.disk: dict[bytes, int] = {} if disk is None else disk
        self.memory: set[str] = set()
        self.lives = 1 << 30  # actions until it is killed
        self.busy: set[bytes] = set()
        self.forgotten: set[bytes] = set()
        self.account = DocumentKv(store, self, self.keep)

    def act(self, action: Callable[[], object]) -> object:
        if not self.lives:
            raise Killed
        self.lives -= 1
        return action()

    def keep(self, read_living: Callable[[], Collection[str]]) -> None:
        self.memory &= set(read_living())

    def forget_document(self, keys: Iterable[bytes]) -> None:
        self.forgotten |= set(keys)
        keys, self.forgotten = self.forgotten - self.busy, self.forgotten & self.busy
        for key in keys:
            self.act(lambda key=key: self.disk.pop(key, None))
        self.act(lambda: self.account.on_dropped(list(keys)))

    def stored_prefix(self, keys: Iterable[bytes]) -> tuple[int, int]:
        there = [key for key in keys if key in self.disk]
        return len(there), sum(self.disk[key] for key in there)

    def write(self, document_id: str, *keys: bytes, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.busy = set(keys)
        if self.act(lambda: self.account.before_store(document_id, 8, keys)):
            self.memory.add(document_id)
            for key in keys:
                self.act(lambda key=key: self.disk.update({key: 10}))
                meanwhile()
        self.busy = set()
        self.forget_document([])


@pytest.fixture
def documents(tmp_path: Path, store: JobStore) -> DocumentStore:
    return DocumentStore(tmp_path / "documents", store, 60.0, 1 << 20, lambda: 1000.0)


@pytest.fixture
def kv(store: JobStore, documents: DocumentStore) -> Kv:
    made = Kv(store)
    documents.on_deleted = made.account.sweep
    return made


def test_sizes_are_of_what_is_on_disk_and_by_scale(store: JobStore, documents: DocumentStore, kv: Kv) -> None:
    one, two = (documents.put("a", [content], 10).id for content in (b"one", b"two"))
    kv.write(one, b"k1", b"k2")
    store.add_kv(one, 9, [b"k3", b"not written"])
    kv.disk[b"k3"] = 10
    assert kv.account.sizes({one: 8, two: 8}) == {one: (2, 30)}
    assert kv.account.sizes({one: 9}) == {one: (1, 30)}
    assert kv.account.sizes({one: 0}) == {one: (3, 30)}


def test_pinned_documents_retain_their_blocks(documents: DocumentStore, kv: Kv) -> None:
    one, two = (documents.put("a", [content], 10).id for content in (b"one", b"two"))
    kv.write(one, b"k1")
    kv.write(two, b"k2")
    documents.pin(two, True)
    assert kv.account.retained() == {b"k2"}


def test_a_deleted_document_takes_the_keys_that_no_other_has(documents: DocumentStore, kv: Kv, store: JobStore) -> None:
    one, two = (documents.put("a", [content], 10).id for content in (b"one", b"two"))
    kv.write(one, b"shared", b"own")
    kv.write(two, b"shared")
    documents.delete(one)
    assert (set(kv.disk), kv.memory) == ({b"shared"}, {two})
    documents.delete(two)
    assert (set(kv.disk), kv.memory) == (set(), set())
    assert store.orphan_kv() == []


def test_what_is_offered_after_the_end_is_not_stored_and_expired_documents(documents: DocumentStore, kv: Kv) -> None:
    one, two = (documents.put("a", [content], 10).id for content in (b"one", b"two"))
    kv.write(two, b"k2")
    documents.delete(one)
    kv.write(one, b"late")
    assert set(kv.disk) == {b"k2"}
    assert documents.sweep(2000.0) == 1
    kv.account.sweep()
    assert (kv.disk, kv.memory) == ({}, set())


def test_a_document_that_is_deleted_while_it_is_written(documents: DocumentStore, kv: Kv) -> None:
    one = documents.put("a", [b"one"], 10).id
    deletions = iter([lambda: documents.delete(one)])
    kv.write(one, b"k1", b"k2", meanwhile=lambda: next(deletions, lambda: None)())
    assert kv.disk == {}


@pytest.mark.parametrize("while_writing", [False, True])
def test_a_kill_at_any_point_leaves_nothing_that_the_next_head_does_not_find(
    documents: DocumentStore, store: JobStore, while_writing: bool
) -> None:
    """Read two documents that begin alike, delete one, then the other; killed before each action of the head."""
    lives = 0
    while True:
        kv = Kv(store)
        kv.lives = lives
        one, two = (documents.put("a", [content], 10).id for content in (b"one", b"two"))
        documents.on_deleted = kv.account.sweep
        deletions = iter([lambda one=one: documents.delete(one)] if while_writing else ())
        died = False
        try:
            kv.write(two, b"shared", b"k2")
            kv.write(one, b"shared", b"k1", b"question", meanwhile=lambda d=deletions: next(d, lambda: None)())
            if not while_writing:
                documents.delete(one)
            documents.delete(two)
        except Killed:
            died = True
        after = Kv(store, kv.disk)
        documents.on_deleted = after.account.sweep
        living = store.document_ids()
        after.account.sweep()  # as every head does when it starts
        wanted = {one: {b"shared", b"k1", b"question"}, two: {b"shared", b"k2"}}
        assert set(kv.disk) <= set().union(*(wanted[name] for name in living)), lives
        for name in living:
            documents.delete(name)
        assert (kv.disk, store.orphan_kv()) == ({}, []), lives
        if not died:
            return
        lives += 1


def test_nothing_is_forgotten_while_kv_is_not_stored(documents: DocumentStore, kv: Kv, store: JobStore) -> None:
    one = documents.put("a", [b"one"], 10).id
    kv.write(one, b"k")
    kv.is_enabled = False
    documents.delete(one)
    assert (set(kv.disk), kv.memory) == ({b"k"}, set()), "pages are in memory all the same"
    kv.is_enabled = True
    kv.account.sweep()
    assert (kv.disk, store.orphan_kv()) == ({}, [])


def test_what_the_store_refuses_is_not_written_and_dropped_again(
    documents: DocumentStore, kv: Kv, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise JobStoreError("locked")

    one = documents.put("a", [b"one"], 10).id
    with monkeypatch.context() as patch:
        patch.setattr(JobStore, "add_kv", refuse)
        kv.write(one, b"k")
    assert kv.disk == {}
    kv.write(one, b"k")
    with monkeypatch.context() as patch:
        patch.setattr(JobStore, "remove_kv", refuse)
        documents.delete(one)
    assert (kv.disk, store.orphan_kv()) == ({}, [b"k"])
    kv.account.sweep()
    assert store.orphan_kv() == []


def noted(store: JobStore) -> list[tuple[str, bytes]]:
    with store._db.reading() as db:
        return db.execute("SELECT document_id, key FROM document_kv").fetchall()


def test_imported_blocks_are_held_and_then_belong_to_a_document_or_go(
    documents: DocumentStore, kv: Kv, store: JobStore
) -> None:
    keys = [b"k1", b"k2"]
    with kv.account.importing(keys):
        kv.disk |= dict.fromkeys(keys, 10)
        kv.account.sweep()
        assert set(kv.disk) == set(keys)
        one = documents.put("a", [b"one"], 10).id
        kv.account.add_imported(one, 8, [b"k1"])
    assert set(kv.disk) == {b"k1"}, "nobody has the other"
    assert store.document_kv([one]) == {one: {b"k1": 8}}
    assert noted(store) == [(one, b"k1")], "nothing else stays of an import"
    failing = kv.account.importing([b"k1", b"k3"])
    failing.__enter__()
    kv.disk[b"k3"] = 10
    kv.account.add_imported("doc_that_comes_later", 8, [b"k3"])
    assert not failing.__exit__(ValueError, ValueError("cut off"), None)
    assert set(kv.disk) == {b"k1"}
    documents.delete(one)
    assert (kv.disk, store.orphan_kv()) == ({}, [])


def test_a_block_that_was_dropped_before_a_failing_import_put_it_there_goes(kv: Kv) -> None:
    failing = kv.account.importing([b"k1"])
    failing.__enter__()
    kv.account.on_dropped([b"k1"])
    kv.disk[b"k1"] = 10
    assert not failing.__exit__(ValueError, ValueError("cut off"), None)
    assert kv.disk == {}


def test_an_import_that_a_crash_has_ended_leaves_nothing(kv: Kv, store: JobStore) -> None:
    unfinished = kv.account.importing([b"k1"])
    unfinished.__enter__()
    kv.disk[b"k1"] = 10
    kv.account = DocumentKv(store, kv, kv.keep)  # of the next head
    kv.account.sweep()
    assert kv.disk == {}
