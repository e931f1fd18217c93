"""What the interceptor does around every method: errors as status codes, bad requests, bounds on long calls."""

from __future__ import annotations

import errno
import sqlite3

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.common.errors import JobStoreError, JobStoreFull
from cluster.jobs.model import DocumentDamaged, InvalidJob, JobConflict, NotAllowedNow, ServiceBusy, new_id
from protos.jobs import jobs_pb2 as pb
from protos.jobs import jobs_pb2_grpc as rpc
from tests.integration.server.calls import PROMPT, code_of, eventually, pieces
from tests.support.fakes.jobs_api import FakeJobService

Code = grpc.StatusCode
ID = new_id("job")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidJob("prompt: 9 tokens:\nmust be fewer"), Code.INVALID_ARGUMENT),
        (JobConflict("idempotency_key: k: other body"), Code.ALREADY_EXISTS),
        (NotAllowedNow("job: runs"), Code.FAILED_PRECONDITION),
        (ServiceBusy("queue: full", 1.5), Code.RESOURCE_EXHAUSTED),
        (DocumentDamaged("document: 1 byte: must be 2: upload it again"), Code.INVALID_ARGUMENT),
        (JobStoreError("job store: database is locked: try again"), Code.UNAVAILABLE),
        (JobStoreFull("job store: disk is full: free space"), Code.RESOURCE_EXHAUSTED),
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
    wait_ms = "1500" if isinstance(error, ServiceBusy) else "5000" if isinstance(error, JobStoreError) else None
    assert trailing.get("retry-after-ms") == wait_ms
    if code is Code.INTERNAL:
        reference = caught.value.details().split("reference ")[1].split(":")[0]
        assert "secret" not in caught.value.details()
        assert reference in caplog.text
        assert "secret detail" in caplog.text
    else:
        assert caught.value.details().replace("\\n", "\n") == str(error)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), Code.RESOURCE_EXHAUSTED, "No space left on device"),
        (OSError(errno.EROFS, "Read-only file system"), Code.UNAVAILABLE, "Read-only file system"),
        (sqlite3.OperationalError("disk I/O error"), Code.UNAVAILABLE, "disk I/O error"),
    ],
)
def test_errors_of_the_disk_that_nobody_explained(
    service: FakeJobService, stub: rpc.JobsStub, error: Exception, code: grpc.StatusCode, said: str
):
    service.error = error
    assert code_of(lambda: stub.Submit(PROMPT)) == (code, f"the head cannot do this now: {said}")


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


def test_watchers_have_a_limit_and_do_not_stop_checks(channel: grpc.Channel):
    health = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest()
    watches = [health.Watch(request) for _ in range(16)]
    assert all(next(watch).status == health_pb2.HealthCheckResponse.SERVING for watch in watches)
    assert code_of(lambda: next(health.Watch(request)))[0] is Code.RESOURCE_EXHAUSTED
    assert health.Check(request, timeout=10).status == health_pb2.HealthCheckResponse.SERVING
