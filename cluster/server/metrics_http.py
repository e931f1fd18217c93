"""A small HTTP server for one application that slow, broken or many clients cannot hold: everything has a bound."""

from __future__ import annotations

import io
import logging
import socket
import time
from collections.abc import Callable
from socketserver import ThreadingMixIn
from threading import BoundedSemaphore
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

MAX_CONNECTIONS = 16  # a thread each; what comes beyond waits for `_WAIT_S`, then its connection is closed
MAX_HEAD_BYTES = 16 << 10  # request line and headers
TIMEOUT_S = 10.0  # for the head of a request in all, and for the answer in all
_WAIT_S = 1.0

_log = logging.getLogger(__name__)


class BoundedServer(ThreadingMixIn, WSGIServer):
    """Answers one request a connection, each in a thread of its own, at most `MAX_CONNECTIONS` at a time."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, host: str, port: int, application: Callable[..., Any]) -> None:
        """Bind the port. Raises OSError."""
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        self._free = BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__((host, port), _Handler)
        self.set_app(application)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(timeout=_WAIT_S):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("a connection of %s ended early", client_address, exc_info=True)


class _Handler(WSGIRequestHandler):
    """Reads the whole head of a request within a time and a size before any of it is looked at."""

    def setup(self) -> None:
        super().setup()
        head = self._read_head()
        self._is_too_large = len(head) > MAX_HEAD_BYTES
        self.rfile = io.BufferedReader(io.BytesIO(head))
        self.connection.settimeout(TIMEOUT_S)  # of each answer: `sendall` counts it as a whole

    def _read_head(self) -> bytes:
        until = time.monotonic() + TIMEOUT_S
        head = b""
        while len(head) <= MAX_HEAD_BYTES and b"\r\n\r\n" not in head and b"\n\n" not in head:
            self.connection.settimeout(max(0.001, until - time.monotonic()))
            data = self.connection.recv(4096)
            if not data:
                break
            head += data
        return head

    def handle(self) -> None:
        if self._is_too_large:
            self.requestline, self.request_version, self.command = "", "HTTP/1.0", ""
            self.send_error(431)
            return
        super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""
