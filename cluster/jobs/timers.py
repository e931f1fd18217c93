"""Timer thread: runs callbacks at their deadline, and others at regular intervals."""

from __future__ import annotations

import heapq
import logging
import threading
from collections.abc import Callable

_log = logging.getLogger(__name__)


class Timers:
    """Runs callbacks at absolute times, one after the other. `close` may be called twice."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="timers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Run `action` once, at `when` (seconds of the clock) or soon after."""
        with self._wake:
            self._count += 1
            heapq.heappush(self._due, (when, self._count, action))
            self._wake.notify_all()

    def every(self, period_s: float, action: Callable[[], None]) -> None:
        """Run `action` now and `period_s` after each run."""

        def run() -> None:
            try:
                action()
            finally:
                self.at(self._clock() + period_s, run)

        self.at(self._clock(), run)

    def _run(self) -> None:
        while (action := self._next()) is not None:
            try:
                action()
            except Exception:  # noqa: BLE001 - one failed action must not end all later ones
                _log.exception("a timed action failed")

    def _next(self) -> Callable[[], None] | None:
        """Wait for an action that is due and return it; None when closing."""
        with self._wake:
            while not self._closing:
                wait_s = self._due[0][0] - self._clock() if self._due else None
                if wait_s is not None and wait_s <= 0:
                    return heapq.heappop(self._due)[2]
                self._wake.wait(wait_s)
        return None
