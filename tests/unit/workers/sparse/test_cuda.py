"""The selection of a step's cells on a CUDA device, interpreted, against `choose` on the CPU, cell by cell."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from protos.model.spec import HeadBudget, SparseSpec
from workers.attention.plan import Queries
from workers.bench.cases.device_cells import LAYER, DeviceCells, device_cells
from workers.bench.cases.sparse_cells import Shape
from workers.kernels.triton.lists import CellLists, cell_lists
from workers.kernels.triton.sparse import selection
from workers.sparse import cuda, vertical_slash
from workers.sparse.cuda import CellFigures, HeadBudgets, tile_shape
from workers.sparse.estimate import Estimate
from workers.sparse.vertical_slash import CellChoice, choose

HALF = 3e-4  # diagonals of the estimate are summed from probabilities of 11 bits
TILE = 64


@pytest.fixture(autouse=True)
def _twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vertical_slash, "_backend", lambda cell, keys: Estimate)
    monkeypatch.setattr(selection, "_BLOCK", 512)


def select(given: DeviceCells) -> tuple[list[CellLists], list[CellFigures]]:
    lists = [own for (own,) in given.step.select(LAYER, given.estimate, given.held_out, given.keys)]
    heads = given.estimate.queries.shape[2]
    given.step.note_visited([torch.full((heads,), cell.plan.causal_pairs // 2) for cell in given.cells])
    return lists, given.step.figures()


def check(given: DeviceCells, lists: CellLists, figures: CellFigures, at: int, choice: CellChoice) -> None:
    cell = given.cells[at]
    offsets, columns = [one.offsets for one in choice.selections], [one.columns for one in choice.selections]
    expected = cell_lists(offsets, columns, cell.keys.stop, TILE)
    assert torch.equal(lists.num_blocks, expected.num_blocks)
    assert torch.equal(lists.num_columns, expected.num_columns)
    for head, (blocks, chosen) in enumerate(zip(expected.num_blocks, expected.num_columns, strict=True)):
        assert torch.equal(lists.blocks[head, :blocks], expected.blocks[head, :blocks])
        assert torch.equal(lists.counts[head, :blocks], expected.counts[head, :blocks])
        assert torch.equal(lists.columns[head, :chosen], expected.columns[head, :chosen])
    assert (figures.layer, figures.cell) == (LAYER, at)
    pairs = cell.plan.causal_pairs
    assert figures.density == pytest.approx([pairs // 2 / pairs] * len(choice.dense))
    assert figures.estimated_recall == pytest.approx(choice.estimated_recall, abs=HALF)
    assert figures.held_out_recall == pytest.approx(choice.held_out_recall, abs=1e-5)
    assert figures.dense == list(choice.dense)


SMALL = Shape(192, 67, last_q=17)
DCA = [Shape(192, 83, distance=96, last_q=17), Shape(300, 5, distance=96, last_q=17), Shape(0, 67, last_q=17)]
CASES = {
    "cells of all regions": (DCA, {"uniform": HeadBudget(41, 117)}),
    "all columns": ([SMALL], {"uniform": HeadBudget(10**6, 0)}),
    "everything dense": ([SMALL], {"uniform": HeadBudget(0, 10**6)}),
    "half of the heads fall back": ([SMALL], {"uniform": HeadBudget(0, 0), "recall_floor": 1.0, "cell": 64,
                                              "max_dense_share": 0.5}),
    "patterns": ([SMALL], {"patterns": ((),) * LAYER + ((HeadBudget(40, 110), HeadBudget(60, 150), None, None),)}),
    "synthetic": ([Shape(2048, 67, last_q=17, heads=2, kv_heads=1, dim=16)], {"synthetic": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_selections_and_recalls_equal_those_of_the_cpu(name: str, caplog: pytest.LogCaptureFixture) -> None:
    for warning in (vertical_slash.warn_cap, vertical_slash.warn_dense):
        warning.cache_clear()
    shapes, fields = CASES[name]
    given = device_cells(shapes, SparseSpec(last_q=17, **fields), tile=TILE)
    lists, figures = select(given)
    warned = sorted(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    for warning in (vertical_slash.warn_cap, vertical_slash.warn_dense):
        warning.cache_clear()
    caplog.clear()
    for at, cell in enumerate(given.cells):
        check(given, lists[at], figures[at], at, choose(*cell.args(last_q=17, **fields)))
    assert warned == sorted(record.getMessage() for record in caplog.records)


def test_adaptive_budgets_reach_their_target_with_lists_like_those_of_the_cpu() -> None:
    """Rounding of diagonals may move the end of a list by a candidate or two."""
    fields = {"target_recall": 0.9, "last_q": 17}
    given = device_cells([Shape(448, 193, last_q=17, heads=2, kv_heads=1)], SparseSpec(**fields), tile=TILE)
    lists, figures = select(given)
    choice = choose(*given.cells[0].args(**fields))
    for head, one in enumerate(choice.selections):
        assert figures[0].estimated_recall[head] >= 0.9 - 1e-6
        assert figures[0].estimated_recall[head] == pytest.approx(choice.estimated_recall[head], abs=2e-3)
        assert figures[0].held_out_recall[head] == pytest.approx(choice.held_out_recall[head], abs=5e-3)
        found = lists[0].columns[head, : lists[0].num_columns[head]].tolist()
        assert len(set(found) ^ set(one.columns.tolist())) <= 3
        assert 30 < len(found) < 500


def test_without_an_end_everything_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "PROPOSALS", 1)
    given = device_cells([Shape(448, 67, last_q=17, heads=2, kv_heads=1, dim=16)], SparseSpec(last_q=17), tile=TILE)
    lists, figures = select(given)
    assert lists[0].num_columns.tolist() == [0, 0]
    assert lists[0].counts.sum(dim=1).tolist() == [515 + TILE - 1] * 2
    assert figures[0].estimated_recall == figures[0].held_out_recall == [1.0, 1.0]
    assert figures[0].dense == [False, False]


def test_rows_are_taken_from_the_queries_of_the_step() -> None:
    given = device_cells([Shape(0, 17, last_q=17), Shape(192, 67, last_q=17)], SparseSpec(last_q=17))
    queries = torch.arange(84.0)[:, None, None].expand(84, 4, 32)
    taken = given.step.estimate.take(Queries(queries, queries + 100)).queries
    assert taken.shape == (3, 2, 4, 32, 32)
    assert taken[0, 0, 1, 15:, 3].tolist() == list(range(17))
    assert taken[1, 1, 2, 15:, 3].tolist() == list(range(167, 184))
    assert taken[2, 1, 0, 15:, 0].tolist() == list(range(67, 84))
    sampled = given.step.held_out
    assert sampled.positions[0].tolist() == [*range(17), *[-1] * 15]
    assert (sampled.rows - 17 == sampled.positions - 192)[1].all()


def test_budgets_of_a_shard() -> None:
    patterns = tuple(tuple(HeadBudget(10 * layer + head, head) for head in range(4)) for layer in range(3))
    budgets = HeadBudgets(SparseSpec(patterns=patterns), range(1, 3), range(2, 4), "cpu")
    columns, offsets = budgets.of(2, num_cells=2)
    assert columns.tolist() == [[22, 23]] * 2
    assert offsets.tolist() == [[2, 3]] * 2
    assert budgets.max_columns == 23
    assert np.array_equal(HeadBudgets(SparseSpec(), range(1), range(2), "cpu").of(0, 1)[0], [[0, 0]])


def test_sampled_rows_that_tiles_have_no_room_for_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sparse\.last_q: 129: must be at most 128 on this GPU"):
        HeadBudgets(SparseSpec(last_q=129, uniform=HeadBudget(1, 1)), range(1), range(1), "cpu")
    for rows in (16, 64, 128):
        shape = tile_shape(rows)
        assert shape.block >= rows
        assert shape.shared * rows <= 256
        assert shape.shared_sums * rows <= 128
