"""The decision which heads become dense, and what a selection keeps in all, against plain Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from protos.model.spec import SparseSpec
from workers.bench.cases.device_cells import device_cells
from workers.bench.cases.sparse_cells import Shape
from workers.kernels.triton.sparse.decide import decide
from workers.kernels.triton.sparse.selection import Kept

SHAPES = [Shape(start, 67, last_q=17, heads=6, kv_heads=2, dim=16) for start in (192, 0)]
ROWS, ROOM, FLOOR = [17, 16], [2, 0], 0.9


def dense_heads(shares: list[float], room: int) -> list[int]:
    lowest = sorted(range(len(shares)), key=lambda head: (shares[head], head))[:room]
    return [int(head in lowest and shares[head] < FLOOR) for head in range(len(shares))]


@pytest.mark.parametrize("parts", [0, 1, 5])
def test_figures_and_dense_heads(parts: int) -> None:
    tables = device_cells(SHAPES, SparseSpec(last_q=17)).step.tables
    random = np.random.default_rng(parts)
    shares = torch.tensor([[0.7, 0.5, 0.5, 0.95, 0.9, 0.2], [0.1] * 6])
    totals = torch.tensor([[10, 258, 259, 10, 10, 10], [10] * 5 + [67]], dtype=torch.int32)  # of 259 and 67
    masses, twice = random.random((2, 2, 6)) * 9, random.random((2, 6, max(1, parts)))
    masses[0, 1, 0] = 40  # more than there are rows: rounding
    offsets = Kept(torch.zeros(2, 6, 1), None, totals, torch.from_numpy(masses[0]).float())
    columns = Kept(torch.zeros(2, 6, 1), None, totals, torch.from_numpy(masses[1]).float())
    rules = torch.tensor([[rows, room, FLOOR] for rows, room in zip(ROWS, ROOM, strict=True)], dtype=torch.float64)
    kept = torch.from_numpy(twice).float() if parts else torch.from_numpy(masses.sum(0))
    figures, dense = decide(shares, offsets, columns, kept, rules, tables, kv_heads=2)
    expected = masses.sum(0) - (twice.sum(-1) if parts else 0)
    shares[0, 2] = shares[1, 5] = 1.0  # they keep all offsets
    for cell in range(2):
        recall = np.minimum(expected[cell] / ROWS[cell], 1.0)
        recall[totals[cell].numpy() >= [259, 67][cell]] = 1.0
        np.testing.assert_allclose(figures[0, cell], recall, rtol=1e-6)
        own = shares[cell].tolist()
        assert figures[1, cell].tolist() == own
        assert dense[cell].tolist() == dense_heads(own[:3], ROOM[cell]) + dense_heads(own[3:], ROOM[cell])
        assert figures[2, cell].tolist() == dense[cell].tolist()
    assert dense[0].tolist() == [1, 1, 0, 0, 1, 1]  # float32's 0.9 lies below 0.9
