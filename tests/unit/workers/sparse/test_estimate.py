"""The sums of an estimate in PyTorch against the definition with whole matrices in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workers.attention.plan import Selection
from workers.bench.cases.sparse_cells import Shape, attention, column_and_offset_sums, kept_mass, random_cell
from workers.sparse.estimate import Estimate
from workers.sparse.selection import offset_mask


@pytest.mark.parametrize(("dtype", "cache"), [(torch.bfloat16, None), (torch.bfloat16, torch.int8),
                                              (torch.float32, torch.int8)])  # fmt: skip
def test_sums_in_other_types(dtype: torch.dtype, cache: torch.dtype | None) -> None:
    cell = random_cell(Shape(160, 67, distance=80, last_q=17, dtype=dtype, cache=cache))
    columns, offsets = column_and_offset_sums(cell, attention(cell, cell.queries.estimate))
    for kv_head in range(2):
        found = Estimate(cell.queries.estimate, cell.keys, kv_head).sums()
        heads = slice(kv_head * 2, kv_head * 2 + 2)
        np.testing.assert_allclose(found.columns, columns[heads], atol=2e-5)
        np.testing.assert_allclose(found.offsets, offsets[heads], atol=2e-5)


def test_a_pair_kept_twice_counts_once() -> None:
    cell = random_cell(Shape(192, 67, last_q=17, heads=1, kv_heads=1))
    sampled = attention(cell, cell.queries.estimate)[0]
    estimate = Estimate(cell.queries.estimate, cell.keys, 0)
    found = estimate.sums()
    both = Selection(np.array([[0, 120], [130, 200]], np.int32), np.arange(0, 259, 3, dtype=np.int32))
    mass = estimate.kept_mass(found, [both])[0]
    counted_twice = found.columns[0, both.columns].sum() + found.offsets[0, offset_mask(both, 259)].sum()
    assert counted_twice > mass + 1
    assert mass / 17 == pytest.approx(kept_mass(sampled, 192, cell.queries.estimate.rows, both), abs=1e-5)
