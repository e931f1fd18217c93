"""The account of stored KV: nothing of a deleted document stays, whatever is under way and whenever the head dies."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from cluster.common.errors import JobStoreError
from cluster.jobs.document.kv import DocumentKv
from cluster.jobs.documents import DocumentStore
from cluster.jobs.store import JobStore


class Kv:
    """What is on disk, by key; `forget_document` drops it, and tells so, unless it `waits`."""

    is_enabled = True

    def __init__(self) -> None:
        self.disk: set[bytes] = set()
        self.waits = False
        self.account: DocumentKv

    def forget_document(self, keys: Iterable[bytes]) -> None:
        if not self.waits:
            self.disk -= set(keys)
            self.account.on_dropped(list(keys))

    def write(self, document_id: str, *keys: bytes) -> None:
        for key in keys:
            self.disk.add(key)
            self.account.on_stored(document_id, key, 10)


@pytest.fixture
def documents(tmp_path: Path, store: JobStore) -> DocumentStore:
    return DocumentStore(tmp_path / "documents", store, 60.0, 1 << 20, lambda: 1000.0)


@pytest.fixture
def kv(store: JobStore, documents: DocumentStore) -> Kv:
    made = Kv()
    made.account = DocumentKv(store, made)
    documents.on_deleted = made.account.sweep
    return made


def test_sizes_are_noted_in_batches(store: JobStore, documents: DocumentStore, kv: Kv) -> None:
    one = documents.put("a", [b"one"], 10).id
    kv.write(one, b"k1", b"k2", b"k1")
    assert store.kv_sizes([one]) == {}
    kv.account.flush()
    assert store.kv_sizes([one, "doc_none"]) == {one: (2, 20)}
    kv.account.on_dropped([b"k1"])
    kv.account.flush()
    assert store.document_kv(one) == [(b"k2", 10)]


def test_a_deleted_document_takes_the_keys_that_no_other_has(documents: DocumentStore, kv: Kv, store: JobStore) -> None:
    one, two = (documents.put("a", [content], 10).id for content in (b"one", b"two"))
    kv.write(one, b"shared", b"own")
    kv.write(two, b"shared")
    documents.delete(one)
    assert kv.disk == {b"shared"}
    documents.delete(two)
    assert kv.disk == set()
    kv.account.sweep()
    assert store.orphan_kv() == []


def test_a_write_under_way_and_expired_documents(documents: DocumentStore, kv: Kv) -> None:
    one, two = (documents.put("a", [content], 10).id for content in (b"one", b"two"))
    kv.write(two, b"k2")
    documents.delete(one)
    kv.write(one, b"late")
    assert documents.sweep(2000.0) == 1
    kv.account.sweep()
    assert kv.disk == set()


def test_keys_stay_in_the_table_until_they_are_dropped(documents: DocumentStore, kv: Kv, store: JobStore) -> None:
    """The head dies after the record went and before the blocks did; the next one finds them."""
    one = documents.put("a", [b"one"], 10).id
    kv.write(one, b"k")
    kv.waits = True
    documents.delete(one)
    assert kv.disk == {b"k"}
    after = Kv()
    after.disk, after.account = kv.disk, DocumentKv(store, after)
    after.is_enabled = False
    after.account.sweep()
    assert after.disk == {b"k"}, "nothing is dropped, and nothing forgotten, while KV is not stored"
    after.is_enabled = True
    after.account.sweep()
    assert after.disk == set()
    after.account.flush()
    assert store.orphan_kv() == []


def test_what_the_store_refuses_is_written_later(
    documents: DocumentStore, kv: Kv, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = documents.put("a", [b"one"], 10).id
    kv.write(one, b"k")

    def refuse(*_: object) -> None:
        raise JobStoreError("locked")

    with monkeypatch.context() as patch:
        patch.setattr(JobStore, "add_kv", refuse)
        kv.account.flush()
    kv.account.on_dropped([b"other"])
    kv.account.close()
    assert store.document_kv(one) == [(b"k", 10)]
    kv.account.on_stored(one, b"after", 3)
    assert store.kv_sizes([one]) == {one: (2, 13)}


def test_imported_blocks_are_held_and_then_belong_to_a_document_or_go(
    documents: DocumentStore, kv: Kv, store: JobStore
) -> None:
    keys = [b"k1", b"k2"]
    with kv.account.importing(keys):
        kv.disk |= set(keys)
        kv.account.sweep()
        assert kv.disk == set(keys)
        one = documents.put("a", [b"one"], 10).id
        kv.account.add_imported(one, {b"k1": 10})
    assert kv.disk == {b"k1"}, "nobody has the other"
    assert store.kv_sizes([one]) == {one: (1, 10)}
    failing = kv.account.importing([b"k1", b"k3"])
    failing.__enter__()
    kv.disk.add(b"k3")
    kv.account.add_imported("doc_that_comes_later", {b"k3": 10})
    assert not failing.__exit__(ValueError, ValueError("cut off"), None)
    assert kv.disk == {b"k1"}
    documents.delete(one)
    kv.account.flush()
    assert (kv.disk, store.orphan_kv()) == (set(), [])


def test_what_was_told_before_an_import_is_written_before_it(kv: Kv, store: JobStore) -> None:
    kv.account.on_dropped([b"k1"])  # waits to be written
    with kv.account.importing([b"k1"]):
        kv.disk.add(b"k1")
    assert kv.disk == set()
    kv.account.flush()
    kv.account.on_dropped([b"k1"])
    with kv.account.importing([b"k1"]):
        kv.account.on_dropped([b"other"])
        kv.account.add_imported("doc_x", {b"k1": 10})
        kv.account.flush()
        assert store.kv_sizes(["doc_x"]) == {"doc_x": (1, 10)}


def test_an_import_that_a_crash_has_ended_leaves_nothing(kv: Kv, store: JobStore) -> None:
    unfinished = kv.account.importing([b"k1"])
    unfinished.__enter__()
    kv.disk.add(b"k1")
    kv.account = DocumentKv(store, kv)  # of the next head
    kv.account.sweep()
    assert kv.disk == set()
