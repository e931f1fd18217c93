"""Kept attention of held-out rows and of the estimate's rows against the definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from protos.model.spec import SparseSpec
from workers.attention.plan import Selection
from workers.bench.cases.device_cells import DeviceCells, device_cells
from workers.bench.cases.sparse_cells import Shape, attention, kept_mass
from workers.kernels.triton.sparse.estimate import estimate
from workers.kernels.triton.sparse.recall import held_out_shares, overlap
from workers.kernels.triton.sparse.selection import Kept
from workers.sparse.selection import to_intervals

SHAPES = {
    "first cell, all regions": [
        Shape(0, 17, last_q=17, kv_heads=1), Shape(192, 83, distance=96, last_q=17, kv_heads=1),
    ],
    "three heads of a KV head": [Shape(64, 193, last_q=16, heads=3, kv_heads=1, dim=16)],
}  # fmt: skip


def random_kept(given: DeviceCells) -> tuple[Kept, Kept, list[list[Selection]]]:
    """Offsets and columns of every head, as bits, lists and selections: few, many or none."""
    random = np.random.default_rng(3)
    heads, width = given.estimate.queries.shape[2], given.step.tables.width
    bits = np.zeros((2, len(given.cells), heads, width), np.bool_)
    for at, cell in enumerate(given.cells):
        for head in range(heads):
            for kind, density in enumerate([(0.5, 0.1), (0.05, 0.7), (0.3, 0.0), (0.0, 0.2)][head]):
                bits[kind, at, head, : cell.keys.stop] = random.random(cell.keys.stop) < density
    words = torch.from_numpy(np.packbits(bits, axis=-1, bitorder="little").view("<i4").astype(np.int32))
    totals = torch.from_numpy(bits.sum(-1).astype(np.int32))
    indices = torch.zeros(*totals.shape[1:], int(totals[1].max()), dtype=torch.int32)
    selections: list[list[Selection]] = []
    for at in range(len(given.cells)):
        selections.append([])
        for head in range(heads):
            offsets, columns = (np.flatnonzero(bits[kind, at, head]).astype(np.int32) for kind in range(2))
            indices[at, head, : len(columns)] = torch.from_numpy(columns)
            selections[at].append(Selection(to_intervals(offsets), columns))
    masses = torch.zeros(totals.shape[1:])
    return Kept(words[0], None, totals[0], masses), Kept(words[1], indices, totals[1], masses), selections


@pytest.mark.parametrize("name", SHAPES)
def test_shares_of_held_out_rows(name: str) -> None:
    given = device_cells(SHAPES[name], SparseSpec(last_q=SHAPES[name][0].last_q), block=64)
    offsets, columns, selections = random_kept(given)
    step = given.step
    found = held_out_shares(
        given.held_out, step.held_out.positions, offsets, columns, given.keys, step.tables, given.shape
    )
    for at, cell in enumerate(given.cells):
        sample = cell.queries.held_out
        mass = attention(cell, sample)
        expected = [kept_mass(mass[head], cell.plan.start, sample.rows, one) for head, one in enumerate(selections[at])]
        np.testing.assert_allclose(found[at], expected, atol=1e-6)


@pytest.mark.parametrize(("name", "forced"), zip(SHAPES, [(0, 0), (30, 128)], strict=True))
def test_pairs_kept_twice(name: str, forced: tuple[int, int]) -> None:
    given = device_cells(SHAPES[name], SparseSpec(last_q=SHAPES[name][0].last_q), block=64)
    offsets, columns, selections = random_kept(given)
    lse = estimate(given.estimate, given.keys, given.step.tables, given.shape, 2).lse
    done = torch.zeros_like(columns.totals)
    done[:, 0] = 1
    found = overlap(
        given.estimate, lse, offsets, columns, done, given.keys, given.step.tables, given.shape, forced
    ).sum(-1)  # fmt: skip
    for at, cell in enumerate(given.cells):
        mass = attention(cell, cell.queries.estimate)
        keys = np.arange(cell.keys.stop)
        distance = cell.plan.start + np.array(cell.queries.estimate.rows)[:, None] - keys
        for head, one in enumerate(selections[at]):
            by_offset = np.zeros_like(distance, bool)
            for low, high in one.offsets.tolist():
                by_offset |= (distance >= low) & (distance <= high)
            twice = by_offset & np.isin(keys, one.columns) & (keys >= forced[0]) & (distance >= forced[1])
            assert found[at, head] == pytest.approx(0 if head == 0 else mass[head][twice].sum(), abs=1e-5)
