"""A call returns or raises what it does on the engine's thread, and ends when the engine takes no more."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import pytest

from cluster.kv_store.engine_calls import Detached, EngineCalls


def test_results_and_errors_come_back() -> None:
    calls = EngineCalls(lambda action: action())
    assert calls.call(lambda: 5) == 5
    with pytest.raises(TimeoutError, match="ours"):
        calls.call(lambda: (_ for _ in ()).throw(TimeoutError("ours")))


def test_nobody_waits_for_an_engine_that_is_closed() -> None:
    posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    calls = EngineCalls(posted.put)
    threading.Timer(0.05, calls.close).start()
    with pytest.raises(Detached):
        calls.call(lambda: 5)
    assert posted.qsize() == 1
