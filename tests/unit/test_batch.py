"""Plans become batches; plans that do not continue what a shard has seen are refused."""

import pytest
import torch

from protos.messages import SampleSpec, SamplingParams, SequenceSlice, StepPlan
from workers.batch import BlockTables
from workers.kv_cache import PlanMismatch, SlotRun

CPU = torch.device("cpu")
SAMPLE = SampleSpec(SamplingParams(), 0)


def part(sequence: int, start: int, length: int, new: list[int], total: int, sample: bool = False) -> SequenceSlice:
    ids = range(100 * sequence + start, 100 * sequence + start + length)
    return SequenceSlice(sequence, start, length, 99, ids, new, total, SAMPLE if sample else None)


def plan(*parts: SequenceSlice, released: tuple[int, ...] = (), step: int = 1) -> StepPlan:
    return StepPlan(1, step, parts, released)


def test_a_mixed_step():
    tables = BlockTables(4)
    tables.apply(plan(part(1, 0, 5, [7, 2], 2)))
    step = plan(part(1, 5, 1, [], 2, True), part(2, 0, 3, [0], 1), part(3, 0, 4, [4], 1, True))
    tables.apply(step)
    batch = tables.batch(step, CPU, with_tokens=True)
    assert batch.positions.tolist() == [5, 0, 1, 2, 0, 1, 2, 3]
    assert batch.token_ids is not None
    assert batch.token_ids.tolist() == [105, 200, 201, 202, 300, 301, 302, 303]
    assert batch.slots == (SlotRun(9, 1), SlotRun(0, 3), SlotRun(16, 4))
    assert batch.sample_rows.tolist() == [0, 7]
    assert [s.rows for s in batch.slices] == [slice(0, 1), slice(1, 4), slice(4, 8)]
    assert [s.plan.visited_pairs for s in batch.slices] == [6, 6, 10]


def test_later_stages_need_no_ids():
    tables = BlockTables(4)
    step = plan(SequenceSlice(1, 0, 3, 3, (), [0], 1))
    tables.apply(step)
    assert tables.batch(step, CPU, with_tokens=False).token_ids is None
    with pytest.raises(PlanMismatch, match="sequence 1: 0 ids for 3 rows"):
        tables.batch(step, CPU, with_tokens=True)


def test_a_row_without_an_id_takes_the_newest_sample():
    tables = BlockTables(4)
    step = plan(part(1, 0, 2, [0], 1), SequenceSlice(2, 3, 1, 3, (), [1], 1))
    tables.apply(step)
    batch = tables.batch(step, CPU, with_tokens=True, sampled={2: 77})
    assert batch.token_ids is not None
    assert batch.token_ids.tolist() == [100, 101, 77]
    with pytest.raises(PlanMismatch, match="sequence 2: 0 ids for 1 rows"):
        tables.batch(step, CPU, with_tokens=True, sampled={1: 5})


@pytest.mark.parametrize(("new", "total"), [([], 1), ([1], 2), ([1, 2], 1), ([1], 0)])
def test_a_table_of_another_length_is_refused(new: list[int], total: int):
    with pytest.raises(PlanMismatch, match=f"sequence 5: the plan counts {total} blocks, this shard {len(new)}"):
        BlockTables(4).apply(plan(part(5, 0, 1, new, total)))


def test_a_missed_step_is_noticed():
    tables = BlockTables(4)
    tables.apply(plan(part(1, 0, 4, [0], 1)))
    with pytest.raises(PlanMismatch, match="the plan counts 3 blocks, this shard 2"):
        tables.apply(plan(part(1, 8, 4, [2], 3)))


def test_rows_beyond_the_table_are_refused():
    tables = BlockTables(4)
    step = plan(part(1, 0, 5, [0], 1))
    tables.apply(step)
    with pytest.raises(PlanMismatch, match="position 4 lies beyond the 1 blocks"):
        tables.batch(step, CPU, with_tokens=True)


def test_released_sequences_begin_anew():
    tables = BlockTables(4)
    tables.apply(plan(part(1, 0, 8, [0, 1], 2), part(2, 0, 1, [2], 1)))
    tables.apply(plan(part(1, 0, 4, [5], 1), released=(1, 99)))
    assert len(tables) == 2
    tables.apply(plan(released=(1, 2)))
    assert len(tables) == 0
    tables.apply(plan(part(3, 0, 1, [0], 1)))
    tables.clear()
    assert len(tables) == 0
