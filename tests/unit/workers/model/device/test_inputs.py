"""The inputs of captured steps: what is written for the rows of a plan, and for idle ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from protos.model.spec import DualChunkSpec
from protos.stage.messages import SequenceSlice, StepPlan
from workers.bench.model import benchmark_spec
from workers.kv.paged import PagedKV, PlanMismatch
from workers.model.batch import PageTables
from workers.model.device.inputs import DecodeInputs
from workers.model.device.tables import DeviceTables
from workers.model.rope import row_scales

PAGE, CPU = 16, torch.device("cpu")
SPEC = replace(benchmark_spec(1), dual_chunk=DualChunkSpec(48, 16, original_max_position_embeddings=64))


def plan(*rows: tuple[int, int, list[int]], scale_len: int = 0) -> StepPlan:
    """A plan of rows `(sequence, position, pages)`, which have all pages up to their own."""
    return StepPlan(1, tuple(
        SequenceSlice(sequence, start, 1, 20, (), pages, start // PAGE + 1, None, scale_len)
        for sequence, start, pages in rows
    ))  # fmt: skip


def make(capacity: int = 4) -> tuple[DecodeInputs, PageTables, DeviceTables]:
    there = DeviceTables(8, CPU, 2)
    kv = PagedKV(1, 2, 16, 8, PAGE, torch.float32)
    return DecodeInputs(SPEC, kv, there, capacity, CPU), PageTables(PAGE), there


def test_rows_of_a_plan_and_idle_ones() -> None:
    inputs, tables, there = make()
    step = plan((7, 16, [3, 5]), (2, 90, [0, 1, 2, 4, 6, 7]), (4, 15, [2]))
    tables.apply(step)
    assert inputs.fill(step.slices, tables) == 91
    inputs.upload([11, 12, 13])
    rows = inputs.rows(4, 3)
    assert inputs.tokens(4).tolist() == [11, 12, 13, 0]
    assert inputs.positions(3).tolist() == [16, 90, 15]
    assert inputs.slots(4).tolist() == [5 * PAGE, 7 * PAGE + 10, 2 * PAGE + 15, -1]
    assert rows.lengths.tolist() == [17, 91, 16, 0]
    assert (rows.page_size, rows.distance, rows.splits) == (PAGE, 32, 3)
    assert rows.tables is there.slots
    for row, sequence in enumerate((7, 2, 4)):
        known = tables[sequence].page_slots
        assert rows.tables[rows.places[row], : len(known)].tolist() == list(known)
    wanted = [row_scales(torch.tensor([start]), 20, SPEC.head_dim, SPEC.dual_chunk) for start in (16, 90, 15)]
    assert torch.equal(rows.scales, torch.cat([*wanted, torch.zeros(1)]))
    shorter = plan((7, 17, []), scale_len=1000)
    tables.apply(shorter)
    assert inputs.fill(shorter.slices, tables) == 18
    inputs.upload()
    assert rows.lengths.tolist() == [18, 0, 0, 0]
    assert inputs.slots(4).tolist() == [5 * PAGE + 1, -1, -1, -1]
    assert torch.equal(rows.scales[:1], row_scales(torch.tensor([17]), 1000, SPEC.head_dim, SPEC.dual_chunk))
    assert inputs.is_in_place


def test_before_the_first_step_all_rows_are_idle() -> None:
    inputs, *_ = make()
    assert inputs.slots(4).tolist() == [-1] * 4
    assert not inputs.rows(4, 1).lengths.any()


def test_more_rows_elsewhere_move_the_page_tables() -> None:
    inputs, tables, there = make(2)
    step = plan((1, 0, [0]), (2, 0, [1]), (3, 0, [2]))
    tables.apply(step)
    there.places([tables[sequence] for sequence in (1, 2, 3)])
    assert not inputs.is_in_place


@pytest.mark.parametrize(("row", "message"), [
    ((1, 33, [0, 1]), "position 33 lies beyond the 2 pages of the table"),
    ((1, 17, [0, 8]), "slot 129 of a plan lies outside the cache of 128 slots"),
])  # fmt: skip
def test_rows_that_do_not_fit_are_refused(row: tuple[int, int, list[int]], message: str) -> None:
    inputs, tables, _ = make()
    step = plan(row)
    step = replace(step, slices=(replace(step.slices[0], num_pages=2),))
    tables.apply(step)
    with pytest.raises(PlanMismatch, match=message):
        inputs.fill(step.slices, tables)
