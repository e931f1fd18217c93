"""Bounds of a connection, with a transport and a clock of our own."""

from __future__ import annotations

import json
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from cluster.http.core.protocol import HEAD_S, STALL_S, BoundedProtocol


class Loop:
    """Timers that fire when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[Any] = []

    def call_later(self, delay: float, callback: Any, *args: Any) -> Any:
        timer = type("Timer", (), {"when": self.now + delay, "run": lambda self: callback(*args), "live": True})()
        timer.cancel = lambda: setattr(timer, "live", False)
        self.timers.append(timer)
        return timer

    def create_task(self, work: Any) -> Any:
        work.close()
        return type("Task", (), {"add_done_callback": lambda self, callback: None})()

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for timer in [t for t in self.timers if t.live and t.when <= self.now]:
            timer.live = False
            timer.run()


class Transport:
    """Notes whether it was closed."""

    aborted = closed = False
    written = b""

    def abort(self) -> None:
        self.aborted = True

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.aborted or self.closed

    def get_extra_info(self, name: str) -> Any:
        return None

    def write(self, data: bytes) -> None:
        self.written += data

    def pause_reading(self) -> None: ...

    def set_write_buffer_limits(self, high: int) -> None:
        self.high = high

    def resume_reading(self) -> None: ...


class Rig:
    def __init__(self) -> None:
        self.loop = Loop()
        self.state = ServerState()
        self.config = uvicorn.Config(lambda: None, ws="none", log_config=None)  # type: ignore[arg-type, return-value]

    def connect(self) -> tuple[BoundedProtocol, Transport]:
        protocol = BoundedProtocol(self.config, self.state, {}, self.loop, max_connections=2)
        transport = Transport()
        protocol.connection_made(transport)  # type: ignore[arg-type]
        return protocol, transport


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_who_sends_nothing_is_closed(rig: Rig) -> None:
    _, transport = rig.connect()
    rig.loop.pass_time(HEAD_S - 1)
    assert not transport.aborted
    rig.loop.pass_time(1)
    assert transport.aborted


def test_who_trickles_a_head_is_closed(rig: Rig) -> None:
    protocol, transport = rig.connect()
    for byte in (b"G", b"E", b"T", b" "):
        protocol.data_received(byte)
        rig.loop.pass_time(HEAD_S / 4)
    assert transport.aborted


def test_a_whole_head_may_wait_for_its_answer(rig: Rig) -> None:
    protocol, transport = rig.connect()
    protocol.data_received(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    rig.loop.pass_time(1000)
    assert not transport.aborted
    protocol.cycle.response_complete = True  # the next request on the same connection
    protocol.conn.send(__import__("h11").Response(status_code=200, headers=[("content-length", "0")]))
    protocol.conn.send(__import__("h11").EndOfMessage())
    protocol.conn.start_next_cycle()
    protocol.data_received(b"G")
    rig.loop.pass_time(HEAD_S)
    assert transport.aborted


def test_who_does_not_read_is_closed(rig: Rig) -> None:
    protocol, transport = rig.connect()
    protocol.data_received(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    protocol.pause_writing()
    rig.loop.pass_time(STALL_S - 1)
    protocol.resume_writing()
    rig.loop.pass_time(STALL_S)
    assert not transport.aborted
    protocol.pause_writing()
    rig.loop.pass_time(STALL_S)
    assert transport.aborted


def test_connections_have_a_limit(rig: Rig) -> None:
    transports = [rig.connect()[1] for _ in range(3)]
    assert [transport.aborted for transport in transports] == [False, False, True]


def test_nothing_is_left_after_the_end(rig: Rig) -> None:
    protocol, transport = rig.connect()
    protocol.data_received(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    protocol.pause_writing()
    protocol.connection_lost(None)
    rig.loop.pass_time(1000)
    assert not transport.aborted
    assert not rig.state.connections


@pytest.mark.parametrize(("sent", "path"), [
    (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", ""),
    (b"POST /v1/messages HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "/v1/messages"),
])  # fmt: skip
def test_what_is_no_http_is_refused_by_an_error_object(rig: Rig, sent: bytes, path: str) -> None:
    protocol, transport = rig.connect()
    protocol.data_received(sent)
    head, _, body = transport.written.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"application/json" in head
    found = json.loads(body)
    assert found["error"]["message"].startswith("request: must be HTTP/1.1")
    assert (found.get("type") == "error") == (path == "/v1/messages")
    assert transport.closed


def test_what_follows_an_answer_and_is_no_http_has_none(rig: Rig) -> None:
    """The client would take it for more of the answer."""
    protocol, transport = rig.connect()
    protocol.data_received(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    protocol.conn.send(__import__("h11").Response(status_code=200, headers=[]))
    protocol.data_received(b"zz\r\n")
    assert transport.written == b""
    assert transport.closed
