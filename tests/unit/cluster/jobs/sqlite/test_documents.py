"""The table of documents: what an upload of the same bytes changes, and what counts as orphaned."""

from __future__ import annotations

from dataclasses import replace

from cluster.jobs.model import SCALE_TO_COME, DocumentRecord
from cluster.jobs.store import JobStore

RECORD = DocumentRecord("doc_" + "0" * 32, "a", 9, 1.0, 100.0, used=1.0)


def test_a_length_scale_and_a_pin_stay(store: JobStore) -> None:
    assert store.put_document(RECORD) == RECORD
    assert store.put_document(replace(RECORD, scale_len=SCALE_TO_COME)).scale_len == SCALE_TO_COME
    store.count_document(RECORD.id, 5, 4096)
    assert store.put_document(replace(RECORD, scale_len=7, pinned=True, expires=0.0)).scale_len == 4096
    pinned = store.put_document(replace(RECORD, expires=300.0, used=2.0, source_hash="h"))
    assert pinned == replace(RECORD, tokens=5, scale_len=4096, pinned=True, expires=0.0, used=2.0, source_hash="h")
    assert store.touch_document(RECORD.id, 500.0)
    assert store.expire_documents(1e9) == 0
    assert store.pin_document(RECORD.id, False, 600.0)
    assert store.expire_documents(599.0) == 0
    assert store.expire_documents(600.0) == 1
    assert not store.pin_document(RECORD.id, True, 1.0)


def test_seams_come_back_and_uncounted_documents_are_found(store: JobStore) -> None:
    assert store.put_document(replace(RECORD, seams=(3, 7), parent="p")).seams == (3, 7)
    assert store.uncounted_documents(10) == [RECORD.id]
    store.count_document(RECORD.id, 3, 0)
    assert store.uncounted_documents(10) == []


def test_a_block_is_orphaned_when_no_document_has_it(store: JobStore) -> None:
    store.put_document(RECORD)
    store.add_kv([(RECORD.id, b"a", 1), ("doc_gone", b"a", 1), ("doc_gone", b"b", 1)])
    assert store.orphan_kv() == [b"b"]
    store.remove_kv([b"b"])
    store.delete_document(RECORD.id)
    assert store.orphan_kv() == [b"a"]
