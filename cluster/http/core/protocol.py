"""uvicorn's HTTP/1.1 protocol with bounds in time and number: connections that send or read nothing are closed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from cluster.http.core.errors import ApiError

HEAD_S = 10.0  # for the head of a request, from the connection or its first byte on
STALL_S = 30.0  # for a reader that has more to read than the buffers of the connection hold
BUFFERED_BYTES = 64 << 10  # of a connection; only one more piece is written before its client has read of them
KEEP_ALIVE_S = 60  # between requests


class BoundedProtocol(H11Protocol):
    """One connection."""

    def __init__(self, *args: Any, max_connections: int, **kwargs: Any) -> None:
        """
        Args:
            max_connections: more are closed at once.
        """
        super().__init__(*args, **kwargs)
        self._max_connections = max_connections
        self._head_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._max_connections:
            transport.abort()
            return
        transport.set_write_buffer_limits(BUFFERED_BYTES)
        self._head_timer = self.loop.call_later(HEAD_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        cycle = self.cycle
        super().data_received(data)
        if self.cycle is not cycle:  # the head of a request is complete
            _cancel(self._head_timer)
            self._head_timer = None
        elif self._head_timer is None and (cycle is None or cycle.response_complete):
            self._head_timer = self.loop.call_later(HEAD_S, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP with an error object, unless an answer is on its way, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            path = self.scope["path"] if self.conn.our_state is h11.SEND_RESPONSE and self.scope else ""
            error = ApiError(400, "request: must be HTTP/1.1 with a body as long as its headers say", code="not_http")
            body = json.dumps(error.body_for(path)).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._read_timer = self.loop.call_later(STALL_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._read_timer)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        _cancel(self._head_timer)
        _cancel(self._read_timer)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
