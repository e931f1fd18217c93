"""Steps in flight: which results complete them, in which order, and the compute time they report."""

from collections.abc import Iterable
from itertools import permutations

import pytest

from cluster.engine.in_flight import InFlightStep, InFlightSteps
from protos.stage.messages import (
    CellReport,
    SampledToken,
    SampleSpec,
    SamplingParams,
    SequenceSlice,
    ShardSpec,
    Span,
    StepPlan,
    StepResult,
)

EMPTY = Span(0, 0)


def shards(stages: int, ranks: int) -> list[ShardSpec]:
    return [
        ShardSpec(stage, stages, rank, ranks, Span(stage, stage + 1), EMPTY, EMPTY, EMPTY, EMPTY, EMPTY)
        for stage in range(stages)
        for rank in range(ranks)
    ]


def step_plan(step: int, sequences: Iterable[int] = (1,)) -> StepPlan:
    parts = [SequenceSlice(s, 0, 1, 1, (0,), (), 1, SampleSpec(SamplingParams(), 0)) for s in sequences]
    return StepPlan(step, tuple(parts))


@pytest.mark.parametrize("order", list(permutations([(0, 0), (0, 1), (1, 0), (1, 1)])))
def test_a_sparse_step_waits_for_every_shard(order: tuple[tuple[int, int], ...]):
    flight = InFlightSteps(shards(2, 2), lambda part: True)
    flight.add(step_plan(1))
    done: list[InFlightStep] = []
    for place in order:
        assert not done
        samples = (SampledToken(1, 7),) if place == (1, 0) else ()
        done = flight.take(
            StepResult(
                1,
                *place,
                1_000_000 + place[0],
                samples,
                cells=(CellReport(1, 0, place[1], 0, 64, (0.5,), (0.99,), (0.9,), (False,)),),
                estimate_us=5,
            )
        )
    (step,) = done
    assert (len(step.cells), step.samples, step.slowest_s) == (4, (SampledToken(1, 7),), 1.000001)
    assert (step.compute_us, step.estimate_us, len(flight)) == (4_000_002, 20, 0)


def decode_plan(step: int) -> StepPlan:
    part = SequenceSlice(1, 99 + step, 1, 100, (), (), 10, SampleSpec(SamplingParams(), step))
    return StepPlan(step, (part,))


def test_the_time_of_a_decode_step_through_all_stages():
    flight = InFlightSteps(shards(2, 2), lambda part: False)
    assert flight.decode_s(2) == 0
    prompt = SequenceSlice(1, 0, 100, 100, range(100), (), 10, None)
    flight.add(StepPlan(1, (prompt,)))
    for step in (2, 3, 4):
        flight.add(decode_plan(step))
    flight.take(StepResult(1, 0, 0, 2_000_000))
    flight.take(StepResult(1, 1, 0, 2_000_000))
    assert flight.decode_s(2) == 0, "a prompt tells nothing"
    flight.take(StepResult(2, 1, 0, 30_000))
    assert flight.decode_s(2) == 0.06, "the stage that has not answered takes as long"
    flight.take(StepResult(2, 0, 1, 10_000))  # late, as of everyone whose results no step waits for
    assert flight.decode_s(2) == 0.04
    flight.take(StepResult(2, 0, 0, 20_000))
    assert flight.decode_s(2) == 0.05, "of the shards of a stage the slowest counts"
    flight.take(StepResult(3, 1, 0, 40_000))
    assert flight.decode_s(2) == 0.06
    flight.clear()
    assert flight.decode_s(2) == 0


def test_compute_time_that_is_told_late_counts_for_the_next_step():
    flight = InFlightSteps(shards(2, 1), lambda part: False)
    for step in (1, 2, 3):
        flight.add(decode_plan(step))
    (first,) = flight.take(StepResult(1, 1, 0, 30_000))
    assert first.compute_us == 30_000
    assert flight.take(StepResult(1, 0, 0, 20_000)) == []
    flight.take(StepResult(2, 0, 0, 21_000))
    (second,) = flight.take(StepResult(2, 1, 0, 30_000))
    (third,) = flight.take(StepResult(3, 1, 0, 30_000))
    assert (second.compute_us, third.compute_us) == (71_000, 30_000)


def test_a_dense_step_waits_for_the_sampling_shard_only():
    flight = InFlightSteps(shards(2, 2), lambda part: False)
    flight.add(step_plan(1))
    assert flight.take(StepResult(1, 0, 1, 10)) == []
    assert [step.plan.step for step in flight.take(StepResult(1, 1, 0, 10))] == [1]
    assert flight.take(StepResult(1, 1, 1, 10)) == [], "late"


def test_steps_are_committed_in_order():
    flight = InFlightSteps(shards(1, 2), lambda part: part.sequence == 1)
    for step, sequence in ((1, 1), (2, 2), (3, 1), (4, 2)):
        flight.add(step_plan(step, [sequence]))
    assert [plan.step for plan in flight.plans] == [1, 2, 3, 4]
    for step in (1, 2, 3):
        assert flight.take(StepResult(step, 0, 0, 1)) == []
    assert [s.plan.step for s in flight.take(StepResult(1, 0, 1, 1))] == [1, 2]
    assert flight.take(StepResult(4, 0, 0, 1)) == []
    assert [s.plan.step for s in flight.take(StepResult(3, 0, 1, 1))] == [3, 4]
