"""Stored KV of documents through the whole head: what is shown of it, and that nothing of a deleted one is left."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cluster.jobs.model import JobInput, JobRecord, JobSpec, NotAllowedNow
from cluster.jobs.store import JobStore
from protos.jobs.sampling import AnswerOptions
from tests.support.fakes.kv import FakeDisk
from tests.support.fakes.stage import eventually
from tests.support.rigs.archives import stored_kv
from tests.support.rigs.service import Bench

TEXT = b"The code of dark river is 1. " * 40
BLOCK = 64


@pytest.fixture
def disk() -> FakeDisk:
    return FakeDisk()


@pytest.fixture
def stored(tmp_path: Path, disk: FakeDisk) -> Iterator[Bench]:
    bench = Bench(tmp_path, disk=disk)
    yield bench
    bench.close()


def run(bench: Bench, document_id: str, question: str = "", **spec: object) -> JobRecord:
    given = JobInput(document_id, (question,) if question else (), read=not question)
    record = bench.service.wait(bench.service.submit(JobSpec(given, AnswerOptions(max_tokens=2), **spec)).id, 20)
    backlog = bench.runtime.kv_store.backlog
    eventually(lambda: not len(backlog) and not backlog.busy)
    return record


def test_stored_tokens_are_those_of_the_document_that_any_question_can_use(stored: Bench, disk: FakeDisk) -> None:
    document = stored.service.add_document("a", [TEXT], 1 << 20)
    assert stored_kv(stored, document.id) == (0, 0)
    run(stored, document.id)
    tokens = stored.service.documents.get(document.id).tokens
    head = stored.service.document_tokens.head_tokens()
    expected = (head + tokens) // BLOCK * BLOCK - head
    assert stored_kv(stored, document.id)[0] == expected
    answer = run(stored, document.id, "What? " * 60).answers[0]
    assert answer.cached_tokens >= expected + head
    assert len(disk.written) * BLOCK > head + tokens, "blocks of the question"
    assert stored_kv(stored, document.id) == (expected, len(disk.written) * disk.block_bytes)
    lost = next(key for key, block in disk.blocks.items() if block.start == 2 * BLOCK)
    stored.runtime.kv_store.index.remove([lost])
    assert stored_kv(stored, document.id)[0] == 2 * BLOCK - head


def test_a_deleted_document_leaves_nothing_on_disk_and_in_memory(stored: Bench, disk: FakeDisk) -> None:
    one = stored.service.add_document("a", [TEXT], 1 << 20)
    two = stored.service.add_document("b", [TEXT + b"And more of it. " * 20], 1 << 20)
    for document in (one, two):
        run(stored, document.id)
    run(stored, one.id, "What? " * 60)
    pool = stored.runtime.engine.scheduler.pool
    stored.service.documents.delete(one.id)
    assert set(disk.written) == set(stored.store.document_kv([two.id])[two.id])
    assert run(stored, two.id, "And?").answers[0].cached_tokens > BLOCK
    stored.service.documents.delete(two.id)
    assert disk.written == {}
    eventually(lambda: not pool.published())
    again = stored.service.add_document("a", [TEXT], 1 << 20)
    assert again.id == one.id
    assert run(stored, again.id).answers[0].cached_tokens == 0


@pytest.mark.parametrize("is_stored", [False, True])
def test_expired_documents_leave_nothing(tmp_path: Path, is_stored: bool) -> None:
    disk = FakeDisk() if is_stored else None
    bench = Bench(tmp_path, disk=disk, document_ttl_s=60)
    try:
        document = bench.service.add_document("a", [TEXT], 1 << 20)
        run(bench, document.id)
        pool = bench.runtime.engine.scheduler.pool
        assert pool.published()
        bench.service._sweep(bench.service.now() + 100)
        assert bench.service.documents.list() == []
        eventually(lambda: not pool.published())
        assert disk is None or disk.written == {}
    finally:
        bench.close()


def test_the_next_head_drops_what_a_killed_one_has_left(stored: Bench, disk: FakeDisk) -> None:
    document = stored.service.add_document("a", [TEXT], 1 << 20)
    run(stored, document.id)
    assert disk.written
    stored.documents = stored.service.documents
    stored.documents.on_deleted = lambda: None  # it dies right after the record is gone
    stored.documents.delete(document.id)
    assert disk.written
    stored.restart()
    eventually(lambda: not disk.written)
    eventually(lambda: not stored.store.orphan_kv())


def test_pages_of_a_document_that_is_deleted_while_its_cancelled_job_still_runs(stored: Bench, disk: FakeDisk) -> None:
    document = stored.service.add_document("a", [TEXT], 1 << 20)
    stored.service.count_document(document.id)
    stored.runtime.shard.hold()
    spec = JobSpec(JobInput(document.id, ("What?",)), AnswerOptions(max_tokens=2))
    record = stored.service.submit(spec)
    stored.service._decide_end(record.id, "deadline exceeded")
    stored.service.documents.delete(document.id)
    stored.runtime.shard.let(100)
    pool = stored.runtime.engine.scheduler.pool
    eventually(lambda: pool.usage == 0)
    assert not pool.published()
    assert disk.written == {}


def test_a_document_deleted_while_there_is_no_pipeline(bench: Bench) -> None:
    """A repaired pipeline goes on with the pages of the one before it."""
    document = bench.service.add_document("a", [TEXT], 1 << 20)
    run(bench, document.id)
    scheduler = bench.runtime.engine.scheduler
    kept: list[int] = []
    bench.runtime.before_start = lambda: bench.service.documents.delete(document.id)
    bench.service.document_kv._keep_pages = lambda read: kept.append(len(read()))
    assert scheduler.pool.published()
    bench.runtime.fail()
    eventually(lambda: bench.runtime.supervisor.running is not None and len(kept) >= 2)
    assert kept == [0, 0], "at the deletion, and by the next pipeline"


@pytest.mark.parametrize("seed", range(2))
def test_at_no_moment_is_a_block_on_disk_that_is_not_noted(
    stored: Bench, disk: FakeDisk, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a SIGKILL at any moment leaves nothing: random questions, deletions, additions, evictions and full disks."""
    rng = random.Random(seed)
    wrong: list[str] = []
    remove_kv = JobStore.remove_kv

    def noted() -> set[bytes]:
        return {key for keys in stored.store.document_kv(sorted(seen)).values() for key in keys}

    def check_write(key: bytes) -> None:
        if key not in noted():
            wrong.append("written before it is noted")

    def check_remove(self: JobStore, keys: Iterable[bytes]) -> None:
        keys = list(keys)
        if disk.written.keys() & set(keys):
            wrong.append("not noted any more before it is dropped")
        remove_kv(self, keys)

    monkeypatch.setattr(JobStore, "remove_kv", check_remove)
    monkeypatch.setattr("cluster.kv_store.store.PAUSE_S", 0.01)
    disk.on_write = check_write
    texts = [TEXT, TEXT + b"And more of it. " * 20, b"Something else. " * 90]
    seen: set[str] = set()
    store = stored.runtime.kv_store
    for _ in range(40):
        document = stored.service.add_document("a", [rng.choice(texts)], 1 << 20)
        seen.add(document.id)
        given = JobInput(document.id, (f"What {rng.randrange(9)}? " * rng.randint(1, 60),))
        record = stored.service.submit(JobSpec(given, AnswerOptions(max_tokens=2)))
        action = rng.randrange(5)
        if action == 0:
            stored.service.cancel(record.id)
        else:
            stored.service.wait(record.id, 20)
        if action in (1, 2):
            with suppress(NotAllowedNow):
                stored.service.documents.delete(document.id)
        if action == 3:
            store.limits = dict.fromkeys(store.limits, rng.choice((5, 20, 500)) * disk.block_bytes)
            store.sweep()
        disk.is_full = action == 4 and rng.random() < 0.3
        assert wrong == []
        assert set(disk.written) <= noted()
    for document in stored.service.documents.list():
        for job in stored.service.jobs((), {}, 100, "")[0]:
            stored.service.wait(job.id, 20)
        stored.service.documents.delete(document.id)
    eventually(lambda: not len(store.backlog) and not store.backlog.busy)
    assert disk.written == {}
    eventually(lambda: not stored.runtime.engine.scheduler.pool.published())
