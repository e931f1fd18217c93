"""Who calls, and what the log says of it: one line for every change, and for calls that were refused for their key.

Keys are named as in the keys file, or by the first digits of their SHA-256; no line has a key, a text or a label.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc

from cluster.access.call_pool import Caller
from cluster.common.text_format import escape_unprintable
from cluster.server.security import ApiKeys, presented_key

_REFUSALS_EVERY_S = 10.0  # between lines about refused calls
# methods that change something, and where its id is
_CHANGES: dict[str, Callable[[Any, Any], str]] = {
    "Submit": lambda request, reply: reply.id,
    "UploadDocument": lambda request, reply: reply.id,
    "AppendDocument": lambda request, reply: reply.id,
    "ImportDocument": lambda request, reply: reply.id,
    "PinDocument": lambda request, reply: request.id,
    "Cancel": lambda request, reply: request.id,
    "Delete": lambda request, reply: request.id,
    "DeleteDocument": lambda request, reply: request.id,
}

_log = logging.getLogger(__name__)


class Callers:
    """Tells callers apart: by their API keys, or where there are none by the host they come from."""

    def __init__(self, keys: ApiKeys | None) -> None:
        self._keys = keys

    def identify(self, context: grpc.ServicerContext) -> Caller:
        """Return who makes a call."""
        peer = context.peer()
        key = presented_key(context.invocation_metadata())
        name = self._keys.name(key) if self._keys is not None and key is not None else None
        return Caller(f"key {name}" if name is not None else _host(peer), peer)


def _host(peer: str) -> str:
    """Return the host of `ipv4:HOST:PORT` or `ipv6:[HOST]:PORT`; of a Unix socket what gRPC says."""
    return peer if peer.startswith("unix:") else peer.rpartition(":")[0]


def log_change(path: str, caller: Caller, request: Any, reply: Any) -> None:
    """Log a call that was answered, if it changed something: method, id, key or host, and connection."""
    service, _, method = path.rpartition("/")
    if service == "/longreach.jobs.v1.Jobs" and method in _CHANGES:
        _log.info("%s %s by %s", method, escape_unprintable(_CHANGES[method](request, reply)), caller)


class RefusalLog:
    """Logs calls without a valid key: the first, then at most a line every ten seconds with the number of them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._next = -1.0
        self._left_out = 0

    def add(self, peer: str, method: str) -> None:
        """Count a refused call, and log it unless another was logged just now."""
        with self._lock:
            now = self._clock()
            if now < self._next:
                self._left_out += 1
                return
            self._next, left_out, self._left_out = now + _REFUSALS_EVERY_S, self._left_out, 0
        more = f"; {left_out} more since the last line" if left_out else ""
        _log.warning("refused %s from %s: no valid API key%s", escape_unprintable(method[:100]), peer, more)
