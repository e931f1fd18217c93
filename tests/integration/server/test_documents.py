"""Documents over gRPC: added, appended, read, asked about, pinned and deleted, across restarts of the head."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc

from cluster.server.grpc_server import MAX_PIECE
from protos.jobs import jobs_pb2 as pb
from protos.jobs import jobs_pb2_grpc as rpc
from tests.integration.server.calls import code_of, eventually
from tests.support.fakes.jobs_api import channel_to
from tests.support.fakes.kv import FakeDisk
from tests.support.fakes.runtime import FakeRuntime
from tests.support.rigs.head import Served

Code = grpc.StatusCode
TEXT = b"The code of dark river is 1. " * 20
GONE = "doc_" + "0" * 32


def sent(data: bytes, **header: object) -> Iterator[pb.DocumentPiece]:
    yield pb.DocumentPiece(header=pb.DocumentHeader(**header))  # type: ignore[arg-type]
    yield pb.DocumentPiece(data=data)


def ask(stub: rpc.JobsStub, **document: object) -> pb.Job:
    asked = pb.DocumentQuestions(**document)  # type: ignore[arg-type]
    job = stub.Submit(pb.SubmitRequest(document=asked, sampling=pb.Sampling(max_tokens=2)))
    done = stub.Wait(pb.WaitRequest(id=job.id, timeout_s=30))
    assert done.state == pb.SUCCEEDED
    return done


def test_the_life_of_a_document(tmp_path: Path) -> None:
    runtime = FakeRuntime(tmp_path / "runtime")
    runtime.start()
    with Served(runtime, tmp_path / "data") as head, channel_to(head.address) as channel:
        stub = rpc.JobsStub(channel)
        first = stub.UploadDocument(sent(TEXT, name="a", pinned=True, source_hash="ab" * 32))
        assert (first.pinned, first.expires, first.source_hash) == (True, 0, "ab" * 32)
        count = stub.CountTokens(sent(TEXT))
        assert (count.size_bytes, count.max_model_len) == (len(TEXT), runtime.max_model_len)
        assert eventually(lambda: stub.GetDocument(pb.DocumentRequest(id=first.id)).tokens == count.tokens)
        read = ask(stub, document_id=first.id, read=True)
        assert (read.read, read.priority, read.answers[0].text) == (True, -1, "")
        job = ask(stub, document_id=first.id, questions=["What?"])
        assert job.answers[0].cached_tokens >= count.tokens // 16 * 16 - 16
        child = stub.AppendDocument(sent(TEXT[:58], append_to=first.id))
        assert (child.name, child.parent, child.pinned) == ("a", first.id, False)
    with Served(runtime, tmp_path / "data") as head, channel_to(head.address) as channel:
        stub = rpc.JobsStub(channel)
        assert {document.id for document in stub.ListDocuments(pb.ListDocumentsRequest()).documents} == {
            first.id, child.id,
        }  # fmt: skip
        job = ask(stub, document_id=child.id, questions=["What?"])
        assert job.answers[0].cached_tokens >= count.tokens // 16 * 16 - 16
        stub.DeleteDocument(pb.DocumentRequest(id=first.id))
        assert ask(stub, document_id=child.id, questions=["Who?"]).answers[0].cached_tokens > 0
        assert stub.PinDocument(pb.PinRequest(id=child.id, pinned=True)).expires == 0
        assert stub.PinDocument(pb.PinRequest(id=child.id, pinned=False)).expires > 0
        for call in (
            lambda: stub.PinDocument(pb.PinRequest(id=GONE, pinned=True)),
            lambda: stub.AppendDocument(sent(b"x", append_to=first.id)),
        ):
            assert code_of(call)[0] is Code.NOT_FOUND
        for call in (
            lambda: stub.AppendDocument(sent(b"x")),
            lambda: stub.UploadDocument(sent(b"x", append_to=child.id)),
            lambda: stub.UploadDocument(sent(b"x", source_hash="x")),
            lambda: stub.UploadDocument(sent(b"x", max_tokens=1 << 30)),
            lambda: stub.CountTokens(sent(b"\xff")),
        ):
            assert code_of(call)[0] is Code.INVALID_ARGUMENT
    runtime.close()


def test_out_of_one_head_and_into_another(tmp_path: Path) -> None:
    disks = FakeDisk(), FakeDisk()
    runtimes = [FakeRuntime(tmp_path / f"runtime-{number}", disk=disk) for number, disk in enumerate(disks)]
    for runtime in runtimes:
        runtime.start()
    path = tmp_path / "river.longreach"
    with Served(runtimes[0], tmp_path / "here") as head:
        document = head.client.documents.add(TEXT.decode(), name="river")
        head.client.submit(document, "What?", max_tokens=2).wait(30)
        assert eventually(lambda: head.client.documents.get(document.id).stored_tokens >= 64)
        runtimes[0].kv_store.backlog.wait_empty(10)
        size = head.client.documents.export(document.id, path)
        assert path.stat().st_size == size
        with channel_to(head.address) as channel:
            stub = rpc.JobsStub(channel)
            assert code_of(lambda: list(stub.ExportDocument(pb.ExportRequest(id=GONE))))[0] is Code.NOT_FOUND
            assert code_of(lambda: list(stub.ExportDocument(pb.ExportRequest(id="x"))))[0] is Code.INVALID_ARGUMENT
            runtimes[0].kv_store.detach(0.0)
            export = stub.ExportDocument(pb.ExportRequest(id=document.id))
            assert code_of(lambda: list(export))[0] is Code.UNAVAILABLE
            assert dict(export.trailing_metadata())["retry-after-ms"] == "10000"
    with Served(runtimes[1], tmp_path / "there", max_document_bytes=len(TEXT)) as head:
        archive = path.read_bytes()
        with channel_to(head.address) as channel:
            stub = rpc.JobsStub(channel)
            for data in (b"", b"x", bytes(MAX_PIECE + 1), archive[:-700]):
                pieces = iter([pb.ArchivePiece(data=data)])
                assert code_of(lambda pieces=pieces: stub.ImportDocument(pieces))[0] is Code.INVALID_ARGUMENT
        assert head.client.documents.list() == []
        imported = head.client.documents.import_(path)
        assert (imported.id, imported.name, imported.tokens) == (document.id, "river", imported.tokens)
        assert imported.stored_tokens >= 64
        assert head.client.submit(imported, "What?", max_tokens=2).wait(30).answers[0].cached_tokens >= 64
    for runtime in runtimes:
        runtime.close()
