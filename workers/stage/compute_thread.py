"""The only thread of a process that computes with tensors.

OpenMP keeps a pool of threads for every thread that ever opened a parallel region. As soon as a process has more of
them than cores, libgomp lets all of them sleep between regions instead of spinning, and waking them costs more than a
short region does: loading, warming up and computing on three threads made a decode step take 1.6 times as long.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class ComputeThread:
    """Runs calls one after the other; a daemon thread, so that a hung step cannot keep a process alive."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="compute", daemon=True).start()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Queue a call; returns the future of its result."""
        future: Future[T] = Future()
        self._calls.put((call, future))
        return future

    def _run(self) -> None:
        while True:
            call, future = self._calls.get()
            try:
                future.set_result(call())
            except Exception as error:  # noqa: BLE001 - it belongs to whoever waits for the future
                future.set_exception(error)
