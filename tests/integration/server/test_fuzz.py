"""Broken bytes for every method of the gRPC server: it lives on, and each failure is a status that says what is wrong.

2,000 requests each to a server over a service in memory and to a whole head over a fake pipeline;
`LONGREACH_FUZZ=10000` sends as many, `LONGREACH_FUZZ_SEED` others.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from cluster.jobs.model import new_id
from cluster.server.grpc_server import JOBS_SERVICE
from protos.jobs import jobs_pb2 as pb
from protos.jobs import jobs_pb2_grpc as rpc
from tests.support.fakes.jobs_api import FakeJobService, channel_to, serving
from tests.support.fakes.runtime import FakeRuntime
from tests.support.oracles.integrity import check_engine
from tests.support.rigs.head import Served

Code = grpc.StatusCode
ID = new_id("job")
PROMPT = pb.SubmitRequest(prompt="hello")


@pytest.fixture(params=["server", "head"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "server":
        with serving(FakeJobService(), max_streams=4) as (_, made):
            yield made
        return
    runtime = FakeRuntime(tmp_path / "runtime")
    runtime.start()
    with Served(runtime, tmp_path / "data", max_queued_jobs=100_000) as head:
        yield head.address
        assert head.client.submit(token_ids=[1, 2], max_tokens=2).wait(60).state == "succeeded"
        check_engine(head.runtime.engine)
    runtime.close()


REQUESTS = {
    "UploadDocument": pb.DocumentPiece(header=pb.DocumentHeader(name="n")),
    "AppendDocument": pb.DocumentPiece(header=pb.DocumentHeader(name="n", append_to=new_id("doc"))),
    "PinDocument": pb.PinRequest(id=new_id("doc"), pinned=True),
    "ExportDocument": pb.ExportRequest(id=new_id("doc"), without_kv=True),
    "ImportDocument": pb.ArchivePiece(data=b"manifest.json" + bytes(600)),
    "CountTokens": pb.DocumentPiece(header=pb.DocumentHeader(name="n")),
    "GetDocument": pb.DocumentRequest(id=new_id("doc")),
    "ListDocuments": pb.ListDocumentsRequest(),
    "DeleteDocument": pb.DocumentRequest(id=new_id("doc")),
    "Submit": pb.SubmitRequest(
        document=pb.DocumentQuestions(text="t", questions=["q"]), deadline_s=5, idempotency_key="k", labels={"a": "b"},
        sampling=pb.Sampling(max_tokens=3, temperature=0.5, top_p=0.5, seed=1, stop=["s"], stop_token_ids=[1]),
    ),
    "Get": pb.JobRequest(id=ID),
    "List": pb.ListRequest(states=[1, 2], labels={"a": "b"}, page_size=10, page_token="x"),
    "Stream": pb.StreamRequest(id=ID, after=3),
    "Wait": pb.WaitRequest(id=ID, timeout_s=0.01),
    "Cancel": pb.JobRequest(id=ID),
    "Delete": pb.JobRequest(id=ID),
    "ClusterStatus": pb.ClusterStatusRequest(),
}  # fmt: skip
_STREAMED = ("UploadDocument", "AppendDocument", "ImportDocument", "CountTokens", "Info")
OTHERS = {
    "/grpc.health.v1.Health/Check": health_pb2.HealthCheckRequest(service=JOBS_SERVICE),
    "/grpc.health.v1.Health/List": health_pb2.HealthListRequest(),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": reflection_pb2.ServerReflectionRequest(
        host="h", file_containing_symbol=JOBS_SERVICE
    ),
    "/longreach.jobs.v1.Jobs/Nothing": pb.Empty(),
}
ALL = {f"/{JOBS_SERVICE}/{name}": request for name, request in REQUESTS.items()} | OTHERS


def mutate(noise: random.Random, raw: bytes) -> bytes:
    data = bytearray(raw)
    kind = noise.randrange(4)
    if kind == 0:  # flipped bytes
        for _ in range(noise.randint(1, 6) if data else 0):
            data[noise.randrange(len(data))] = noise.randrange(256)
    elif kind == 1:
        del data[noise.randrange(len(data) + 1) :]
    elif kind == 2:  # a field of any number and type, with any content
        at = noise.choice([0, len(data)])
        data[at:at] = bytes([noise.randrange(8, 128)]) + noise.randbytes(noise.randint(0, 12))
    else:
        data = bytearray(noise.randbytes(noise.randint(0, 200)))
    return bytes(data)


def test_mutated_requests_never_break_the_server(address: str):
    assert set(REQUESTS) == {method.name for method in pb.DESCRIPTOR.services_by_name["Jobs"].methods}
    noise = random.Random(os.environ.get("LONGREACH_FUZZ_SEED", "20"))
    seen: dict[grpc.StatusCode, int] = {}
    with channel_to(address) as channel:
        for number in range(int(os.environ.get("LONGREACH_FUZZ", "2000"))):
            path, request = list(ALL.items())[number % len(ALL)]
            count = noise.randint(1, 3) if path.endswith(_STREAMED) else 1
            raw = [mutate(noise, request.SerializeToString()) for _ in range(count)]
            code = status_of(channel, path, raw)
            assert code not in (Code.UNKNOWN, Code.INTERNAL, Code.DEADLINE_EXCEEDED, Code.UNAVAILABLE), (path, raw)
            seen[code] = seen.get(code, 0) + 1
        assert {Code.OK, Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.UNIMPLEMENTED} <= set(seen), seen
        assert rpc.JobsStub(channel).Submit(PROMPT, timeout=10).id


def status_of(channel: grpc.Channel, path: str, raw: list[bytes]) -> grpc.StatusCode:
    """For the server, a call of one message each way looks the same as a stream of one."""
    try:
        list(channel.stream_stream(path)(iter(raw), timeout=20))
    except grpc.RpcError as error:
        return error.code()
    return Code.OK


def test_noise_on_the_socket_leaves_the_server_up(address: str):
    host, _, port = address.rpartition(":")
    noise = random.Random(1)
    for head in (b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00"):
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(head + noise.randbytes(500))
    with channel_to(address) as channel:
        assert rpc.JobsStub(channel).Submit(PROMPT, timeout=10).id
