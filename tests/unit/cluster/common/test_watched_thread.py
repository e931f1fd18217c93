"""Threads that raise: called again, given up, or let go when their owner wants it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from cluster.common import watched_thread as module
from cluster.common.watched_thread import MAX_FAILURES, SHOWN_S, WITHIN_S, WatchedThread, WatchedThreads
from tests.support.fakes.stage import Clock, eventually


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.01)


def failing(times: int, error: Callable[[], BaseException], calls: list[int]) -> Callable[[], None]:
    def run() -> None:
        calls.append(1)
        if len(calls) <= times:
            raise error()

    return run


@pytest.mark.parametrize("error", [lambda: KeyError("odd"), MemoryError, lambda: SystemExit(1), KeyboardInterrupt])
def test_a_failure_is_shown_for_a_while_and_the_function_called_again(
    error: Callable[[], BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    clock, calls = Clock(), []
    thread = WatchedThread(failing(1, error, calls), "timer", threading.Event(), clock)
    assert not thread.is_alive()
    thread.start()
    thread.join(20)
    assert len(calls) == 2
    assert thread.problem.startswith(f"the timer thread failed and was started again: {type(error()).__name__}")
    assert not thread.is_dead
    assert "Traceback" in caplog.text
    clock.now += SHOWN_S
    assert thread.problem == ""


def test_one_that_always_fails_is_dead() -> None:
    calls: list[int] = []
    thread = WatchedThread(failing(100, lambda: KeyError("odd"), calls), "recorder", threading.Event())
    thread.start()
    eventually(lambda: thread.is_dead)
    thread.join()
    assert len(calls) == MAX_FAILURES
    assert thread.problem == "the recorder thread has ended: KeyError: 'odd'"


def test_failures_far_apart_do_not_add_up() -> None:
    clock, calls = Clock(), []

    def run() -> None:
        calls.append(1)
        clock.now += WITHIN_S
        if len(calls) <= 3 * MAX_FAILURES:
            raise KeyError("odd")

    thread = WatchedThread(run, "timer", threading.Event(), clock)
    thread.start()
    thread.join(20)
    assert len(calls) == 3 * MAX_FAILURES + 1
    assert not thread.is_dead


def test_an_owner_that_ends_hears_no_more_of_it() -> None:
    ending, calls = threading.Event(), []
    ending.set()
    thread = WatchedThread(failing(9, lambda: KeyError("odd"), calls), "timer", ending)
    thread.start()
    thread.join(20)
    assert (len(calls), thread.problem, thread.is_dead) == (1, "", False)


def test_threads_of_a_library() -> None:
    end = threading.Event()
    threads = [threading.Thread(target=end.wait, daemon=True) for _ in range(2)]
    watched = WatchedThreads("gRPC")
    assert (watched.is_dead, watched.problem) == (False, "")
    for thread in threads:
        thread.start()
    watched.watch(threads)
    assert (watched.is_dead, watched.problem) == (False, "")
    end.set()
    eventually(lambda: watched.is_dead)
    assert watched.problem == "the gRPC thread has ended"
    watched.release()
    assert (watched.is_dead, watched.problem) == (False, "")
