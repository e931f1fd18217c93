"""Clients that open calls and then do nothing: their calls are ended, and others are served meanwhile."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.access import call_pool
from cluster.config.schema import SecuritySection
from cluster.engine.outputs import OutputToken
from cluster.server import grpc_server
from protos.jobs import jobs_pb2 as pb
from protos.jobs import jobs_pb2_grpc as rpc
from protos.stage.channel import CHANNEL_OPTIONS
from tests.integration.server.calls import PROMPT, code_of, eventually, pieces
from tests.support.fakes.jobs_api import FakeJobService, serving, write_secret

Code = grpc.StatusCode
STREAMS = 6
KEYS = {name: f"{name}-0123456789abcdef" for name in ("alice", "bob")}


class Clients:
    """Opens connections to one server, each of its own, and holds what it is given until the end."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.stack = contextlib.ExitStack()
        self.released = threading.Event()
        self.stack.callback(self.released.set)

    def stub(self) -> rpc.JobsStub:
        return rpc.JobsStub(self.channel())

    def channel(self) -> grpc.Channel:
        options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        return self.stack.enter_context(grpc.insecure_channel(self.address, options=options))

    def then_nothing(self, *messages: object) -> Iterator[object]:
        """Messages of a client that then sends nothing and does not end either."""
        yield from messages
        self.released.wait(60)


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_pool, "STALL_S", 1.5)
    monkeypatch.setattr(call_pool, "PRESSED_STALL_S", 0.5)
    monkeypatch.setattr(call_pool, "_CHECK_EVERY_S", 0.1)


@pytest.fixture
def service() -> FakeJobService:
    return FakeJobService()


@pytest.fixture
def clients(service: FakeJobService) -> Iterator[Clients]:
    with serving(service, max_streams=STREAMS) as (_, address):
        made = Clients(address)
        with made.stack:
            yield made


def test_idle_uploads_are_ended(service: FakeJobService, clients: Clients):
    stub = clients.stub()
    idle = [stub.UploadDocument.future(clients.then_nothing(*pieces(b"one piece"))) for _ in range(STREAMS)]
    for call in idle:
        code, details = code_of(lambda call=call: call.result(timeout=20))
        assert code is Code.DEADLINE_EXCEEDED
        assert "has sent nothing for 2 s" in details
    assert not service.stored
    assert stub.UploadDocument(pieces(b"whole")).size_bytes == 5


@pytest.mark.parametrize("same_connection", [True, False])
def test_idle_uploads_make_room_before_that(clients: Clients, same_connection: bool):
    stub = clients.stub()
    idle = [stub.UploadDocument.future(clients.then_nothing(*pieces(b"one piece"))) for _ in range(STREAMS)]
    time.sleep(0.7)
    other = stub if same_connection else clients.stub()
    assert other.UploadDocument(pieces(b"whole"), timeout=5).size_bytes == 5
    assert sum(call.done() for call in idle) == 1


def test_readers_that_never_read_are_ended(service: FakeJobService, clients: Clients):
    service.events = [[OutputToken(number, 0, 1, "x" * 100_000)] for number in range(1, 200)]
    stub = clients.stub()
    job = stub.Submit(PROMPT)
    readers = [stub.Stream(pb.StreamRequest(id=job.id)) for _ in range(STREAMS)]
    assert eventually(lambda: stub.Get(pb.JobRequest(id=job.id)) and service.closed.is_set(), 20)
    time.sleep(3)  # twice the limit: others may have begun later
    for reader in readers:
        code, details = code_of(lambda reader=reader: list(reader))
        assert code is Code.UNAVAILABLE
        assert "has read nothing" in details
    assert stub.Wait(pb.WaitRequest(id=job.id, timeout_s=0)).id == job.id


@pytest.mark.parametrize("path", ["/longreach.jobs.v1.Jobs/Get", "/grpc.health.v1.Health/Check"])
def test_calls_without_a_message_are_ended(clients: Clients, path: str):
    channel = clients.channel()
    calls = [channel.stream_unary(path).future(clients.then_nothing()) for _ in range(150)]
    time.sleep(0.7)
    began = time.monotonic()
    assert clients.stub().Submit(PROMPT, timeout=5).id
    health = health_pb2_grpc.HealthStub(clients.channel())
    assert health.Check(health_pb2.HealthCheckRequest(), timeout=5).status == health_pb2.HealthCheckResponse.SERVING
    assert time.monotonic() - began < 5
    codes = {code_of(lambda call=call: call.result(timeout=20))[0] for call in calls}
    # calls that come slowly all wait their time: then none had to make room
    assert codes <= {Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED}


def test_who_waits_for_a_job_stays(service: FakeJobService, clients: Clients):
    stub = clients.stub()
    job = stub.Submit(PROMPT)
    waits = [stub.Wait.future(pb.WaitRequest(id=job.id, timeout_s=3)) for _ in range(STREAMS - 1)]
    assert {wait.result(timeout=10).state for wait in waits} == {pb.QUEUED}
    assert not service.records[job.id].state.is_final


def test_another_connection_gets_its_share(service: FakeJobService, clients: Clients):
    stub = clients.stub()
    job = stub.Submit(PROMPT)
    waits = [stub.Wait.future(pb.WaitRequest(id=job.id, timeout_s=4)) for _ in range(STREAMS)]
    assert eventually(lambda: code_of(lambda: stub.Wait(pb.WaitRequest(id=job.id)))[0] is Code.RESOURCE_EXHAUSTED)
    assert clients.stub().Wait(pb.WaitRequest(id=job.id), timeout=5).id == job.id
    assert eventually(lambda: sum(wait.done() for wait in waits) == 1, 2)
    (ended,) = [wait for wait in waits if wait.done()]
    code, details = code_of(ended.result)
    assert code is Code.RESOURCE_EXHAUSTED
    assert details == "ended to make room for others (server.max_streams): 6"


def test_each_key_gets_its_share(tmp_path: Path, service: FakeJobService):
    lines = "".join(f"{name}:{key}\n" for name, key in KEYS.items())
    security = SecuritySection(api_keys_file=write_secret(tmp_path / "keys", lines))
    alice, bob = ([("authorization", f"Bearer {key}")] for key in KEYS.values())
    with serving(service, security, max_streams=STREAMS) as (_, address), Clients(address).stack as stack:
        stub = rpc.JobsStub(stack.enter_context(grpc.insecure_channel(address)))  # one connection for both
        jobs = {key[0]: stub.Submit(PROMPT, metadata=key).id for key in (alice, bob)}

        def wait(key: list[tuple[str, str]]) -> grpc.Future:
            return stub.Wait.future(pb.WaitRequest(id=jobs[key[0]], timeout_s=4), metadata=key)

        of_alice = [wait(alice) for _ in range(STREAMS)]
        time.sleep(0.3)
        of_bob = [wait(bob) for _ in range(STREAMS)]
        assert eventually(lambda: sum(call.done() for call in of_alice) == STREAMS / 2, 2)
        assert eventually(lambda: sum(call.done() for call in of_bob) == STREAMS / 2, 2)
        assert stub.Get(pb.JobRequest(id=jobs[bob[0]]), metadata=bob).id == jobs[bob[0]]


def closed_within(connection: socket.socket, seconds: float) -> bool:
    """Whether the other side closes a connection on which nothing is sent."""
    connection.settimeout(seconds)
    try:
        while connection.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def test_connections_have_a_number_and_a_time(service: FakeJobService, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(grpc_server, "_IDLE_CONNECTIONS", 4)
    short = {"grpc.server_handshake_timeout_ms": 1500, "grpc.max_connection_idle_ms": 1500}
    monkeypatch.setattr(grpc_server, "_CONNECTION_OPTIONS", grpc_server._CONNECTION_OPTIONS | short)
    with serving(service, max_streams=4) as (_, address), contextlib.ExitStack() as stack:
        host, _, port = address.rpartition(":")
        silent = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(12)]
        assert eventually(lambda: sum(closed_within(one, 0.01) for one in silent) >= 4, 3)
        assert eventually(lambda: all(closed_within(one, 0.01) for one in silent), 6)
        stub = rpc.JobsStub(stack.enter_context(grpc.insecure_channel(address)))
        assert stub.Submit(PROMPT, timeout=5, wait_for_ready=True).id
