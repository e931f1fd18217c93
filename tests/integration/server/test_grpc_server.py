"""The gRPC server over a job service in memory: every method, streams, health, ports."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.client.client import Client
from cluster.client.models import TokenEvent
from cluster.common.errors import PreflightError
from cluster.config.schema import SecuritySection, ServerSection
from cluster.engine.outputs import OutputToken
from cluster.jobs.model import new_id
from cluster.server.grpc_server import JOBS_SERVICE, MAX_PIECE, GrpcServer
from cluster.text.reasoning import ReasoningSplitter
from protos.jobs import jobs_pb2 as pb
from protos.jobs import jobs_pb2_grpc as rpc
from tests.integration.server.calls import PROMPT, code_of, pieces
from tests.support.fakes.jobs_api import FakeJobService, channel_to, serving
from tests.support.fakes.runtime import FakeRuntime
from tests.support.rigs.head import Served

Code = grpc.StatusCode
ID = new_id("job")


def test_a_job_from_submit_to_delete(service: FakeJobService, stub: rpc.JobsStub):
    job = stub.Submit(PROMPT)
    assert job.state == pb.QUEUED
    assert dict(job.labels) == {"team": "a"}
    assert stub.Get(pb.JobRequest(id=job.id)).answers[0].progress.eta_ms == 5000
    assert [found.id for found in stub.List(pb.ListRequest(states=[pb.QUEUED])).jobs] == [job.id]
    assert not stub.List(pb.ListRequest(states=[pb.FAILED])).jobs
    threading.Timer(0.1, service.finish, [job.id]).start()
    done = stub.Wait(pb.WaitRequest(id=job.id, timeout_s=30))
    assert (done.state, done.answers[0].text, list(done.answers[0].token_ids)) == (pb.SUCCEEDED, "ab", [65, 66])
    assert stub.Cancel(pb.JobRequest(id=job.id)).state == pb.SUCCEEDED
    assert stub.Wait(pb.WaitRequest(id=job.id, timeout_s=3600)).state == pb.SUCCEEDED
    stub.Delete(pb.JobRequest(id=job.id))
    assert code_of(lambda: stub.Get(pb.JobRequest(id=job.id)))[0] is Code.NOT_FOUND


def test_wait_gives_the_job_as_it_is_after_the_timeout(stub: rpc.JobsStub):
    job = stub.Submit(PROMPT)
    began = time.monotonic()
    assert stub.Wait(pb.WaitRequest(id=job.id, timeout_s=0.2)).state == pb.QUEUED
    assert 0.15 < time.monotonic() - began < 2


def test_documents(service: FakeJobService, stub: rpc.JobsStub):
    document = stub.UploadDocument(pieces(b"x" * MAX_PIECE, b"y"))
    assert (document.name, document.size_bytes) == ("report", MAX_PIECE + 1)
    assert stub.GetDocument(pb.DocumentRequest(id=document.id)) == document
    assert list(stub.ListDocuments(pb.ListDocumentsRequest()).documents) == [document]
    asked = pb.DocumentQuestions(document_id=document.id, questions=["a?", "b?"])
    assert [answer.question for answer in stub.Submit(pb.SubmitRequest(document=asked)).answers] == ["a?", "b?"]
    text = pb.DocumentQuestions(text="Grüße", questions=["?"])
    assert service.contents[stub.Submit(pb.SubmitRequest(document=text)).document_id] == "Grüße".encode()
    stub.DeleteDocument(pb.DocumentRequest(id=document.id))
    assert code_of(lambda: stub.DeleteDocument(pb.DocumentRequest(id=document.id)))[0] is Code.NOT_FOUND


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ([], "must have the header"),
        ([pb.DocumentPiece(data=b"x")], "must have the header"),
        ([pb.DocumentPiece()], "must have the header"),
        ([*pieces(b"a"), *pieces(b"b")], "after the header"),
        ([*pieces(b"a"), pb.DocumentPiece()], "after the header"),
        (list(pieces(bytes(MAX_PIECE + 1))), "at most 4194304"),
        ([pb.DocumentPiece(header=pb.DocumentHeader(name="n" * 257))], "name: 257 characters"),
    ],
)
def test_bad_uploads(service: FakeJobService, stub: rpc.JobsStub, sent: list[pb.DocumentPiece], said: str):
    code, details = code_of(lambda: stub.UploadDocument(iter(sent), timeout=20))
    assert code is Code.INVALID_ARGUMENT
    assert said in details
    assert not service.stored


def test_the_size_of_documents_is_bounded(tmp_path: Path):
    largest = 2 * MAX_PIECE + 1
    runtime = FakeRuntime(tmp_path, max_document_bytes=largest)
    runtime.start()
    with Served(runtime, tmp_path) as head, channel_to(head.address) as channel:
        stub = rpc.JobsStub(channel)
        assert stub.UploadDocument(pieces(*[bytes(MAX_PIECE)] * 2, b"x")).size_bytes == largest
        text = pb.DocumentQuestions(text="a" * (largest + 5), questions=["?"])
        for size, call in (
            (largest + 1, lambda: stub.UploadDocument(pieces(*[bytes(MAX_PIECE)] * 2, b"xy"))),
            (largest + 5, lambda: stub.Submit(pb.SubmitRequest(document=text))),
        ):
            code, details = code_of(call)
            assert code is Code.INVALID_ARGUMENT
            assert details == f"document: {size} bytes or more: must be at most {largest} (server.max_document_bytes)"
        assert len(stub.ListDocuments(pb.ListDocumentsRequest()).documents) == 1
    runtime.close()


def test_a_stream_from_progress_to_the_ended_job(service: FakeJobService, stub: rpc.JobsStub):
    job = stub.Submit(PROMPT)
    service.events = [[OutputToken(6, 0, 65, "a"), OutputToken(7, 0, 66, "b", -0.5, ((66, -0.5),))]]
    events = list(stub.Stream(pb.StreamRequest(id=job.id, after=5)))
    assert [event.WhichOneof("event") for event in events] == ["progress", "token", "token", "job"]
    assert [event.number for event in events] == [5, 6, 7, 7]
    assert events[0].progress == pb.ProgressEvent(progress=pb.Progress(total=100, processed=50))
    assert events[2].token.token.top[0].logprob == -0.5
    assert events[3].job.answers[0].text == "ab"
    assert service.closed.wait(5)
    assert code_of(lambda: list(stub.Stream(pb.StreamRequest(id=ID))))[0] is Code.NOT_FOUND
    for after, code in ((1 << 63, Code.INVALID_ARGUMENT), ((1 << 63) - 1, Code.NOT_FOUND)):
        assert code_of(lambda number=after: list(stub.Stream(pb.StreamRequest(id=ID, after=number))))[0] is code
    grouped = list(stub.Stream(pb.StreamRequest(id=stub.Submit(PROMPT).id, after=5, grouped=True)))
    assert [event.WhichOneof("event") for event in grouped] == ["progress", "tokens", "job"]
    assert [event.number for event in grouped] == [5, 7, 7]
    assert list(grouped[1].tokens.tokens) == [event.token for event in events[1:3]]


THOUGHT = ("<thi", "nk>", "wh", "y ", "</think>\n", "\nso", " it is")


@pytest.mark.parametrize("after", [0, 1, 2, 4, 5, 6])
@pytest.mark.parametrize("opened", [False, True])
def test_streamed_tokens_say_reasoning_or_answer(service: FakeJobService, after: int, opened: bool):
    texts = THOUGHT[2:] if opened else THOUGHT
    splitter = ReasoningSplitter(opened)
    tokens = []
    for number, text in enumerate(texts, 1):
        added = splitter.push(text)
        tokens.append(OutputToken(number, 0, 65, text, None, (), splitter.part, *added))
    with serving(service) as (_, address), Client(address) as client:
        job = client.submit(prompt="why?")
        service.committed[job.id] = tokens
        service.events = [group for group in (tokens[after : after + 3], tokens[after + 3 :]) if group]
        events = [event for event in job.stream(after) if isinstance(event, TokenEvent)]
    assert [event.token.text for event in events] == list(texts[after:])
    reasoning = ["", "", "wh", "y", "", "", ""][2 * opened :]
    answer = ["", "", "", "", "", "so", " it is"][2 * opened :]
    parts = ["answer", *["reasoning"] * 3, *["answer"] * 3][2 * opened :]
    assert [event.token.reasoning for event in events] == reasoning[after:]
    assert [event.token.answer for event in events] == answer[after:]
    assert [event.token.part for event in events] == parts[after:]


def test_a_client_that_leaves_closes_the_events(service: FakeJobService, stub: rpc.JobsStub):
    service.endless = True
    call = stub.Stream(pb.StreamRequest(id=stub.Submit(PROMPT).id))
    assert next(call).number == 1
    call.cancel()
    assert service.closed.wait(10)


def test_a_client_that_never_reads_stops_the_events(service: FakeJobService, stub: rpc.JobsStub):
    service.endless = True
    call = stub.Stream(pb.StreamRequest(id=stub.Submit(PROMPT).id))
    next(call)
    last = -1
    for _ in range(50):  # until flow control has stopped the sender
        if service.pulled == last:
            break
        last = service.pulled
        time.sleep(0.3)
    assert service.pulled == last, "events are pulled although nobody reads"
    assert last < 200_000  # at about 120 bytes: what windows of HTTP/2 hold, a few MiB
    assert not service.closed.is_set()
    call.cancel()
    assert service.closed.wait(10)


def test_health_follows_set_serving(server: tuple[GrpcServer, str], channel: grpc.Channel):
    health = health_pb2_grpc.HealthStub(channel)
    watch = health.Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    server[0].set_serving(False)
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    request = health_pb2.HealthCheckRequest(service=JOBS_SERVICE)
    assert health.Check(request).status == health_pb2.HealthCheckResponse.NOT_SERVING
    server[0].set_serving(True)
    assert health.Check(request).status == health_pb2.HealthCheckResponse.SERVING
    unknown = health_pb2.HealthCheckRequest(service="nobody")
    assert code_of(lambda: health.Check(unknown))[0] is Code.NOT_FOUND


def test_cluster_status(stub: rpc.JobsStub):
    reply = stub.ClusterStatus(pb.ClusterStatusRequest())
    assert (reply.model, reply.stages[0].resident_bytes) == ("fake", 1 << 40)


def test_ports(service: FakeJobService, server: tuple[GrpcServer, str]):
    port = int(server[1].rpartition(":")[2])
    second = GrpcServer(service, ServerSection(port=port), SecuritySection())
    with pytest.raises(PreflightError, match="cannot be bound"):
        second.start()
    second.close()
    assert GrpcServer(service, ServerSection(), SecuritySection()).start() == ""


def test_close_ends_waiting_and_streaming_clients(
    service: FakeJobService, server: tuple[GrpcServer, str], stub: rpc.JobsStub
):
    service.endless = True
    job = stub.Submit(PROMPT)
    call = stub.Stream(pb.StreamRequest(id=job.id))
    next(call)
    waiting = stub.Wait.future(pb.WaitRequest(id=job.id, timeout_s=600))
    began = time.monotonic()
    server[0].close(0.2)
    server[0].close(0.2)
    assert time.monotonic() - began < 5
    assert waiting.exception(timeout=5).code() in (Code.CANCELLED, Code.UNAVAILABLE)
    assert service.closed.wait(10)
