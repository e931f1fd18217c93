"""Waiting for the result of a request: its end, its failure, time-outs, and signals that a lock would hide."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest

from cluster.common.errors import EngineError
from cluster.engine.outputs import Generation, Timings
from cluster.engine.request_handle import RequestHandle
from cluster.scheduler.request import FinishReason


def handle() -> RequestHandle:
    nothing: Any = None
    return RequestHandle(nothing, nothing, nothing, lambda event: None, 0.0, itertools.count())


def generation(reason: FinishReason, error: str = "") -> Generation:
    return Generation((1,), "text", None, reason, (), 1, 0, Timings(0, 0, 0, 0, 0), error)


def test_the_result_is_returned_or_its_error_raised() -> None:
    ended = handle()
    with pytest.raises(TimeoutError, match=r"no result within 0.01 s"):
        ended.wait(0.01)
    ended.result = generation(FinishReason.STOP)
    threading.Timer(0.05, ended.done.set).start()
    assert ended.wait() is ended.result
    failed = handle()
    failed.result = generation(FinishReason.ERROR, "stage 0 is gone")
    failed.done.set()
    with pytest.raises(EngineError, match="stage 0 is gone"):
        failed.wait(1.0)


def test_a_wait_without_end_returns_to_python_for_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """The handler of a signal runs between two waits, whenever the signal came."""
    waiting, waits = handle(), []

    def wait(timeout_s: float | None = None) -> bool:
        waits.append(timeout_s)
        if len(waits) == 3:
            raise KeyboardInterrupt
        return False

    monkeypatch.setattr(waiting.done, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        waiting.wait()
    assert all(timeout_s is not None and timeout_s <= 1.0 for timeout_s in waits)
