"""What plans and shards say of themselves."""

from __future__ import annotations

import dataclasses

import pytest

from protos.stage.messages import SequenceSlice, ShardSpec, Span, StepPlan


def part(length: int, sequence: int = 1) -> SequenceSlice:
    return SequenceSlice(sequence, 0, length, 193, range(length), (), 4)


@pytest.mark.parametrize(
    ("lengths", "tokens", "decode"),
    [((1,), 1, True), ((1, 1, 1), 3, True), ((17, 1), 18, False), ((67, 193), 260, False)],
)
def test_a_plan_counts_its_rows(lengths: tuple[int, ...], tokens: int, decode: bool) -> None:
    plan = StepPlan(0, tuple(part(length, at) for at, length in enumerate(lengths)))
    assert (plan.num_tokens, plan.is_decode) == (tokens, decode)


@pytest.mark.parametrize("stages", [1, 2, 17])
def test_the_ends_of_the_pipeline(stages: int) -> None:
    shards = [
        ShardSpec(stage, stages, 0, 1, Span(stage, stage + 1), *(Span(0, 1) for _ in range(5)))
        for stage in range(stages)
    ]
    assert [shard.is_first for shard in shards] == [True, *[False] * (stages - 1)]
    assert [shard.is_last for shard in shards] == [*[False] * (stages - 1), True]


def test_messages_cannot_change() -> None:
    assert Span(17, 67).size == 50
    with pytest.raises(dataclasses.FrozenInstanceError):
        StepPlan(0, ()).step = 1  # type: ignore[misc]
