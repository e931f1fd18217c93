"""Time: deadlines when they are due, and every minute a sweep of what has expired. One thread, mostly asleep."""

from __future__ import annotations

import heapq
import logging
import threading
from collections.abc import Callable

_SWEEP_EVERY_S = 60.0
_log = logging.getLogger(__name__)


class Timers:
    """Calls back at absolute times. `close` may be called twice."""

    def __init__(self, clock: Callable[[], float], sweep: Callable[[float], None]) -> None:
        self._clock = clock
        self._sweep = sweep
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
        """Call `action` once, at `when` (seconds of the clock) or soon after."""
        with self._wake:
            self._count += 1
            heapq.heappush(self._due, (when, self._count, action))
            self._wake.notify_all()

    def _run(self) -> None:
        sweep = self._clock()
        while True:
            now = self._clock()
            actions: list[Callable[[], None]] = []
            with self._wake:
                if self._closing:
                    return
                while self._due and self._due[0][0] <= now:
                    actions.append(heapq.heappop(self._due)[2])
                if not actions and now < sweep:
                    following = min([sweep, *(entry[0] for entry in self._due[:1])])
                    self._wake.wait(max(0.0, following - now))
                    continue
            for action in actions:
                _guarded(action)
            if now >= sweep:
                _guarded(lambda now=now: self._sweep(now))  # type: ignore[misc]
                sweep = now + _SWEEP_EVERY_S


def _guarded(action: Callable[[], None]) -> None:
    try:
        action()
    except Exception:  # noqa: BLE001 - one failed action must not end all later ones
        _log.exception("a timed action failed")
