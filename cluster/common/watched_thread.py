"""Threads that do not end unnoticed."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from cluster.common.text_format import describe_error

MAX_FAILURES = 3  # within WITHIN_S; after as many a function is not called again
WITHIN_S = 60.0
PAUSE_S = 1.0  # before a function is called again
SHOWN_S = 10.0  # how long `problem` tells of a failure after which the function was called again
_log = logging.getLogger(__name__)


class Watched(Protocol):
    """What a head looks at every second."""

    @property
    def problem(self) -> str:
        """Why it does not do its work, or did not a moment ago; "" when all is well."""

    @property
    def is_dead(self) -> bool:
        """Whether it will never work again in this process."""


class WatchedThread:
    """A thread whose function returns when its owner wants it to: one that raises is logged and called again.

    The function keeps what it has not done yet in its object, and goes on with it when it is called again. After
    `MAX_FAILURES` within `WITHIN_S` the thread is dead.
    """

    def __init__(
        self, target: Callable[[], object], name: str, ending: threading.Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """
        Args:
            ending: set when the owner wants the function to return; then it is not called again.
        """
        self.name = name
        self._target = target
        self._ending = ending
        self._clock = clock
        self._failures: deque[float] = deque(maxlen=MAX_FAILURES)  # when
        self._error = ""
        self.is_dead = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for the end of a thread that was started; from the thread itself, return at once."""
        if self.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    @property
    def problem(self) -> str:
        if self.is_dead:
            return f"the {self.name} thread has ended: {self._error}"
        if self._failures and self._clock() - self._failures[-1] < SHOWN_S:
            return f"the {self.name} thread failed and was started again: {self._error}"
        return ""

    def _run(self) -> None:
        while True:
            try:
                self._target()
                return
            except BaseException as error:  # noqa: BLE001 - whatever it is, nobody else would notice
                if self._ending.is_set():
                    _log.warning("the %s thread: %s", self.name, describe_error(error))
                    return
                _log.exception("the %s thread failed", self.name)
                self._error = describe_error(error)
                self._failures.append(self._clock())
            if len(self._failures) == MAX_FAILURES and self._failures[-1] - self._failures[0] < WITHIN_S:
                self.is_dead = True
                return
            if self._ending.wait(PAUSE_S):
                return


class WatchedThreads:
    """Threads of a library, which must live until `release`; their exceptions are told by `threading.excepthook`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._threads: tuple[threading.Thread, ...] = ()

    def watch(self, threads: Sequence[threading.Thread]) -> None:
        self._threads = tuple(threads)

    def release(self) -> None:
        self._threads = ()

    @property
    def is_dead(self) -> bool:
        return not all(thread.is_alive() for thread in self._threads)

    @property
    def problem(self) -> str:
        return f"the {self.name} thread has ended" if self.is_dead else ""
