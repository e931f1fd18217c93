"""The search for adaptive budgets against the search in NumPy, which sorts: the same lists."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from workers.attention.plan import Selection
from workers.kernels.triton.sparse.adaptive import Search
from workers.kernels.triton.sparse.cells import CellSpan, CellTables, TileShape
from workers.kernels.triton.sparse.selection import Kept, compact_proposal
from workers.sparse.adaptive import AdaptiveSearch, PatchedArray
from workers.sparse.selection import FORCED_COLUMNS, FloatArray, offset_mask

FORCED_OFFSETS = 128  # whole groups
STEPS = 12
Measure = Callable[[FloatArray, FloatArray, Selection], float]


def overlapping(columns: FloatArray, offsets: FloatArray, one: Selection) -> float:
    """The mass that a selection keeps when 70 % of every column is kept by offsets too."""
    return float(0.3 * columns[one.columns].sum() + offsets[offset_mask(one, len(offsets))].sum())


def on_the_host(columns: FloatArray, offsets: FloatArray, base: float, goal: float) -> Selection:
    nothing = np.zeros(0, np.int32), np.zeros(0, np.float32)
    search = AdaptiveSearch(base, PatchedArray(columns, *nothing), PatchedArray(offsets, *nothing), goal)
    while not search.done:
        search.update(base + overlapping(columns, offsets, search.selection))
    return search.selection


def selection_of(columns: Kept, offsets: Kept, cell: int, stop: int) -> Selection:
    assert columns.indices is not None
    bits = np.unpackbits(offsets.words[cell, 0].numpy().view(np.uint8), bitorder="little")
    assert bits.sum() == offsets.totals[cell, 0]
    assert not bits[stop:].any()
    steps = np.diff(bits.astype(np.int8), prepend=0, append=0)
    intervals = np.stack([np.flatnonzero(steps == 1), np.flatnonzero(steps == -1) - 1], axis=1).astype(np.int32)
    return Selection(intervals, columns.indices[cell, 0, : columns.totals[cell, 0]].numpy())


@pytest.mark.parametrize(("kind", "stop"), [("exponential", 700), ("ties", 193), ("ties", 2017)])
def test_lists_equal_those_of_the_sorted_search(kind: str, stop: int) -> None:
    random = np.random.default_rng(stop)
    parts = (0.0, 0.02, 0.6, 1.0)  # of all mass, a cell with one head each
    sizes = 2, len(parts), stop
    values = random.integers(0, 6, sizes) / 4 if kind == "ties" else random.exponential(size=sizes)
    sums = values.astype(np.float32)
    sums[0, :, :FORCED_COLUMNS] = sums[1, :, :FORCED_OFFSETS] = 0
    tables = CellTables.make([CellSpan(0, stop, ((0, stop, 0),))] * len(parts), 16, TileShape(), "cpu")
    padded = torch.zeros(2, len(parts), 1, tables.width)
    padded[:, :, 0, :stop] = torch.from_numpy(sums)
    base = 5.0
    num_rows = torch.from_numpy(sums[0].sum(axis=1, dtype=np.float64)) + base
    most = [0.3 * float(columns.sum()) + float(offsets.sum()) for columns, offsets in zip(*sums, strict=True)]
    goals = [base + part * mass for part, mass in zip(parts, most, strict=True)]
    search = Search.begin(padded[0], padded[1], num_rows, torch.tensor(goals, dtype=torch.float64), tables)
    columns: Kept | None = None
    offsets: Kept | None = None
    kept, found = search.base.clone(), [Selection.everything(1)] * len(parts)
    for step in range(STEPS):
        search.propose(kept, step, False, block=2048)
        if search.done.all():
            break
        columns = compact_proposal(
            columns, padded[0], (search.thresholds, search.quotas), search.done, FORCED_COLUMNS, tables, 2048
        )
        offsets = search.kept_offsets(offsets, FORCED_OFFSETS, block=32)
        for cell in np.flatnonzero(search.done[:, 0].numpy() == 0).tolist():
            found[cell] = selection_of(columns, offsets, cell, stop)
            kept[cell, 0] = search.base[cell, 0] + overlapping(sums[0, cell], sums[1, cell], found[cell])
    assert search.done.all()
    assert columns is not None
    assert offsets is not None
    for cell, goal in enumerate(goals):
        expected = on_the_host(sums[0, cell], sums[1, cell], float(search.base[cell, 0]), goal)
        one = selection_of(columns, offsets, cell, stop)
        assert one.offsets.tolist() == found[cell].offsets.tolist() == expected.offsets.tolist()
        assert one.columns.tolist() == found[cell].columns.tolist() == expected.columns.tolist()


def test_the_last_proposal_is_everything() -> None:
    tables = CellTables.make([CellSpan(0, 193, ((0, 193, 0),))], 16, TileShape(), "cpu")
    sums = torch.zeros(1, 1, 256)
    sums[..., :193] = 0.001
    rows = torch.tensor([1.0], dtype=torch.float64)
    search = Search.begin(sums, sums, rows, rows, tables)
    search.propose(search.base, 0, True, block=512)
    columns = compact_proposal(None, sums, (search.thresholds, search.quotas), search.done, FORCED_COLUMNS, tables, 512)
    assert columns.totals.tolist() == [[193]]
    assert search.kept_offsets(None, FORCED_OFFSETS, block=32).totals.tolist() == [[193]]
