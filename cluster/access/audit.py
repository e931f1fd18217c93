"""The audit log: who did what to which object, one JSON object a line, over gRPC and HTTP alike.

No line has a key, a text, a name of a document or a label.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path

from cluster.access.call_pool import Caller

AUDIT_FILE = "log/audit.jsonl"  # in the data directory
_MAX_BYTES = 10 << 20  # of a file; then it is renamed to audit.jsonl.1, and so on
_KEPT = 9  # older files
_REFUSALS_EVERY_S = 10.0  # between lines about refused calls
_MAX_METHOD = 100  # characters of what was refused


class AuditLog:
    """Writes the audit log of a head, from any thread; without a path, nowhere."""

    def __init__(self, path: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # of the refusals
        self._next = -1.0
        self._left_out = 0
        self._handler: logging.Handler | None = None
        if path is not None:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._handler = _PrivateFile(path, maxBytes=_MAX_BYTES, backupCount=_KEPT, delay=True, encoding="ascii")

    def note(self, caller: Caller, action: str, subject: str) -> None:
        """Log a change: what was done, and the id of the job or document that it was done to."""
        key = caller.tenant.name if caller.tenant is not None else ""
        self._write(action=action, subject=subject, key=key, peer=caller.peer)

    def note_key(self, action: str, name: str) -> None:
        """Log what became of the keys of a name."""
        self._write(action=action, subject=name)

    def refuse(self, peer: str, method: str) -> None:
        """Log a call without a valid key: the first, then at most one every ten seconds, with the number of others."""
        with self._lock:
            now = self._clock()
            if now < self._next:
                self._left_out += 1
                return
            self._next, left_out, self._left_out = now + _REFUSALS_EVERY_S, self._left_out, 0
        self._write(action="key_refused", subject=method[:_MAX_METHOD], peer=peer, left_out=left_out)

    def _write(self, **values: object) -> None:
        if self._handler is None:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now} | {name: value for name, value in values.items() if value not in ("", 0)})
        self._handler.handle(logging.LogRecord("audit", logging.INFO, "", 0, line, None, None))

    def close(self) -> None:
        if self._handler is not None:
            self._handler.close()


class _PrivateFile(RotatingFileHandler):
    def _open(self) -> TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return open(descriptor, "a", encoding=self.encoding)
