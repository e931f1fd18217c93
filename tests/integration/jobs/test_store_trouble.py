"""A store that is damaged, locked, full, removed or replaced while a head runs: what clients hear, and what is kept."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import grpc
import pytest

from cluster.client.errors import Busy, Unavailable
from cluster.common.errors import JobStoreError
from cluster.jobs.model import JobInput, JobSpec, JobState
from cluster.jobs.sqlite import database as database_module
from protos.jobs import jobs_pb2 as pb
from protos.jobs.jobs_pb2_grpc import JobsStub
from protos.jobs.sampling import AnswerOptions
from tests.integration.server.calls import PROMPT, code_of, pieces
from tests.support.fakes.jobs_api import channel_to
from tests.support.fakes.runtime import FakeRuntime
from tests.support.rigs.head import Served, until
from tests.support.rigs.service import Bench

Code = grpc.StatusCode
TEXT = "The code of dark river is 1."


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    runtime = FakeRuntime(tmp_path, max_documents_bytes=8 << 20, max_document_bytes=4 << 20)
    runtime.start()
    head = Served(runtime, tmp_path / "data")
    head.__enter__()
    yield head
    with contextlib.suppress(JobStoreError):
        head.__exit__(None, None, None)
    head._head.close()
    runtime.close()


@pytest.fixture
def stub(served: Served) -> Iterator[JobsStub]:
    with channel_to(served.address) as channel:
        yield JobsStub(channel)


def every_call(stub: JobsStub, job_id: str) -> dict[str, Callable[[], object]]:
    job, text = pb.JobRequest(id=job_id), pb.DocumentQuestions(text=TEXT, questions=["?"])
    document = pb.DocumentRequest(id="doc_" + "0" * 32)
    return {
        "Submit": lambda: stub.Submit(PROMPT),
        "Submit text": lambda: stub.Submit(pb.SubmitRequest(document=text)),
        "Upload": lambda: stub.UploadDocument(pieces(b"x")),
        "Get": lambda: stub.Get(job),
        "List": lambda: stub.List(pb.ListRequest()),
        "Stream": lambda: list(stub.Stream(pb.StreamRequest(id=job_id))),
        "Wait": lambda: stub.Wait(pb.WaitRequest(id=job_id, timeout_s=1)),
        "Cancel": lambda: stub.Cancel(job),
        "Delete": lambda: stub.Delete(job),
        "GetDocument": lambda: stub.GetDocument(document),
        "ListDocuments": lambda: stub.ListDocuments(pb.ListDocumentsRequest()),
        "DeleteDocument": lambda: stub.DeleteDocument(document),
    }


def remove_database(data: Path) -> None:
    (data / "jobs.sqlite").unlink()


def remove_log(data: Path) -> None:
    (data / "jobs.sqlite-wal").unlink()


def move_folder(data: Path) -> None:
    data.rename(data.with_name("elsewhere"))


def remove_folder(data: Path) -> None:
    shutil.rmtree(data)


def replace_database(data: Path) -> None:
    copy = data / "copy"
    shutil.copy(data / "jobs.sqlite", copy)
    copy.replace(data / "jobs.sqlite")


def replace_folder(data: Path) -> None:
    data.rename(data.with_name("elsewhere"))
    shutil.copytree(data.with_name("elsewhere"), data)


def cut_off(data: Path) -> None:
    with (data / "jobs.sqlite").open("r+b") as file:
        file.truncate(4096)


@pytest.mark.parametrize(
    "change", [remove_database, remove_log, move_folder, remove_folder, replace_database, replace_folder, cut_off]
)
def test_a_store_that_goes_away_is_noticed_by_every_call(
    served: Served, stub: JobsStub, change: Callable[[Path], None]
) -> None:
    job = served.client.submit(prompt="Once", max_tokens=3)
    served.runtime.shard.let(100)
    job.wait(20)
    served.store.check()
    change(served.folder)
    for name, call in every_call(stub, job.id).items():
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() is Code.UNAVAILABLE, name
        assert "while in use" in caught.value.details(), name
        assert dict(caught.value.trailing_metadata())["retry-after-ms"] == "5000"
    with pytest.raises(JobStoreError, match=r"was removed|was replaced|was cut off"):
        served.store.check()
    with pytest.raises(Unavailable, match="while in use"):
        list(served.client.jobs())
    until(lambda: "while in use" in stub.ClusterStatus(pb.ClusterStatusRequest()).problem, "a status that says why")
    if change in (remove_database, move_folder, remove_folder):
        assert not (served.folder / "jobs.sqlite").exists(), "nobody makes an empty one"


def test_a_store_that_comes_back_is_used_again(served: Served, stub: JobsStub) -> None:
    away = served.folder.with_name("elsewhere")
    served.folder.rename(away)
    assert code_of(lambda: stub.Submit(PROMPT))[0] is Code.UNAVAILABLE
    away.rename(served.folder)
    served.runtime.shard.let(100)

    def is_taken() -> bool:
        with contextlib.suppress(grpc.RpcError):
            return bool(stub.Submit(PROMPT).id)
        return False

    until(is_taken, "a job that is taken")
    assert served.client.submit(prompt="Once", max_tokens=3).wait(20)


def test_a_locked_store(served: Served, stub: JobsStub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "_BUSY_TIMEOUT_S", 0.2)
    with closing(sqlite3.connect(served.folder / "jobs.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for call in (lambda: stub.Submit(PROMPT), lambda: stub.UploadDocument(pieces(b"x"))):
            code, details = code_of(call)
            assert code is Code.UNAVAILABLE
            assert "another process uses it" in details
        assert not stub.List(pb.ListRequest()).jobs, "readers do not wait for it"
        other.execute("ROLLBACK")
    assert stub.Submit(PROMPT).id
    served.runtime.shard.let(100)


def test_a_full_store(served: Served, stub: JobsStub) -> None:
    served.store._db._writer.execute("PRAGMA max_page_count = 1")  # SQLite answers as for a full disk
    long = pb.SubmitRequest(prompt="word " * 900)
    for _ in range(60):  # the rest of the last pages is used up
        with contextlib.suppress(grpc.RpcError):
            stub.Submit(long)
    code, details = code_of(lambda: stub.Submit(long))
    assert code is Code.RESOURCE_EXHAUSTED
    assert "free space on its disk" in details
    with pytest.raises(Busy, match="free space") as caught:
        served.client.submit(prompt="word " * 900, max_tokens=3)
    assert caught.value.retry_after_s == 5.0
    served.store._db._writer.execute("PRAGMA max_page_count = 1000000")
    assert stub.Submit(long).id
    served.runtime.shard.let(10_000)


def test_a_page_that_is_damaged_while_it_runs(served: Served, stub: JobsStub) -> None:
    ids = [stub.Submit(pb.SubmitRequest(prompt="word " * 900)).id for _ in range(20)]
    served.runtime.shard.let(10_000)
    for job_id in ids:
        served.service.wait(job_id, 20)
    served.store._db._checkpoint("TRUNCATE")
    path = served.folder / "jobs.sqlite"
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(8192)
        file.write(b"\xff" * (size - 8192))
    served.store._db._close_idle()  # with the pages that they remember
    for job_id in ids:
        code, details = code_of(lambda job_id=job_id: stub.Get(pb.JobRequest(id=job_id)))
        assert code is Code.UNAVAILABLE
        assert "the file is damaged" in details


def test_a_refused_text_leaves_nothing(served: Served, stub: JobsStub) -> None:
    """Too long by its bytes or its tokens, with a key of another body, with wrong options, while the head drains."""

    def submit(text: str, **values: object) -> grpc.StatusCode:
        asked = pb.DocumentQuestions(text=text, questions=["?"])
        return code_of(lambda: stub.Submit(pb.SubmitRequest(document=asked, **values)))[0]

    stub.Submit(pb.SubmitRequest(prompt="x", idempotency_key="k"))
    assert submit("word " * 700_000) is Code.INVALID_ARGUMENT
    assert submit("a b c d e f g h i j k " * 20_000) is Code.INVALID_ARGUMENT
    assert submit("key", idempotency_key="k") is Code.ALREADY_EXISTS
    assert submit("ids", sampling=pb.Sampling(stop_token_ids=[4_000_000_000])) is Code.INVALID_ARGUMENT
    served.service._draining = True
    assert submit("draining") is Code.UNAVAILABLE
    served.service._draining = False
    assert list(stub.ListDocuments(pb.ListDocumentsRequest()).documents) == []
    assert list((served.folder / "documents").iterdir()) == []
    # what others have stays
    kept = stub.UploadDocument(pieces(b"key"))
    assert submit("key", idempotency_key="k") is Code.ALREADY_EXISTS
    assert [found.id for found in stub.ListDocuments(pb.ListDocumentsRequest()).documents] == [kept.id]
    good = pb.DocumentQuestions(text=TEXT, questions=["?"])
    assert stub.Submit(pb.SubmitRequest(document=good)).document_id
    served.runtime.shard.let(1000)


def test_documents_have_a_quota(served: Served, stub: JobsStub) -> None:
    half = b"x" * (3 << 20)
    first = stub.UploadDocument(pieces(half))
    stub.UploadDocument(pieces(half, b"y"))
    code, details = code_of(lambda: stub.UploadDocument(pieces(half, b"z")))
    assert code is Code.RESOURCE_EXHAUSTED
    assert "server.max_documents_bytes" in details
    with ThreadPoolExecutor(4) as threads:  # uploads at a time count, too
        codes = list(threads.map(lambda n: upload_code(stub, bytes([n]) * (1 << 20)), range(4)))
    assert codes.count(None) <= 1
    stub.DeleteDocument(pb.DocumentRequest(id=first.id))
    assert stub.UploadDocument(pieces(half, b"z")).size_bytes == len(half) + 1
    with pytest.raises(Busy, match="delete some"):
        served.client.documents.add("z" * (3 << 20))


def upload_code(stub: JobsStub, data: bytes) -> grpc.StatusCode | None:
    try:
        stub.UploadDocument(pieces(data))
    except grpc.RpcError as error:
        return error.code()
    return None


def test_a_head_goes_on_over_damaged_jobs(tmp_path: Path) -> None:
    """Between two heads, rows of several jobs and a document are damaged: each fails alone, with its reason."""
    bench = Bench(tmp_path, max_queued_jobs=20)
    bench.runtime.shard.hold()
    document = bench.service.documents.put("a", [TEXT.encode()], 1 << 20)
    asked = JobSpec(JobInput(document_id=document.id, questions=("What?",)), AnswerOptions(max_tokens=4))
    about = bench.service.submit(asked).id
    spec, state, answer, good = (bench.submit(max_tokens=4, first=first) for first in (7, 8, 9, 10))
    bench.close()
    with closing(sqlite3.connect(tmp_path / "jobs.sqlite", isolation_level=None)) as db:
        where = "WHERE job = (SELECT seq FROM jobs WHERE id = ?)"
        db.execute(f"UPDATE specs SET spec = substr(spec, 1, 50) {where}", (spec,))
        db.execute("UPDATE jobs SET state = 'resting' WHERE id = ?", (state,))
        db.execute(f"UPDATE answers SET finish_reason = 'tired' {where}", (answer,))
    path = tmp_path / "documents" / document.id
    path.write_bytes(path.read_bytes()[:-1])
    bench.open()
    bench.runtime.shard.let(1000)
    for job_id, reason in ((spec, "spec"), (state, "state"), (answer, "tired"), (about, "upload it again")):
        record = bench.service.wait(job_id, 20)
        assert record.state is JobState.FAILED
        assert reason in record.error
    assert bench.service.wait(good, 20).state is JobState.SUCCEEDED
    assert len(bench.service.jobs([], {}, 100, "")[0]) == 5
    bench.check_idle()
    bench.close()
