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


def test_a_scale_that_is_to_come_can_still_be_named(store: JobStore) -> None:
    store.put_document(replace(RECORD, scale_len=SCALE_TO_COME))
    assert store.put_document(RECORD).scale_len == SCALE_TO_COME
    assert store.put_document(replace(RECORD, scale_len=7)).scale_len == 7
    assert store.put_document(replace(RECORD, scale_len=SCALE_TO_COME)).scale_len == 7


def test_token_ids_count_as_bytes_on_disk(store: JobStore) -> None:
    store.put_document(RECORD)
    assert store.documents_size() == 4096
    store.count_document(RECORD.id, 1006, 0)
    assert store.documents_size() == 2 * 4096
    store.count_document(RECORD.id, 1007, 0)
    assert store.documents_size() == 3 * 4096


def test_seams_come_back_and_uncounted_documents_are_found(store: JobStore) -> None:
    assert store.put_document(replace(RECORD, seams=(3, 7), parent="p")).seams == (3, 7)
    assert store.uncounted_documents(10) == [RECORD.id]
    store.count_document(RECORD.id, 3, 0)
    assert store.uncounted_documents(10) == []


def test_a_block_is_orphaned_when_no_document_has_it(store: JobStore) -> None:
    store.put_document(RECORD)
    other = replace(RECORD, id="doc_" + "1" * 32)
    store.put_document(other)
    assert store.add_kv(RECORD.id, 5, [b"a"])
    assert store.add_kv(other.id, 7, [b"a", b"b"])
    store.delete_document(other.id)
    assert store.orphan_kv() == [b"b"]
    assert not store.add_kv(other.id, 7, [b"c"]), "nothing is noted of a document that is gone"
    assert store.orphan_kv() == [b"b"]
    store.remove_kv([b"b"])
    store.delete_document(RECORD.id)
    assert store.orphan_kv() == [b"a"]


def test_blocks_by_document_and_those_of_pinned_ones(store: JobStore) -> None:
    other = replace(RECORD, id="doc_" + "1" * 32, pinned=True)
    for record in (RECORD, other):
        store.put_document(record)
    store.add_kv(RECORD.id, 5, [b"a", b"b"])
    store.add_kv(RECORD.id, 9, [b"b"])
    store.add_kv(other.id, 7, [b"c"])
    assert store.document_kv([RECORD.id, "doc_none"]) == {RECORD.id: {b"a": 5, b"b": 5}}
    assert store.pinned_kv() == {b"c"}
    store.pin_document(RECORD.id, True, 0.0)
    store.pin_document(other.id, False, 1.0)
    assert store.pinned_kv() == {b"a", b"b"}


def test_documents_come_in_pages(store: JobStore) -> None:
    ids = [f"doc_{n:032x}" for n in range(5)]
    for n, document_id in enumerate(ids):
        purpose = "batch" if n % 2 else ""
        store.put_document(replace(RECORD, id=document_id, created=float(n // 2), purpose=purpose))

    def page(*given: object, **more: object) -> list[str]:
        return [record.id for record in store.page_documents(*given, **more)]  # type: ignore[arg-type]

    assert page(9) == ids[::-1]
    assert page(2) + page(9, ids[3]) == ids[::-1]
    assert page(9, ids[1], newest_first=False) == ids[2:]
    assert page(9, ids[3], purpose="batch") == [ids[1]]
    assert page(9, purpose="") == ids[::-2]
    assert page(9, "doc_" + "f" * 32) == []


def test_the_newest_upload_says_the_purpose_and_batch_files_are_not_counted(store: JobStore) -> None:
    assert store.put_document(replace(RECORD, purpose="batch")).purpose == "batch"
    assert store.uncounted_documents(9) == []
    assert store.put_document(RECORD).purpose == ""
    assert store.uncounted_documents(9) == [RECORD.id]
