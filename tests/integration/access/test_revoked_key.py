"""A key is revoked while its streams are open, over gRPC and HTTP: they end, those of other keys go on."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest

from cluster.access.audit import AuditLog
from cluster.access.call_pool import CallPool
from cluster.access.key_file import KeyFile
from cluster.access.live_keys import LiveKeys
from cluster.config.schema import SecuritySection, ServerSection
from cluster.http.http_server import HttpServer
from cluster.jobs.subscriptions import JobEvent
from cluster.jobs.tenants.tenant import Tenant
from cluster.server.grpc_server import GrpcServer
from protos.jobs import jobs_pb2 as pb
from protos.jobs import jobs_pb2_grpc as rpc
from tests.integration.server.calls import eventually
from tests.support.fakes.jobs_api import channel_to
from tests.support.rigs.http import AnsweringService, make_backend

CHAT = {"messages": [{"role": "user", "content": "a"}], "stream": True}


class SteadyService(AnsweringService):
    """Its streams have some 100 tokens a second."""

    def _events(self, job_id: str, after: int) -> Iterator[JobEvent]:
        for event in super()._events(job_id, after):
            time.sleep(0.01)
            yield event


@dataclass
class Rig:
    file: KeyFile
    law: str
    ops: str
    stub: rpc.JobsStub
    url: str
    streams: CallPool
    audit: Path
    service: AnsweringService

    def submit(self, key: str) -> str:
        return self.stub.Submit(pb.SubmitRequest(prompt="a"), metadata=[("authorization", f"Bearer {key}")]).id

    def follow(self, key: str) -> grpc.StatusCode | None:
        """Read a stream until it ends; return its status."""
        request = pb.StreamRequest(id=self.submit(key))
        try:
            for _ in self.stub.Stream(request, metadata=[("authorization", f"Bearer {key}")], timeout=30):
                pass
        except grpc.RpcError as error:
            return error.code()
        return None

    def chat(self, key: str) -> str:
        """Read a chat over HTTP until it ends; return its last event."""
        last, until = "", time.monotonic() + 30
        headers = {"Authorization": f"Bearer {key}"}
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=CHAT, headers=headers, timeout=30) as answer:
            for line in answer.iter_lines():
                last = line or last
                if time.monotonic() > until:
                    return "it did not end"
        return last


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    file = KeyFile(tmp_path / "keys")
    law, ops = file.create(Tenant("law")), file.create(Tenant("ops"))
    service = SteadyService()
    service.endless = True
    backend = make_backend(service)
    audit = AuditLog(tmp_path / "audit.jsonl")
    keys = LiveKeys(tmp_path / "keys", backend.streams, audit)
    server = GrpcServer(service, ServerSection(), SecuritySection(), 0, backend.streams, keys, audit)  # type: ignore[arg-type]
    keys.watch(backend.short)
    http = HttpServer(backend, SecuritySection(), keys, port=0)
    keys.start()
    with channel_to(server.start()) as channel:
        yield Rig(
            file, law, ops, rpc.JobsStub(channel), http.start(), backend.streams, tmp_path / "audit.jsonl", service
        )  # fmt: skip
    keys.close()
    server.close(0.0)
    http.close(0.0)


def test_open_streams_of_a_revoked_key_end(rig: Rig) -> None:
    with ThreadPoolExecutor(3) as pool:
        followed, chatted = pool.submit(rig.follow, rig.law), pool.submit(rig.chat, rig.law)
        other = pool.submit(rig.follow, rig.ops)
        assert eventually(lambda: len(rig.streams) == 3)
        began = time.monotonic()
        assert rig.file.revoke("law") == 1
        assert followed.result(10) is grpc.StatusCode.UNAUTHENTICATED
        assert json.loads(chatted.result(10).removeprefix("data: "))["error"]["code"] == "revoked"
        assert time.monotonic() - began < 5.0
        with pytest.raises(grpc.RpcError) as caught:
            rig.submit(rig.law)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert httpx.get(f"{rig.url}/v1/models", headers={"x-api-key": rig.law}).status_code == 401
        assert len(rig.streams) == 1
        rig.file.revoke("ops")
        assert other.result(10) is grpc.StatusCode.UNAUTHENTICATED
    lines = [json.loads(line) for line in rig.audit.read_text().splitlines()]
    assert [line["subject"] for line in lines if line["action"] == "key_revoked"] == ["law", "ops"]
    assert rig.law not in rig.audit.read_text()
    new = rig.file.create(Tenant("new"))
    assert eventually(lambda: httpx.get(f"{rig.url}/v1/models", headers={"x-api-key": new}).status_code == 200)


def test_a_request_that_was_begun_with_a_revoked_key_does_nothing(rig: Rig) -> None:
    host, _, port = rig.url.partition("//")[2].partition(":")
    head = f"POST /v1/responses HTTP/1.1\r\nHost: {host}\r\nx-api-key: {rig.law}\r\nContent-Length: 40\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(f'{head}{{"input": "a", '.encode())
        time.sleep(0.3)
        rig.file.revoke("law")
        assert connection.recv(4096).startswith(b"HTTP/1.1 401 ")
        with contextlib.suppress(OSError):
            connection.sendall(b'"background": true}   ')
    assert rig.service.specs == []
