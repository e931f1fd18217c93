"""Calls from threads of the store into the engine's thread, which alone may touch the page pool."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, TimeoutError
from typing import TypeVar

_LOOK_S = 0.1  # how often a waiting thread looks whether the pipeline is closed
Result = TypeVar("Result")


class Detached(Exception):
    """The pipeline is being closed: its engine takes no more calls."""


class EngineCalls:
    """Runs functions on the engine's thread.

    Args:
        post: queues a function for the engine's thread.
    """

    def __init__(self, post: Callable[[Callable[[], None]], None]) -> None:
        self.post = post
        self._closing = threading.Event()

    def call(self, function: Callable[[], Result]) -> Result:
        """Return what `function` returns on the engine's thread. Raises Detached."""
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001 - it belongs to the caller
                future.set_exception(error)

        self.post(run)
        while not self._closing.is_set():
            try:
                return future.result(_LOOK_S)
            except TimeoutError:
                if future.done():
                    raise
        raise Detached

    def close(self) -> None:
        """Let nobody wait any longer."""
        self._closing.set()
