"""Plans become batches; plans that do not continue what a shard has seen are refused."""

import math
from dataclasses import replace

import pytest
import torch

from protos.model.spec import DualChunkSpec, ModelSpec, RopeSpec, SparseSpec
from protos.stage.messages import SampleSpec, SamplingParams, SequenceSlice, StepPlan
from workers.kv.paged import PlanMismatch, SlotRun
from workers.model.batch import PageTables, Piece, token_ids

CPU = torch.device("cpu")
SAMPLE = SampleSpec(SamplingParams(), 0)
SPEC = ModelSpec(
    "qwen3", 100, 64, 2, 4, 2, 16, 96, 1e-6, False, False, False, False, True, RopeSpec(1e4), 1 << 20, "float32", ()
)  # fmt: skip
DUAL = replace(SPEC, dual_chunk=DualChunkSpec(12, 4, original_max_position_embeddings=4))  # chunks begin every 8
SPARSE = replace(DUAL, sparse=SparseSpec(threshold=20, cell=5))


def part(sequence: int, start: int, length: int, new: list[int], total: int, sample: bool = False) -> SequenceSlice:
    ids = range(100 * sequence + start, 100 * sequence + start + length)
    return SequenceSlice(sequence, start, length, 99, ids, new, total, SAMPLE if sample else None)


def plan(*parts: SequenceSlice, released: tuple[int, ...] = (), step: int = 1) -> StepPlan:
    return StepPlan(step, parts, released)


def test_a_mixed_step():
    tables = PageTables(4)
    tables.apply(plan(part(1, 0, 5, [7, 2], 2)))
    step = plan(part(1, 5, 1, [], 2, True), part(2, 0, 3, [0], 1), part(3, 0, 4, [4], 1, True))
    tables.apply(step)
    batch = tables.batch(step, SPEC, CPU)
    assert batch.positions.tolist() == [5, 0, 1, 2, 0, 1, 2, 3]
    assert token_ids(step, {}) == [105, 200, 201, 202, 300, 301, 302, 303]
    assert batch.slots == (SlotRun(9, 1), SlotRun(0, 3), SlotRun(16, 4))
    assert batch.sample_rows.tolist() == [0, 7]
    assert [s.rows for s in batch.pieces] == [slice(0, 1), slice(1, 4), slice(4, 8)]
    assert [s.plan.causal_pairs for s in batch.pieces] == [6, 6, 10]


def test_later_stages_need_no_ids():
    tables = PageTables(4)
    step = plan(SequenceSlice(1, 0, 3, 3, (), [0], 1))
    tables.apply(step)
    assert tables.batch(step, SPEC, CPU).positions.tolist() == [0, 1, 2]
    with pytest.raises(PlanMismatch, match="sequence 1: 0 ids for 3 rows"):
        token_ids(step, {})


def test_a_row_without_an_id_takes_the_newest_sample():
    tables = PageTables(4)
    step = plan(part(1, 0, 2, [0], 1), SequenceSlice(2, 3, 1, 3, (), [1], 1))
    tables.apply(step)
    assert token_ids(step, {2: 77}) == [100, 101, 77]
    with pytest.raises(PlanMismatch, match="sequence 2: 0 ids for 1 rows"):
        token_ids(step, {1: 5})


@pytest.mark.parametrize(("new", "total"), [([], 1), ([1], 2), ([1, 2], 1), ([1], 0)])
def test_a_table_of_another_length_is_refused(new: list[int], total: int):
    with pytest.raises(PlanMismatch, match=f"sequence 5: the plan counts {total} pages, this shard {len(new)}"):
        PageTables(4).apply(plan(part(5, 0, 1, new, total)))


def test_a_missed_step_is_noticed():
    tables = PageTables(4)
    tables.apply(plan(part(1, 0, 4, [0], 1)))
    with pytest.raises(PlanMismatch, match="the plan counts 3 pages, this shard 2"):
        tables.apply(plan(part(1, 8, 4, [2], 3)))


def test_rows_beyond_the_table_are_refused():
    tables = PageTables(4)
    step = plan(part(1, 0, 5, [0], 1))
    tables.apply(step)
    with pytest.raises(PlanMismatch, match="position 4 lies beyond the 1 pages"):
        tables.batch(step, SPEC, CPU)


def test_released_sequences_begin_anew():
    tables = PageTables(4)
    tables.apply(plan(part(1, 0, 8, [0, 1], 2), part(2, 0, 1, [2], 1)))
    tables.apply(plan(part(1, 0, 4, [5], 1), released=(1, 99)))
    assert len(tables) == 2
    tables.apply(plan(released=(1, 2)))
    assert len(tables) == 0
    tables.apply(plan(part(3, 0, 1, [0], 1)))
    tables.clear()
    assert len(tables) == 0


def pieces(spec: ModelSpec, start: int, length: int, prompt_len: int, scale_len: int = 0) -> list[Piece]:
    tables = PageTables(4)
    pages = list(range(-(-(start + length) // 4)))
    step = plan(SequenceSlice(1, start, length, prompt_len, range(length), pages, len(pages), SAMPLE, scale_len))
    tables.apply(step)
    return list(tables.batch(step, spec, CPU).pieces)


@pytest.mark.parametrize(("spec", "start", "length", "wanted"), [
    (SPEC, 3, 18, [(3, 18)]),
    (DUAL, 0, 8, [(0, 8)]),
    (DUAL, 7, 10, [(7, 1), (8, 8), (16, 1)]),
    (DUAL, 40, 1, [(40, 1)]),
    (SPARSE, 0, 20, [(0, 8), (8, 8), (16, 4)]),  # the prompt is not above the threshold
])  # fmt: skip
def test_slices_are_cut_where_a_plan_must_end(spec: ModelSpec, start: int, length: int, wanted: list) -> None:
    found = pieces(spec, start, length, 20)
    assert [(piece.plan.start, piece.plan.length) for piece in found] == wanted
    assert [piece.rows.start for piece in found] == [begin - start for begin, _ in wanted]
    assert all(piece.plan.distance == spec.chunk_distance and not piece.sparse for piece in found)


def test_cells_of_a_sparse_prompt():
    found = pieces(SPARSE, 0, 21, 21)
    assert [piece.plan.start for piece in found] == [0, 5, 8, 10, 15, 16, 20]
    assert all(piece.sparse for piece in found)
    found = pieces(SPARSE, 8, 9 + 5, 17 + 5)  # to the prompt's end
    assert [(p.plan.start, p.plan.length) for p in found] == [(8, 2), (10, 5), (15, 1), (16, 4), (20, 2)]
    found = pieces(SPARSE, 20, 6, 21)  # the end of the prompt, then generated tokens computed again
    assert [(p.plan.start, p.plan.length, p.sparse) for p in found] == [(20, 1, True), (21, 3, False), (24, 2, False)]


@pytest.mark.parametrize(("start", "length"), [(0, 4), (1, 4), (6, 2), (0, 9), (15, 7)])
def test_part_of_a_cell_is_refused(start: int, length: int):
    with pytest.raises(PlanMismatch, match=r"sequence 1: rows \d+ to \d+ are not a whole cell of 30 tokens"):
        pieces(SPARSE, start, length, 30)


def test_scales_depend_on_the_prompt_and_the_position_only():
    def scale(length: int) -> float:
        return 16**-0.5 * max(1.0, 0.1 * math.log(length / 4) + 1.0) ** 2

    whole = torch.cat([piece.scales for piece in pieces(DUAL, 0, 30, 20)])
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole, torch.tensor([scale(max(20, p + 1)) for p in range(30)]), rtol=1e-7, atol=0)
    for position in range(30):
        (one,) = pieces(DUAL, position, 1, 20)
        assert torch.equal(one.scales, whole[position : position + 1])
    (one,) = pieces(DUAL, 3, 1, 20, scale_len=27)
    assert float(one.scales[0]) == pytest.approx(scale(27), rel=1e-7)
    assert torch.equal(pieces(SPEC, 0, 3, 3)[0].scales, torch.full((3,), 0.25))
