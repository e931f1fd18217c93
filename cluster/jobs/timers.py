"""Timer thread: runs callbacks at their deadline, and others at regular intervals."""

from __future__ import annotations

import logging
import sched
import threading
from collections.abc import Callable

_log = logging.getLogger(__name__)


class Timers:
    """Runs callbacks at absolute times, one after the other. `close` may be called twice."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._scheduler = sched.scheduler(clock)
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="timers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Run `action` once, at `when` (seconds of the clock) or soon after."""
        self._scheduler.enterabs(when, 0, self._call, (action,))
        self._wake.set()

    def every(self, period_s: float, action: Callable[[], None]) -> None:
        """Run `action` now and `period_s` after each run."""

        def run() -> None:
            self._call(action)
            self.at(self._clock() + period_s, run)

        self.at(self._clock(), run)

    def _run(self) -> None:
        while not self._closing:
            self._wake.clear()
            self._wake.wait(self._scheduler.run(blocking=False))

    def _call(self, action: Callable[[], None]) -> None:
        try:
            if not self._closing:
                action()
        except Exception:  # noqa: BLE001 - one failed action must not end all later ones
            _log.exception("a timed action failed")
