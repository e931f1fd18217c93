"""The HTTP server of the metrics with clients that are slow, too many, or send something else."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from cluster.server import metrics_http
from cluster.server.metrics_http import MAX_CONNECTIONS, MAX_HEAD_BYTES, BoundedServer
from tests.support.rigs.head import free_port

BODY = b"x" * (8 << 20)  # more than the buffers of a socket hold


def application(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
    is_get = environ["REQUEST_METHOD"] == "GET"
    start("200 OK" if is_get else "405 Method Not Allowed", [("Content-Type", "text/plain")])
    return [BODY if environ["PATH_INFO"] == "/large" else b"metrics"]


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(metrics_http, "TIMEOUT_S", 1.0)
    monkeypatch.setattr(metrics_http, "_WAIT_S", 0.1)
    server = BoundedServer("127.0.0.1", free_port(), application)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def get(port: int, path: str = "/metrics", method: str = "GET") -> bytes:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read()


def talk(port: int, data: bytes) -> bytes:
    """What comes back until the connection is closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(data)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(1 << 16):
                received += piece
        return received


def threads() -> int:
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


@pytest.mark.parametrize("sent", [b"", b"GET /metrics HTTP/1.1\r\nHost: a", b"GET /large HTTP/1.0\r\n\r\n"])
def test_slow_clients_are_dropped_and_threads_bounded(port: int, sent: bytes):
    """They send nothing, half a request, or do not read the answer."""
    with contextlib.ExitStack() as stack:
        for _ in range(2 * MAX_CONNECTIONS):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            connection.sendall(sent)
        assert threads() <= MAX_CONNECTIONS
        began = time.monotonic()
        while True:
            with contextlib.suppress(OSError):
                assert get(port) == b"metrics"
                break
            assert time.monotonic() < began + 10
        assert threads() <= MAX_CONNECTIONS


def test_a_byte_now_and_then_does_not_keep_a_connection(port: int):
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection, contextlib.suppress(OSError):
        while time.monotonic() < began + 10:
            connection.sendall(b"G")
            time.sleep(0.2)
    assert time.monotonic() - began < 5


def test_requests_that_are_none(port: int):
    assert b" 431 " in talk(port, b"GET / HTTP/1.0\r\n" + b"X-Long: 1\r\n" * (MAX_HEAD_BYTES // 10))
    assert b" 400 " in talk(port, b"\x16\x03\x01\x02\x00\r\n\r\n")
    assert b" 405 " in talk(port, b"BREW / HTTP/1.0\r\n\r\n")
    with pytest.raises(urllib.error.HTTPError, match="405"):
        get(port, method="POST")
    assert get(port) == b"metrics"
    assert len(get(port, "/large")) == len(BODY)


def test_a_port_that_is_taken(port: int):
    with pytest.raises(OSError, match="in use"):
        BoundedServer("127.0.0.1", port, application)
