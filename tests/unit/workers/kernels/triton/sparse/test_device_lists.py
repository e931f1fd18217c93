"""Lists made on the device against the ones made in NumPy: the same blocks, bitmaps and columns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workers.attention.plan import Selection
from workers.kernels.triton.lists import cell_lists
from workers.kernels.triton.sparse.cells import CellSpan, CellTables, TileShape
from workers.kernels.triton.sparse.device_lists import make_lists
from workers.kernels.triton.sparse.selection import Kept
from workers.sparse.selection import to_intervals

STOPS = (67, 321, 1193)
DENSITIES = (0.002, 0.02, 0.5, 1.0, 0.01)  # of offsets, a head each
DENSE = 4  # this head falls back
COLUMNS = 70


@pytest.mark.parametrize("tile", [64, 128])
def test_lists_equal_those_made_on_the_host(tile: int) -> None:
    random = np.random.default_rng(tile)
    tables = CellTables.make([CellSpan(0, stop, ((0, stop, 0),)) for stop in STOPS], 16, TileShape(), "cpu")
    sizes = len(STOPS), len(DENSITIES)
    bits, columns = np.zeros((*sizes, tables.width), np.bool_), np.zeros((*sizes, COLUMNS), np.int32)
    totals, dense = np.zeros((2, *sizes), np.int32), torch.zeros(sizes, dtype=torch.int32)
    dense[:, DENSE] = 1
    selections: dict[tuple[int, int], Selection] = {}
    for at, stop in enumerate(STOPS):
        for head, density in enumerate(DENSITIES):
            kept = (random.random(stop) < density) | (np.arange(stop) < [1, 100, 1, 1, 30][head])
            chosen = np.flatnonzero(random.random(stop) < 0.1).astype(np.int32)[:COLUMNS]
            bits[at, head, :stop] = kept
            columns[at, head, : len(chosen)] = chosen
            totals[:, at, head] = kept.sum(), len(chosen)
            one = Selection(to_intervals(np.flatnonzero(kept).astype(np.int32)), chosen)
            selections[at, head] = Selection.everything(stop) if kept.all() or head == DENSE else one
    words = torch.from_numpy(np.packbits(bits, axis=-1, bitorder="little").view("<i4").astype(np.int32))
    num_offsets, num_columns = (torch.from_numpy(one) for one in totals)
    masses = torch.zeros(sizes)
    found = make_lists(
        Kept(words, None, num_offsets, masses), Kept(words, torch.from_numpy(columns), num_columns, masses), dense,
        tables, tile, block=256,
    )  # fmt: skip
    for at, stop in enumerate(STOPS):
        own = [selections[at, head] for head in range(len(DENSITIES))]
        expected = cell_lists([one.offsets for one in own], [one.columns for one in own], stop, tile)
        lists = found[at]
        assert lists.tile == tile
        assert torch.equal(lists.num_blocks, expected.num_blocks)
        assert torch.equal(lists.num_columns, expected.num_columns)
        assert lists.bitmap.shape[1] * 32 >= stop + tile
        width = min(lists.bitmap.shape[1], expected.bitmap.shape[1])
        assert torch.equal(lists.bitmap[:, :width], expected.bitmap[:, :width])
        assert not lists.bitmap[:, width:].any()
        for head, (blocks, chosen) in enumerate(zip(expected.num_blocks, expected.num_columns, strict=True)):
            assert torch.equal(lists.blocks[head, :blocks], expected.blocks[head, :blocks])
            assert torch.equal(lists.counts[head, :blocks], expected.counts[head, :blocks])
            assert torch.equal(lists.columns[head, :chosen], expected.columns[head, :chosen])
