"""Whether a head serves as it should: its threads, its store and its pipeline, looked at every second."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable

from cluster.common.watched_thread import Watched, WatchedThread

CHECK_EVERY_S = 1.0
_log = logging.getLogger(__name__)


class HealthMonitor:
    """Tells what is wrong with a head whenever that changes.

    Failure contract: a thread that will never work again is fatal: the head must end, so that another one takes up its
    jobs. All else may pass. The monitor itself is such a thread.
    """

    def __init__(
        self, threads: Callable[[], Iterable[Watched]], checks: Iterable[Callable[[], str]],
        report: Callable[[str], None],
    ) -> None:  # fmt: skip
        """
        Args:
            threads: those without which the head does not do its work.
            checks: each says what is wrong with one part, "" when all is well.
            report: called with the first problem, or "" when there is none any more.
        """
        self._threads = threads
        self._checks = tuple(checks)
        self._report = report
        self._closing = threading.Event()
        self._thread = WatchedThread(self._run, "health", self._closing)
        self._fatal = ""
        self.problem = ""

    @property
    def fatal(self) -> str:
        """Why the head must end, "" while it need not."""
        return self._fatal or (self._thread.problem if self._thread.is_dead else "")

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop looking; may be called twice."""
        self._closing.set()
        self._thread.join()

    def check(self) -> None:
        """Look at every part once."""
        threads = list(self._threads())
        self._fatal = self._fatal or next((thread.problem for thread in threads if thread.is_dead), "")
        problems = [self._fatal, *(thread.problem for thread in threads), *(check() for check in self._checks)]
        problem = next(filter(None, problems), "")
        if problem != self.problem:
            self.problem = problem
            _log.error("not serving: %s", problem) if problem else _log.warning("serving again")
            self._report(problem)

    def _run(self) -> None:
        while not self._closing.is_set():
            self.check()
            self._closing.wait(CHECK_EVERY_S)
