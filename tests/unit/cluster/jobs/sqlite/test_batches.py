"""Batches in the store: every line is answered once, a status follows the one before, files in use stay."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.jobs.model import DocumentRecord, NotAllowedNow, new_id
from cluster.jobs.sqlite.batches import BatchLine, BatchRecord, BatchStatus
from cluster.jobs.store import JobStore

S = BatchStatus
INPUT = "doc_" + "1" * 32
BATCH = BatchRecord(
    "batch_" + "0" * 32,
    "team a",
    S.VALIDATING,
    "/v1/completions",
    INPUT,
    "24h",
    1.0,
    86401.0,
    {"night": "1"},
    problems=[],
)
LINES = [BatchLine(n, 10 * n, 9, f"c{n}") for n in range(1, 5)]


def numbers(lines: list[BatchLine]) -> list[int]:
    return [line.line for line in lines]


def test_a_batch_comes_back(store: JobStore) -> None:
    store.create_batch(BATCH)
    assert store.get_batch(BATCH.id) == BATCH
    assert store.get_batch(new_id("batch")) is None
    assert store.unfinished_batches() == [BATCH]


def test_batches_of_an_owner_come_in_pages(store: JobStore) -> None:
    ids = [f"batch_{n:032x}" for n in range(4)]
    for n, batch_id in enumerate(ids):
        store.create_batch(replace(BATCH, id=batch_id, owner="b" if n == 2 else "a"))
    assert [batch.id for batch in store.list_batches("a", 2)] == [ids[3], ids[1]]
    assert [batch.id for batch in store.list_batches("a", 9, ids[3])] == [ids[1], ids[0]]
    assert [batch.id for batch in store.list_batches("b", 9)] == [ids[2]]
    assert store.list_batches("a", 9, new_id("batch")) == []


def test_a_line_is_answered_once(store: JobStore) -> None:
    store.create_batch(BATCH)
    bad = BatchLine(5, 50, 1, "", 400, "{}")
    assert store.add_lines(BATCH.id, [*LINES, bad])
    assert not store.add_lines(BATCH.id, LINES)
    assert numbers(store.open_lines(BATCH.id, 1, 2)) == [2, 3]
    assert store.answer_line(BATCH.id, 2, 200, "good")
    assert not store.answer_line(BATCH.id, 2, 500, "again")
    assert not store.answer_line(BATCH.id, 9, 200, "no such line")
    assert store.answer_line(BATCH.id, 3, 404, "bad")
    batch = store.get_batch(BATCH.id)
    assert batch is not None
    assert (batch.status, batch.total, batch.completed, batch.failed) == (S.IN_PROGRESS, 5, 1, 2)
    assert [line.result for line in store.results(BATCH.id, True, 0, 9)] == ["good"]
    assert numbers(store.results(BATCH.id, False, 0, 9)) == [3, 5]
    store.close_lines(BATCH.id, lambda line: f"{line.custom_id} is late", 408)
    assert [line.result for line in store.results(BATCH.id, False, 3, 1)] == ["c4 is late"]
    assert store.open_lines(BATCH.id, 0, 9) == []
    closed = store.get_batch(BATCH.id)
    assert closed is not None
    assert (closed.completed, closed.failed) == (1, 4)


def test_a_status_follows_another_one_and_is_timed(store: JobStore) -> None:
    store.create_batch(BATCH)
    assert not store.move_batch(BATCH.id, [S.IN_PROGRESS], S.CANCELLING)
    assert store.add_lines(BATCH.id, LINES)
    assert store.move_batch(BATCH.id, [S.VALIDATING, S.IN_PROGRESS], S.CANCELLING)
    assert not store.end_batch(BATCH.id, S.FINALIZING, S.COMPLETED, "a", "b")
    assert store.end_batch(BATCH.id, S.CANCELLING, S.CANCELLED, "a", "b")
    batch = store.get_batch(BATCH.id)
    assert batch is not None
    assert (batch.status, batch.output, batch.errors, batch.finalizing) == (S.CANCELLED, "a", "b", None)
    assert batch.started is not None
    assert batch.cancelling is not None
    assert batch.finished is not None
    assert store.open_lines(BATCH.id, 0, 9) == []
    assert store.unfinished_batches() == []
    assert store.expire_batches(batch.finished) == 0
    assert store.expire_batches(batch.finished + 1) == 1
    assert store.get_batch(BATCH.id) is None


def test_a_batch_may_fail_before_it_begins(store: JobStore) -> None:
    store.create_batch(BATCH)
    assert store.fail_batch(BATCH.id, [{"code": "empty_file"}])
    assert not store.fail_batch(BATCH.id, [])
    batch = store.get_batch(BATCH.id)
    assert batch is not None
    assert (batch.status, batch.problems) == (S.FAILED, [{"code": "empty_file"}])


def test_a_damaged_row_has_failed(store: JobStore) -> None:
    store.create_batch(BATCH)
    with store._db.writing() as db:
        db.execute("UPDATE batches SET status = 'late', metadata = '{'")
    batch = store.get_batch(BATCH.id)
    assert batch is not None
    assert (batch.status, batch.problems[0]["code"]) == (S.FAILED, "damaged")


def test_the_input_of_a_batch_that_has_not_ended_stays(store: JobStore) -> None:
    store.put_document(DocumentRecord(INPUT, "in.jsonl", 9, 1.0, 2.0, purpose="batch"))
    store.create_batch(BATCH)
    assert store.expire_documents(1e9) == 0
    with pytest.raises(NotAllowedNow, match="or a batch"):
        store.delete_document(INPUT)
    store.fail_batch(BATCH.id, [])
    assert store.delete_document(INPUT)
