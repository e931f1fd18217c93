"""The HTTP server over real sockets: who is slow, silent, gone, or too many; TLS; start and end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.access import call_pool
from cluster.common.errors import PreflightError
from cluster.config.schema import SecuritySection
from cluster.engine.outputs import OutputToken
from cluster.http import http_server
from cluster.http.core import body as bodies
from cluster.http.core import protocol
from cluster.http.core.protocol import BUFFERED_BYTES, BoundedProtocol
from cluster.http.http_server import HttpServer
from cluster.jobs.model import JobState
from cluster.jobs.subscriptions import JobEvent
from tests.support.data.certificates import Authority
from tests.support.rigs.head import until
from tests.support.rigs.http import AnsweringService, make_backend, serving_http

BODY = {"messages": [{"role": "user", "content": "hi"}]}
STREAM = json.dumps(BODY | {"stream": True}).encode()


def connect(url: str, *pieces: bytes, buffered: int = 0) -> socket.socket:
    """A connection on which something was sent; the kernel keeps about `buffered` bytes for it that it has not read."""
    address = url.rpartition("//")[2].rpartition(":")
    client = socket.socket()
    client.settimeout(20)
    if buffered:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffered)
    client.connect((address[0], int(address[2])))
    for piece in pieces:
        client.sendall(piece)
    return client


def post(body: bytes, *headers: str, size: int | None = None) -> bytes:
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: 127.0.0.1", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body) if size is None else size}", "", ""]).encode() + body


def read_all(client: socket.socket) -> bytes:
    found = b""
    while piece := client.recv(65536):
        found += piece
    return found


@pytest.fixture
def service() -> AnsweringService:
    return AnsweringService()


@pytest.fixture
def url(service: AnsweringService) -> Iterator[str]:
    with serving_http(service, max_streams=4) as made:
        yield made


def cancelled(service: AnsweringService) -> int:
    return sum(record.state is JobState.CANCELLED for record in service.records.values())


def test_a_request_and_a_stream_on_one_connection(url: str) -> None:
    with httpx.Client() as client:
        whole = client.post(f"{url}/v1/chat/completions", json=BODY)
        assert whole.json()["choices"][0]["message"]["content"] == "The answer is forty-two."
        with client.stream("POST", f"{url}/v1/chat/completions", content=STREAM) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"


def test_the_first_chunk_comes_before_the_prompt_is_read(service: AnsweringService, url: str) -> None:
    service.events = []
    service._events = lambda job_id, after: iter(lambda: time.sleep(0.05), 1)  # type: ignore[method-assign]  # nothing new for ever
    with httpx.stream("POST", f"{url}/v1/chat/completions", content=STREAM, timeout=10) as answer:
        first = next(answer.iter_lines())
    assert json.loads(first.removeprefix("data: "))["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    until(lambda: cancelled(service) == 1)


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_ends_the_job(service: AnsweringService, url: str, stream: bool) -> None:
    service.endless = True
    client = connect(url, post(STREAM if stream else json.dumps(BODY).encode()))
    if stream:
        assert client.recv(100)
    until(lambda: service.pulled > 5)
    client.close()
    until(lambda: cancelled(service) == 1)
    until(service.closed.is_set)
    pulled = service.pulled
    time.sleep(0.05)
    assert service.pulled == pulled


def test_a_reader_that_does_not_read_takes_no_memory_and_slows_nobody(
    service: AnsweringService, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "STALL_S", 1.0)
    service.endless = True
    slow = connect(url, post(STREAM))
    until(lambda: service.pulled > 100)
    pulled = -1
    while pulled != service.pulled:  # its buffers are full
        pulled = service.pulled
        time.sleep(0.2)
    assert pulled * 100 < 20 << 20
    began = time.monotonic()
    assert httpx.get(f"{url}/v1/models").status_code == 200
    assert time.monotonic() - began < 1.0
    until(lambda: cancelled(service) == 1)
    slow.close()


def test_what_waits_for_readers_that_do_not_read_is_bounded(
    service: AnsweringService, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connections: list[BoundedProtocol] = []
    made = BoundedProtocol.connection_made

    def connection_made(self: BoundedProtocol, transport: asyncio.Transport) -> None:
        made(self, transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)  # fills soon
        connections.append(self)

    monkeypatch.setattr(BoundedProtocol, "connection_made", connection_made)
    service.endless = True
    readers = [connect(url, post(STREAM), buffered=16 << 10) for _ in range(3)]

    def nothing_moves() -> bool:
        pulled = service.pulled
        time.sleep(0.3)
        return len(connections) == 3 and all(one.flow.write_paused for one in connections) and pulled == service.pulled

    until(nothing_moves)
    piece = 1024  # more than a token takes
    assert all(0 < one.transport.get_write_buffer_size() <= BUFFERED_BYTES + piece for one in connections)
    for reader in readers:
        reader.close()
    until(lambda: cancelled(service) == 3)


def test_who_sends_nothing_is_closed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_S", 0.2)
    silent, trickling = connect(url), connect(url, b"GET /health HT")
    assert read_all(silent) == read_all(trickling) == b""


def test_half_a_body(service: AnsweringService, url: str) -> None:
    client = connect(url, post(b'{"messages', size=500))
    client.close()
    time.sleep(0.2)
    assert not service.specs
    assert httpx.get(f"{url}/health").status_code == 200


@pytest.mark.parametrize("sent", [b"", b'{"messages'])
def test_a_body_that_stalls(url: str, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(call_pool, "STALL_S", 0.2)
    monkeypatch.setattr(call_pool, "PRESSED_STALL_S", 0.2)
    answer = read_all(connect(url, post(sent, size=500)))
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"not_sent"' in answer


def test_a_body_that_trickles(service: AnsweringService, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "_SLOW_S", 2.0)
    began = time.monotonic()
    client = connect(url, post(b"", size=500))
    ended = threading.Event()

    def trickle() -> None:
        with contextlib.suppress(OSError):
            for byte in b'{"messages": []}':
                client.sendall(bytes([byte]))
                if ended.wait(1.0):
                    return

    sender = threading.Thread(target=trickle)
    sender.start()
    try:
        waits = []
        for _ in range(5):  # another client, meanwhile
            asked = time.monotonic()
            assert httpx.post(f"{url}/v1/chat/completions", json=BODY, timeout=20).status_code == 200
            waits.append(time.monotonic() - asked)
        answer = read_all(client)  # to the end of the connection
        took = time.monotonic() - began
    finally:
        ended.set()
        sender.join()
        client.close()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"s: must be 1024 a second" in answer
    assert b'"code": "not_sent"' in answer
    assert 2.0 <= took < 10.0
    assert max(waits) < 2.0
    assert len(service.specs) == len(waits)


def test_more_streams_than_the_limit(service: AnsweringService, url: str) -> None:
    service.endless = True
    streams = [connect(url, post(STREAM)) for _ in range(4)]
    until(lambda: len(service.specs) == 4)
    for client in streams:
        client.settimeout(20)
        assert b"200 OK" in client.recv(200)
    fifth = httpx.post(f"{url}/v1/chat/completions", json=BODY, timeout=20)  # of the same host, on its own connection
    assert fifth.status_code == 429
    assert fifth.headers["retry-after"] == "1"
    assert httpx.get(f"{url}/v1/models").status_code == 200
    for client in streams:
        client.close()
    until(lambda: cancelled(service) == 4)


@pytest.mark.parametrize("head", [
    b"\x00\xff\r\n\r\n", b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", b"GET /" + b"a" * 70_000,
    b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 9000,
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
])  # fmt: skip
def test_what_is_no_http_is_refused(url: str, head: bytes) -> None:
    client = connect(url)
    try:
        client.sendall(head)
        answer = read_all(client)
    except (ConnectionResetError, BrokenPipeError):
        answer = b""
    assert answer.startswith(b"HTTP/1.1 4") or not answer
    assert httpx.get(f"{url}/health").status_code == 200


def test_a_stored_limit_of_bodies_counts_before_they_are_sent(url: str) -> None:
    client = connect(url, post(b"", size=1 << 40))
    assert read_all(client).startswith(b"HTTP/1.1 413 ")


class NumberedService(AnsweringService):
    """Answers to the number in a message: tokens of its own, none before `count` streams wait for theirs."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._all = threading.Barrier(count)

    def _events(self, job_id: str, after: int) -> Iterator[JobEvent]:
        messages = self.get(job_id).spec.input.messages
        assert messages is not None
        self._all.wait(60)
        for n, text in enumerate(numbered_words(int(messages[0].content)), 1):
            yield [OutputToken(n, 0, n, text, -0.5, (), "answer", "", text)]
        yield self.finish(job_id)


def numbered_words(number: int) -> list[str]:
    return [f"{number}.{n} " for n in range(20 + number % 7)]


def test_two_hundred_streams_at_once() -> None:
    count = 200

    async def ask(client: httpx.AsyncClient, number: int) -> list[str]:
        body = {"messages": [{"role": "user", "content": str(number)}], "stream": True}
        texts = []
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = [line async for line in answer.aiter_lines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        for line in lines[:-1]:
            texts += [choice["delta"].get("content", "") for choice in json.loads(line[6:])["choices"]]
        return [text for text in texts if text]

    async def run(url: str) -> list[list[str]]:
        limits = httpx.Limits(max_connections=count)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=90) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(count)))

    with serving_http(NumberedService(count), max_streams=256) as url:
        found = asyncio.run(run(url))
    assert found == [numbered_words(number) for number in range(count)]


def test_who_does_not_begin_tls_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_HANDSHAKE_S", 0.5)
    certificate, key = Authority(tmp_path, "ours").issue("head")
    security = SecuritySection(tls_cert_file=certificate, tls_key_file=key)
    with serving_http(AnsweringService(), security=security) as url:
        began = time.monotonic()
        assert read_all(connect(url)) == b""
        assert time.monotonic() - began < 8


def test_tls_and_certificates_of_clients(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ours")
    certificate, key = authority.issue("head")
    own = [str(path) for path in authority.issue("client")]
    security = SecuritySection(tls_cert_file=certificate, tls_key_file=key, tls_client_ca_file=authority.file)
    with serving_http(AnsweringService(), security=security) as url:
        assert url.startswith("https://")
        trusting = ssl.create_default_context(cafile=str(authority.file))
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health", verify=trusting)
        trusting.load_cert_chain(*own)
        assert httpx.get(f"{url}/health", verify=trusting).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(url.replace("https", "http") + "/health")


def test_the_port_and_the_end(service: AnsweringService) -> None:
    service.endless = True
    with serving_http(service) as url:
        port = int(url.rpartition(":")[2])
        second: Any = HttpServer(make_backend(service, http_port=port), SecuritySection(), None)
        with pytest.raises(PreflightError, match=rf"server\.http_port: 127\.0\.0\.1:{port} cannot be bound"):
            second.start()
        second.close()
        client = connect(url, post(STREAM))
        until(lambda: service.pulled > 5)
        began = time.monotonic()
    assert time.monotonic() - began < 8
    client.close()
    with pytest.raises(OSError):
        connect(url)
