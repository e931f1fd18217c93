"""A submitted request: its result, its times, and a callback that raises."""

from __future__ import annotations

import itertools
import logging
import threading

import pytest

from cluster.common.errors import EngineError
from cluster.engine.outputs import Generation
from cluster.engine.request_handle import EngineEvent, RequestHandle
from cluster.scheduler.request import FinishReason, Request, StopRules
from cluster.text.detokenizer import OutputText
from protos.stage.messages import SamplingParams
from tests.support.data.specs import generation_spec

PROMPT = list(range(67))


def handle(events: list[EngineEvent]) -> RequestHandle:
    request = Request(17, PROMPT, SamplingParams(), StopRules(max_tokens=3), output=[5, 6], num_cached=16)
    return RequestHandle(
        request,
        generation_spec(PROMPT, 3),
        OutputText(None, ()),
        events.append,
        submitted=10.0,
        numbers=itertools.count(),
    )


def test_the_result_and_its_times() -> None:
    events: list[EngineEvent] = []
    one = handle(events)
    one.started, one.first_token = 11.0, 14.0
    one.end(FinishReason.LENGTH, 20.0, None)
    result = one.wait(0)
    assert events == [result]
    assert (result.token_ids, result.prompt_tokens, result.cached_tokens) == ((5, 6), 67, 16)
    times = result.timings
    assert (times.queued_s, times.prefill_s, times.ttft_s, times.decode_s, times.total_s) == (1.0, 3.0, 4.0, 6.0, 10.0)


def test_a_request_that_ends_in_the_queue_spent_its_time_there() -> None:
    one = handle([])
    one.end(FinishReason.CANCELLED, 13.0, None)
    times = one.wait(0).timings
    assert (times.queued_s, times.prefill_s, times.decode_s, times.total_s) == (3.0, 0.0, 0.0, 3.0)


def test_a_failure_is_raised_and_is_also_the_last_event() -> None:
    events: list[EngineEvent] = []
    one = handle(events)
    one.end(FinishReason.ERROR, 13.0, None, "stage 1 is gone")
    with pytest.raises(EngineError, match=r"^stage 1 is gone$"):
        one.wait(0)
    assert [event.error for event in events if isinstance(event, Generation)] == ["stage 1 is gone"]


def test_waiting_ends_in_time_and_with_the_result() -> None:
    one = handle([])
    with pytest.raises(TimeoutError, match=r"no result within 0.01 s"):
        one.wait(0.01)
    timer = threading.Timer(0.05, one.end, (FinishReason.STOP, 13.0, None))
    timer.start()
    assert one.wait(10).finish_reason is FinishReason.STOP
    timer.join()


def test_a_callback_that_raises_is_called_once(caplog: pytest.LogCaptureFixture) -> None:
    one, calls = handle([]), 0

    def fail(_event: EngineEvent) -> None:
        nonlocal calls
        calls += 1
        raise RuntimeError("the caller's own")

    one.on_event = fail
    with caplog.at_level(logging.ERROR):
        one.end(FinishReason.STOP, 13.0, None)
        one.notify(one.wait(0))
    assert calls == 1
    assert "request 17: its callback raised and is not called again" in caplog.text


def test_a_wait_without_end_returns_to_python_for_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """The handler of a signal runs between two waits, whenever the signal came."""
    waiting, waits = handle([]), []

    def wait(timeout_s: float | None = None) -> bool:
        waits.append(timeout_s)
        if len(waits) == 3:
            raise KeyboardInterrupt
        return False

    monkeypatch.setattr(waiting.done, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        waiting.wait()
    assert all(timeout_s is not None and timeout_s <= 1.0 for timeout_s in waits)
