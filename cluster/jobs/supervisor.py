"""Replacing a broken pipeline: at once, then with growing pauses.

Failure contract: one replacement is under way at a time; a report that comes meanwhile is about the same break. A
pipeline that breaks soon after it was replaced waits longer each time, without end; one that cannot be started
`len(PAUSES_S)` times in a row is given up.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Protocol

from cluster.common.text_format import one_line

PAUSES_S = (0.0, 1.0, 5.0, 20.0, 60.0)  # before each attempt to start
SOON_S = 60.0  # a pipeline that lived longer than this was sound
_log = logging.getLogger(__name__)


class Owner(Protocol):
    """Whose pipeline it is; called on the recovery's thread, one after the other."""

    def restart_pipeline(self) -> None:
        """Stop what is left and start anew; raises when that fails, and may be called again."""

    def pipeline_is_back(self) -> None:
        """It runs: go on."""

    def pipeline_is_down(self, reason: str) -> None:
        """It was given up."""


class Recovery:
    """Starts the pipeline of an owner again. `close` may be called twice."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._tries = 0  # since the last time it was sound
        self._up_since = -SOON_S
        self.state = "running"  # or restarting, or down

    def begin(self) -> bool:
        """Take note of a break, before `go`; False when it is dealt with already."""
        with self._lock:
            if self._closing.is_set() or self.state != "running":
                return False
            self.state = "restarting"
            if time.monotonic() - self._up_since >= SOON_S:
                self._tries = 0
            return True

    def go(self, error: str) -> None:
        """Replace the pipeline that broke with `error`, on a thread of its own."""
        _log.error("the pipeline failed: %s", error)
        self._thread = threading.Thread(target=self._run, args=(error,), name="recover", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Try no more, and wait for an attempt under way."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self, error: str) -> None:
        failures = 0
        while not self._closing.wait(PAUSES_S[min(self._tries, len(PAUSES_S) - 1)]):
            self._tries += 1
            try:
                self._owner.restart_pipeline()
            except Exception as problem:  # noqa: BLE001 - whatever it was, the jobs must end with it in the end
                failures += 1
                _log.exception("attempt %d to start the pipeline again failed", failures)
                if failures >= len(PAUSES_S):
                    self.state = "down"
                    reason = f"{error}; starting again failed: {one_line(problem)}"
                    self._owner.pipeline_is_down(reason)
                    return
            else:
                self._up_since = time.monotonic()
                self.state = "running"
                self._owner.pipeline_is_back()
                return
