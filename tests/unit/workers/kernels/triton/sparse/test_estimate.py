"""Log-sum-exps and sums of the estimate against the definition with whole matrices in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from protos.model.spec import SparseSpec
from workers.bench.cases.device_cells import device_cells
from workers.bench.cases.sparse_cells import Shape, attention, column_and_offset_sums
from workers.kernels.triton.sparse.estimate import estimate, shared_heads

HALF = 1e-3  # probabilities on their way to a diagonal have 11 bits
CASES = {
    "first cells, and all regions with borders inside of chunks": (
        [Shape(0, 67, last_q=17), Shape(192, 83, distance=96, last_q=17), Shape(300, 5, distance=96, last_q=17)], 32,
    ),
    "bfloat16, three heads of a KV head, one row": (
        [Shape(193, 1, last_q=64, heads=3, kv_heads=1, dim=16, dtype=torch.bfloat16),
         Shape(64, 193, last_q=64, heads=3, kv_heads=1, dim=16, dtype=torch.bfloat16)], 64,
    ),
}  # fmt: skip


@pytest.mark.parametrize("forced", [(0, 0), (30, 128)])
@pytest.mark.parametrize("name", CASES)
def test_sums_equal_the_definition(name: str, forced: tuple[int, int]) -> None:
    shapes, block = CASES[name]
    given = device_cells(shapes, SparseSpec(last_q=shapes[0].last_q), block)
    found = estimate(given.estimate, given.keys, given.step.tables, given.shape, 3, forced)
    for at, cell in enumerate(given.cells):
        stop, rows = cell.keys.stop, np.array(cell.queries.estimate.rows)
        mass = attention(cell, cell.queries.estimate)
        distance = cell.plan.start + rows[:, None] - np.arange(stop)
        mass[:, distance < forced[1]] = 0
        mass[:, :, : forced[0]] = 0
        columns, offsets = column_and_offset_sums(cell, mass)
        np.testing.assert_allclose(found.columns[at, :, :stop], columns, atol=2e-5)
        np.testing.assert_allclose(found.offsets[at, :, :stop], offsets, rtol=HALF, atol=1e-6)
        assert not found.columns[at, :, stop:].any()
        assert not found.offsets[at, :, stop:].any()
        unused = found.lse[at, :, : found.lse.shape[2] - len(rows)]
        assert (unused == torch.inf).all()


def test_sums_do_not_depend_on_the_number_of_programs() -> None:
    given = device_cells([Shape(192, 83, distance=96, last_q=17)], SparseSpec(last_q=17))
    one, two = (estimate(given.estimate, given.keys, given.step.tables, given.shape, count) for count in (1, 5))
    assert torch.equal(one.columns, two.columns)
    assert torch.equal(one.offsets, two.offsets)


def test_heads_that_share_a_tile() -> None:
    assert shared_heads(4, heads=32, group=8, chunks=10) == (4, 10 * 4 * 2)
    assert shared_heads(4, heads=28, group=7, chunks=1) == (4, 4 * 2)
    assert shared_heads(4, heads=3, group=3, chunks=1) == (4, 1)
    assert shared_heads(4, heads=2, group=1, chunks=3) == (1, 6)
