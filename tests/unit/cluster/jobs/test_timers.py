"""The timer thread: order, repetition, actions that fail, closing."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from cluster.jobs.timers import Timers
from tests.support.fakes.stage import WAIT, Clock, eventually


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timers(clock: Clock) -> Iterator[Timers]:
    made = Timers(clock)
    made.start()
    yield made
    made.close()
    made.close()


def test_actions_run_when_they_are_due_in_their_order(timers: Timers, clock: Clock) -> None:
    done: list[int] = []
    timers.at(clock.now + 20, lambda: done.append(3))
    timers.at(clock.now + 10, lambda: done.append(1))
    timers.at(clock.now + 10, lambda: done.append(2))
    timers.at(clock.now, lambda: done.append(0))
    eventually(lambda: done == [0])
    clock.now += 15
    timers.at(clock.now - 100, lambda: done.append(4))  # overdue; adding it wakes the thread
    eventually(lambda: len(done) == 4)
    assert done == [0, 4, 1, 2]
    clock.now += 5
    timers.at(clock.now, lambda: done.append(5))
    eventually(lambda: done[4:] == [3, 5])


def test_a_repeated_action_goes_on_after_a_failure(
    timers: Timers, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    times: list[float] = []

    def action() -> None:
        times.append(clock.now)
        if len(times) == 2:
            raise KeyError("locked")

    timers.every(60, action)
    for count in (1, 2, 3):
        eventually(lambda count=count: len(times) == count and len(timers._scheduler.queue) == 1)  # type: ignore[misc]
        clock.now += 59
        timers.at(clock.now, lambda: None)
        eventually(lambda: len(timers._scheduler.queue) == 1)
        assert len(times) == count, "not before it is due"
        clock.now += 1
        timers.at(clock.now, lambda: None)
    assert times == [100.0, 160.0, 220.0]
    assert "a timed action failed" in caplog.text


def test_close_waits_for_the_action_that_runs(clock: Clock) -> None:
    timers = Timers(clock)
    timers.close()  # before it was started
    timers = Timers(clock)
    timers.start()
    begun, go, ended = threading.Event(), threading.Event(), threading.Event()

    def action() -> None:
        begun.set()
        go.wait(WAIT)
        ended.set()

    timers.at(0, action)
    timers.at(1, lambda: pytest.fail("not after the close"))
    assert begun.wait(WAIT)
    closing = threading.Thread(target=timers.close)
    closing.start()
    eventually(lambda: timers._closing)
    go.set()
    closing.join(WAIT)
    assert ended.is_set()
