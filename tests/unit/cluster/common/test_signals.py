"""Signals of the process while other code runs: held back, told, or handled afterwards."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from cluster.common.signals import STOP_SIGNALS, call_native, call_undisturbed


@pytest.fixture(autouse=True)
def handlers() -> Iterator[list[int]]:
    """What the handlers of this process have seen."""
    seen: list[int] = []
    before = {number: signal.signal(number, lambda number, _: seen.append(number)) for number in STOP_SIGNALS}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


def send_both() -> None:
    time.sleep(0.1)  # the main thread waits by now
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
        time.sleep(0.05)


def test_signals_are_told_while_a_call_runs(handlers: list[int]) -> None:
    told: list[int] = []
    masks = []

    def call() -> None:
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, []))
        send_both()
        send_both()

    call_undisturbed(call, told.append)
    assert told == [signal.SIGTERM, signal.SIGINT] * 2
    assert handlers == []
    assert masks[0] >= STOP_SIGNALS
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & STOP_SIGNALS


def test_signals_at_the_very_end_are_told(handlers: list[int]) -> None:
    main = threading.get_ident()
    for _ in range(50):
        told: list[int] = []
        # to this thread: another one that takes a signal of the process may handle it later than the call ends
        call_undisturbed(lambda: signal.pthread_kill(main, signal.SIGTERM), told.append)
        assert told == [signal.SIGTERM]
    assert handlers == []


def test_native_code_that_replaces_handlers_and_fails(handlers: list[int]) -> None:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def call() -> None:
        send_both()
        assert handlers == []
        raise OSError("it failed")

    with pytest.raises(OSError, match="it failed"):
        call_native(call)
    assert sorted(handlers) == [signal.SIGINT, signal.SIGTERM]
    assert before == {number: signal.getsignal(number) for number in STOP_SIGNALS}


def test_a_handler_that_raises_does_so_afterwards() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    done: list[str] = []

    def call() -> None:
        send_both()
        done.append("all of it")

    with pytest.raises(KeyboardInterrupt):
        call_native(call)
    assert done == ["all of it"]


def test_on_other_threads_no_handler_runs_anyway(handlers: list[int]) -> None:
    where: list[threading.Thread] = []
    thread = threading.Thread(target=lambda: call_native(lambda: where.append(threading.current_thread())))
    thread.start()
    thread.join(10)
    assert where == [thread]
