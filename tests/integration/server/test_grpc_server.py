"""The gRPC door over a job service in memory: every method, every status code, limits, broken bytes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.client.client import Client
from cluster.client.models import TokenEvent
from cluster.common.errors import PreflightError
from cluster.config.schema import SecuritySection, ServerSection
from cluster.jobs.model import Busy, Conflict, InvalidJob, JobToken, NotAllowedNow, new_id
from cluster.server.grpc_server import JOBS_SERVICE, MAX_PIECE, Gateway
from protos.jobs import jobs_pb2 as pb
from protos.jobs import jobs_pb2_grpc as rpc
from tests.support.fakes.jobs_api import FakeJobService, channel_to, serving

Code = grpc.StatusCode
PROMPT = pb.SubmitRequest(prompt="hello", sampling=pb.Sampling(max_tokens=4, seed=3), labels={"team": "a"})


@pytest.fixture
def service() -> FakeJobService:
    return FakeJobService()


@pytest.fixture
def door(service: FakeJobService) -> Iterator[tuple[Gateway, str]]:
    with serving(service, max_document_bytes=3 * MAX_PIECE, max_streams=4) as made:
        yield made


@pytest.fixture
def channel(door: tuple[Gateway, str]) -> Iterator[grpc.Channel]:
    with channel_to(door[1]) as made:
        yield made


@pytest.fixture
def stub(channel: grpc.Channel) -> rpc.JobsStub:
    return rpc.JobsStub(channel)


def code_of(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert len(caught.value.details().splitlines()) <= 1
    return caught.value.code(), caught.value.details()


def pieces(*data: bytes) -> Iterator[pb.DocumentPiece]:
    yield pb.DocumentPiece(header=pb.DocumentHeader(name="report"))
    for part in data:
        yield pb.DocumentPiece(data=part)


def eventually(condition: Callable[[], object], within_s: float = 10.0) -> bool:
    until = time.monotonic() + within_s
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return bool(condition())


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
        (list(pieces(*[bytes(MAX_PIECE)] * 3, b"x")), "server.max_document_bytes"),
        ([pb.DocumentPiece(header=pb.DocumentHeader(name="n" * 257))], "name: 257 characters"),
    ],
)
def test_bad_uploads(service: FakeJobService, stub: rpc.JobsStub, sent: list[pb.DocumentPiece], said: str):
    code, details = code_of(lambda: stub.UploadDocument(iter(sent), timeout=20))
    assert code is Code.INVALID_ARGUMENT
    assert said in details
    assert not service.stored


def test_a_document_of_the_largest_size(stub: rpc.JobsStub):
    assert stub.UploadDocument(pieces(*[bytes(MAX_PIECE)] * 3)).size_bytes == 3 * MAX_PIECE


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidJob("prompt: 9 tokens:\nmust be fewer"), Code.INVALID_ARGUMENT),
        (Conflict("idempotency_key: k: other body"), Code.ALREADY_EXISTS),
        (NotAllowedNow("job: runs"), Code.FAILED_PRECONDITION),
        (Busy("queue: full", 1.5), Code.RESOURCE_EXHAUSTED),
        (ValueError("secret detail"), Code.INTERNAL),
        (KeyError("secret detail"), Code.INTERNAL),
    ],
)
def test_errors_have_codes(
    service: FakeJobService,
    stub: rpc.JobsStub,
    error: Exception,
    code: grpc.StatusCode,
    caplog: pytest.LogCaptureFixture,
):
    service.error = error
    with pytest.raises(grpc.RpcError) as caught:
        stub.Submit(PROMPT)
    assert caught.value.code() is code
    trailing = dict(caught.value.trailing_metadata())
    assert trailing.get("retry-after-ms") == ("1500" if isinstance(error, Busy) else None)
    if code is Code.INTERNAL:
        reference = caught.value.details().split("reference ")[1].split(":")[0]
        assert "secret" not in caught.value.details()
        assert reference in caplog.text
        assert "secret detail" in caplog.text
    else:
        assert caught.value.details().replace("\\n", "\n") == str(error)


ID = new_id("job")


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Get", pb.JobRequest(id="../../etc/passwd")),
        ("Get", pb.JobRequest()),
        ("GetDocument", pb.DocumentRequest(id=ID)),
        ("Cancel", pb.JobRequest(id=ID + "\n")),
        ("Delete", pb.JobRequest(id=ID.upper())),
        ("Wait", pb.WaitRequest(id=ID, timeout_s=-1)),
        ("Wait", pb.WaitRequest(id=ID, timeout_s=float("nan"))),
        ("Wait", pb.WaitRequest(id=ID, timeout_s=3601)),
        ("List", pb.ListRequest(page_size=1001)),
        ("List", pb.ListRequest(states=[0])),
        ("List", pb.ListRequest(states=[8])),
        ("List", pb.ListRequest(page_token="nonsense")),
        ("Submit", pb.SubmitRequest()),
        ("Submit", pb.SubmitRequest(prompt="a", deadline_s=-1)),
        ("Submit", pb.SubmitRequest(prompt="a", sampling=pb.Sampling(temperature=float("nan")))),
    ],
)
def test_bad_requests(stub: rpc.JobsStub, method: str, request_: object):
    assert code_of(lambda: getattr(stub, method)(request_, timeout=10))[0] is Code.INVALID_ARGUMENT


def test_a_stream_from_progress_to_the_ended_job(service: FakeJobService, stub: rpc.JobsStub):
    job = stub.Submit(PROMPT)
    service.events = [[JobToken(6, 0, 65, "a"), JobToken(7, 0, 66, "b", -0.5, ((66, -0.5),))]]
    events = list(stub.Stream(pb.StreamRequest(id=job.id, after=5)))
    assert [event.WhichOneof("event") for event in events] == ["progress", "token", "token", "job"]
    assert [event.number for event in events] == [5, 6, 7, 7]
    assert events[2].token.token.top[0].logprob == -0.5
    assert events[3].job.answers[0].text == "ab"
    assert service.closed.wait(5)
    assert code_of(lambda: list(stub.Stream(pb.StreamRequest(id=ID))))[0] is Code.NOT_FOUND
    grouped = list(stub.Stream(pb.StreamRequest(id=stub.Submit(PROMPT).id, after=5, grouped=True)))
    assert [event.WhichOneof("event") for event in grouped] == ["progress", "tokens", "job"]
    assert [event.number for event in grouped] == [5, 7, 7]
    assert list(grouped[1].tokens.tokens) == [event.token for event in events[1:3]]


THOUGHT = ("<thi", "nk>", "wh", "y ", "</think>\n", "\nso", " it is")


@pytest.mark.parametrize("after", [0, 1, 2, 4, 5, 6])
@pytest.mark.parametrize("opened", [False, True])
def test_streamed_tokens_say_reasoning_or_answer(service: FakeJobService, after: int, opened: bool):
    texts = THOUGHT[2:] if opened else THOUGHT
    tokens = [JobToken(number, 0, 65, text) for number, text in enumerate(texts, 1)]
    with serving(service, reasoning_opened=lambda spec: opened) as (_, address), Client(address) as client:
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


def test_long_calls_have_a_limit(service: FakeJobService, stub: rpc.JobsStub):
    service.endless = True
    job = stub.Submit(PROMPT)
    calls = [stub.Stream(pb.StreamRequest(id=job.id)) for _ in range(4)]
    for call in calls:
        next(call)
    for refused in (
        lambda: next(stub.Stream(pb.StreamRequest(id=job.id))),
        lambda: stub.Wait(pb.WaitRequest(id=job.id, timeout_s=1)),
        lambda: stub.UploadDocument(pieces(b"x")),
    ):
        code, details = code_of(refused)
        assert code is Code.RESOURCE_EXHAUSTED
        assert "server.max_streams" in details
    assert stub.Get(pb.JobRequest(id=job.id)).id == job.id
    calls.pop().cancel()
    assert eventually(lambda: service.closed.is_set())
    service.endless = False

    def works() -> bool:
        try:
            return bool(stub.UploadDocument(pieces(b"x")).id)
        except grpc.RpcError:
            return False

    assert eventually(works)


def test_health_follows_set_serving(door: tuple[Gateway, str], channel: grpc.Channel):
    health = health_pb2_grpc.HealthStub(channel)
    watch = health.Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    door[0].set_serving(False)
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    request = health_pb2.HealthCheckRequest(service=JOBS_SERVICE)
    assert health.Check(request).status == health_pb2.HealthCheckResponse.NOT_SERVING
    door[0].set_serving(True)
    assert health.Check(request).status == health_pb2.HealthCheckResponse.SERVING
    unknown = health_pb2.HealthCheckRequest(service="nobody")
    assert code_of(lambda: health.Check(unknown))[0] is Code.NOT_FOUND


def test_watchers_have_a_limit_and_do_not_stop_checks(channel: grpc.Channel):
    health = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest()
    watches = [health.Watch(request) for _ in range(16)]
    assert all(next(watch).status == health_pb2.HealthCheckResponse.SERVING for watch in watches)
    assert code_of(lambda: next(health.Watch(request)))[0] is Code.RESOURCE_EXHAUSTED
    assert health.Check(request, timeout=10).status == health_pb2.HealthCheckResponse.SERVING


def test_cluster_status(stub: rpc.JobsStub):
    reply = stub.ClusterStatus(pb.ClusterStatusRequest())
    assert (reply.model, reply.stages[0].resident_bytes) == ("fake", 1 << 40)


def test_ports(service: FakeJobService, door: tuple[Gateway, str]):
    port = int(door[1].rpartition(":")[2])
    second = Gateway(service, ServerSection(port=port), SecuritySection())
    with pytest.raises(PreflightError, match="cannot be bound"):
        second.start()
    second.close()
    assert Gateway(service, ServerSection(), SecuritySection()).start() == ""


def test_close_ends_waiting_and_streaming_clients(
    service: FakeJobService, door: tuple[Gateway, str], stub: rpc.JobsStub
):
    service.endless = True
    job = stub.Submit(PROMPT)
    call = stub.Stream(pb.StreamRequest(id=job.id))
    next(call)
    waiting = stub.Wait.future(pb.WaitRequest(id=job.id, timeout_s=600))
    began = time.monotonic()
    door[0].close(0.2)
    door[0].close(0.2)
    assert time.monotonic() - began < 5
    assert waiting.exception(timeout=5).code() in (Code.CANCELLED, Code.UNAVAILABLE)
    assert service.closed.wait(10)
