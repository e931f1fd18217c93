"""Every method of the gRPC server: with a key of its own, with that of another tenant, and about what never existed.

A method needs a rule in `RULES`: what of a tenant it names. One without fails here. Calls without a valid key are in
test_security.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.access.keys import ApiKeys
from cluster.config.schema import SecuritySection, ServerSection
from cluster.jobs.model import new_id
from cluster.jobs.tenants.service import TenantService
from cluster.jobs.tenants.tenant import Tenant
from cluster.server.grpc_server import JOBS_SERVICE, GrpcServer
from protos.jobs import jobs_pb2 as pb
from protos.jobs import jobs_pb2_grpc as rpc
from tests.integration.server.calls import every_method, pieces
from tests.support.fakes.jobs_api import channel_to
from tests.support.rigs.service import Bench

ANN, BOB, OPS = "a" * 20, "b" * 20, "o" * 20
KEYS = {ANN: Tenant("ann"), BOB: Tenant("bob"), OPS: Tenant("ops", is_admin=True)}
MARK = "words of ann"  # in all that ann submits and uploads


@dataclass(frozen=True)
class Rule:
    """What a method names, and messages that ask about it.

    Attributes:
        kind: "job" or "doc": an object, which must be the caller's; "own": it makes or lists what is the caller's;
            "key": any key, and the answer has nothing of anybody.
        ask: from an id, the messages of a call.
    """

    kind: str
    ask: Callable[[str], Iterator[Any]]


def one(make: Callable[[str], Any]) -> Callable[[str], Iterator[Any]]:
    return lambda name: iter([make(name)])


def appended(name: str) -> Iterator[pb.DocumentPiece]:
    yield pb.DocumentPiece(header=pb.DocumentHeader(append_to=name))
    yield pb.DocumentPiece(data=b"more")


def about(name: str) -> pb.SubmitRequest:
    return pb.SubmitRequest(document=pb.DocumentQuestions(document_id=name, questions=["why?"]))


RULES = {
    "UploadDocument": Rule("own", lambda name: pieces(b"text")),
    "AppendDocument": Rule("doc", appended),
    "GetDocument": Rule("doc", one(lambda name: pb.DocumentRequest(id=name))),
    "ListDocuments": Rule("own", one(lambda name: pb.ListDocumentsRequest())),
    "PinDocument": Rule("doc", one(lambda name: pb.PinRequest(id=name, pinned=True))),
    "DeleteDocument": Rule("doc", one(lambda name: pb.DocumentRequest(id=name))),
    "ExportDocument": Rule("doc", one(lambda name: pb.ExportRequest(id=name))),
    "ImportDocument": Rule("own", one(lambda name: pb.ArchivePiece(data=b"no archive"))),
    "CountTokens": Rule("key", lambda name: pieces(b"text")),
    "Submit": Rule("doc", one(about)),
    "Get": Rule("job", one(lambda name: pb.JobRequest(id=name))),
    "List": Rule("own", one(lambda name: pb.ListRequest())),
    "Stream": Rule("job", one(lambda name: pb.StreamRequest(id=name))),
    "Wait": Rule("job", one(lambda name: pb.WaitRequest(id=name, timeout_s=20.0))),
    "Cancel": Rule("job", one(lambda name: pb.JobRequest(id=name))),
    "Delete": Rule("job", one(lambda name: pb.JobRequest(id=name))),
    "ClusterStatus": Rule("key", one(lambda name: pb.ClusterStatusRequest())),
}
OTHER_SERVICES = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}  # know of no jobs


def metadata(key: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {key}")]


class Rig:
    def __init__(self, bench: Bench, channel: grpc.Channel) -> None:
        self.bench, self.channel, self.ids = bench, channel, list[str]()

    def make(self, kind: str) -> str:
        """An object of ann: a job that has ended, or a document."""
        service = TenantService(self.bench.service, Tenant("ann"))
        if kind == "doc":
            made = service.add_document(MARK, [f"{MARK} {len(self.ids)}".encode()], 1 << 20).id
        else:
            stub = rpc.JobsStub(self.channel)
            request = pb.SubmitRequest(prompt=MARK, labels={"mark": MARK}, sampling=pb.Sampling(max_tokens=2))
            made = stub.Submit(request, metadata=metadata(ANN), timeout=20).id
            service.wait(made, 20)
        self.ids.append(made)
        return made

    def call(self, method: str, key: str, name: str) -> tuple[grpc.StatusCode, str, bytes]:
        """Code, details and all bytes of the answer."""
        messages = (message.SerializeToString() for message in RULES[method].ask(name))
        call = self.channel.stream_stream(f"/{JOBS_SERVICE}/{method}")(messages, metadata=metadata(key), timeout=30)
        answer = b""
        try:
            for reply in call:
                answer += reply
        except grpc.RpcError as error:
            return error.code(), error.details() or "", answer
        return grpc.StatusCode.OK, "", answer


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    bench = Bench(tmp_path)
    server = GrpcServer(bench.service, ServerSection(), SecuritySection(), 0, keys=ApiKeys(KEYS))
    with channel_to(server.start()) as channel:
        yield Rig(bench, channel)
    server.close(0.0)
    bench.close()


def test_every_method_has_a_rule(rig: Rig) -> None:
    """A new one: say in RULES what of a tenant it names."""
    paths = [path.split("/")[1:] for path in every_method(rig.channel, metadata(ANN))]
    assert {method for service, method in paths if service == JOBS_SERVICE} == RULES.keys()
    assert {service for service, _ in paths} - {JOBS_SERVICE} == OTHER_SERVICES


def test_another_key_gets_what_an_unknown_object_gives(rig: Rig) -> None:
    for kind in ("job", "doc"):
        rig.make(kind)
    for method, rule in RULES.items():
        if rule.kind in ("own", "key"):
            _, details, answer = rig.call(method, BOB, "")
            assert not any(name.encode() in answer for name in rig.ids), method
            assert MARK not in details + answer.decode(errors="replace"), method
            continue
        name, absent = rig.make(rule.kind), new_id(rule.kind)
        told = [rig.call(method, BOB, asked) for asked in (name, absent)]
        assert told[0][0] is grpc.StatusCode.NOT_FOUND, (method, told[0])
        assert told[0][1].replace(name, "ID") == told[1][1].replace(absent, "ID"), method
        assert told[0][2] == told[1][2] == b"", method
        for key in (OPS, ANN) if method not in ("Delete", "DeleteDocument") else (ANN,):
            assert rig.call(method, key, name)[0] is grpc.StatusCode.OK, method


def test_lists_and_counts_are_those_of_the_caller(rig: Rig) -> None:
    stub = rpc.JobsStub(rig.channel)
    rig.bench.runtime.shard.hold()
    jobs = {
        key: {stub.Submit(pb.SubmitRequest(prompt="a", idempotency_key="k"), metadata=metadata(key)).id}
        for key in (ANN, BOB)
    }
    for key, seen in (*jobs.items(), (OPS, jobs[ANN] | jobs[BOB])):
        assert {job.id for job in stub.List(pb.ListRequest(), metadata=metadata(key)).jobs} == seen
        status = stub.ClusterStatus(pb.ClusterStatusRequest(), metadata=metadata(key))
        assert status.queued + status.running == len(seen)
    documents = {key: stub.UploadDocument(pieces(b"the same"), metadata=metadata(key)).id for key in (ANN, BOB)}
    for key, name in documents.items():
        found = stub.ListDocuments(pb.ListDocumentsRequest(), metadata=metadata(key)).documents
        assert [one.id for one in found] == [name]
    assert len(stub.ListDocuments(pb.ListDocumentsRequest(), metadata=metadata(OPS)).documents) == 2


def test_a_shared_document_is_everybodys_to_read(rig: Rig) -> None:
    stub = rpc.JobsStub(rig.channel)

    def upload() -> Iterator[pb.DocumentPiece]:
        yield pb.DocumentPiece(header=pb.DocumentHeader(name="law", shared=True))
        yield pb.DocumentPiece(data=b"The code of dark river is 1.")

    shared = stub.UploadDocument(upload(), metadata=metadata(ANN))
    assert shared.shared
    seen = stub.GetDocument(pb.DocumentRequest(id=shared.id), metadata=metadata(BOB))
    assert (seen.id, seen.name) == (shared.id, "law")
    assert rig.call("Submit", BOB, shared.id)[0] is grpc.StatusCode.OK
    for method in ("PinDocument", "DeleteDocument"):
        code, details, _ = rig.call(method, BOB, shared.id)
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "only that key can change it" in details


def test_an_archive_becomes_a_document_of_whoever_imports_it(rig: Rig) -> None:
    stub, name = rpc.JobsStub(rig.channel), rig.make("doc")
    archive = [*stub.ExportDocument(pb.ExportRequest(id=name), metadata=metadata(ANN))]
    made = stub.ImportDocument(iter(archive), metadata=metadata(BOB))
    assert (made.name, made.shared) == (MARK, False)
    assert made.id != name
    listed = stub.ListDocuments(pb.ListDocumentsRequest(), metadata=metadata(BOB)).documents
    assert [one.id for one in listed] == [made.id]
    assert rig.call("GetDocument", ANN, made.id)[0] is grpc.StatusCode.NOT_FOUND
    assert rig.call("DeleteDocument", BOB, made.id)[0] is grpc.StatusCode.OK
    assert rig.call("GetDocument", ANN, name)[0] is grpc.StatusCode.OK
