"""Plans between the stream and the thread that computes."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator

import pytest

from protos.stage.messages import SequenceSlice, StepPlan
from workers.stage.plan_queue import PlanQueue, RunCancelled, UnreadablePlan


def plan(step: int, length: int = 1) -> StepPlan:
    return StepPlan(step, (SequenceSlice(1, 0, length, 9, (), (), 1),))


class Stream:
    """Bursts as a test sends them; None ends the stream."""

    def __init__(self) -> None:
        self.bursts: queue.SimpleQueue[list[StepPlan] | Exception | None] = queue.SimpleQueue()
        self.asked = queue.SimpleQueue[int]()

    def __iter__(self) -> Iterator[list[StepPlan]]:
        while (burst := self.bursts.get()) is not None:
            if isinstance(burst, Exception):
                raise burst
            yield burst
            self.asked.put(1)

    def send(self, *steps: int) -> None:
        """A burst, which the queue has taken when this returns."""
        self.bursts.put([plan(step) for step in steps])
        self.asked.get(timeout=10)


def test_plans_come_in_order_whatever_their_bursts():
    plans = PlanQueue([[plan(1), plan(2)], [], [plan(3)]])
    assert [each.step for each in plans] == [1, 2, 3]
    assert list(plans) == []


def test_the_thread_that_computes_waits_for_the_next_plan():
    stream = Stream()
    plans = iter(PlanQueue(stream))
    for step in (1, 2):
        stream.send(step)
        assert next(plans).step == step
    stream.bursts.put(None)
    assert list(plans) == []


def test_plans_ahead_are_counted_without_taking_them():
    stream = Stream()
    plans = PlanQueue(stream)
    assert plans.decodes_ahead(0)
    assert not plans.decodes_ahead(1)
    stream.send(1, 2)
    assert [plans.decodes_ahead(count) for count in range(4)] == [True, True, True, False]
    stream.bursts.put([plan(3, length=5)])
    stream.bursts.put(None)
    assert [each.step for each in plans] == [1, 2, 3]


def test_a_prompt_ahead_is_no_decode_step():
    stream = Stream()
    plans = PlanQueue(stream)
    stream.bursts.put([plan(1), plan(2, length=5)])
    stream.asked.get(timeout=10)
    assert plans.decodes_ahead(1)
    assert not plans.decodes_ahead(2)
    stream.bursts.put(None)


@pytest.mark.parametrize("error", [ValueError("top_p: 2:\nmust be"), TypeError("x"), KeyError("y")])
def test_what_is_no_plan_is_an_error_after_the_plans_before_it(error: Exception):
    stream = Stream()
    stream.bursts.put([plan(1)])
    stream.bursts.put(error)
    plans = iter(PlanQueue(stream))
    assert next(plans).step == 1
    with pytest.raises(UnreadablePlan, match="a plan cannot be read: ") as caught:
        next(plans)
    assert "\n" not in str(caught.value)


def test_a_queue_that_was_ended_gives_nothing_and_counts_what_still_comes():
    stream, late = Stream(), queue.SimpleQueue[int]()
    plans = PlanQueue(stream, late.put)
    stream.send(1, 2)
    taken = iter(plans)
    assert next(taken).step == 1
    plans.end()
    stream.send(3, 4)
    assert late.get(timeout=10) == 2
    assert list(taken) == []
    assert list(plans) == []
    stream.bursts.put(None)


def test_a_cancelled_run_drops_what_was_not_taken():
    stream = Stream()
    plans = PlanQueue(stream)
    stream.send(1, 2, 3)
    taken = iter(plans)
    assert next(taken).step == 1
    stream.bursts.put(RunCancelled())
    while plans.decodes_ahead(1):
        time.sleep(0.01)
    assert list(taken) == []
