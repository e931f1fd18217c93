"""Vertical-slash attention of cells against its definition in float64, over the pairs of the plan's twin."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl

from workers.attention.cuda import plan_lists, plan_rows, stage
from workers.attention.plan import AttentionPlan
from workers.bench.cases.paged_cells import CELLS, paged_cell, selections
from workers.kernels.triton.blocks import QuerySides, Target
from workers.kernels.triton.entries import fill_entries
from workers.kernels.triton.sparse_attention import sparse_attention
from workers.kernels.triton.staging import Columns, gather_columns

CACHES = {640: torch.int8, 833: torch.float8_e4m3fn}  # by start


@pytest.mark.parametrize(
    ("start", "rows", "distance", "tile"),
    [(*cell, (64, 128)[number % 2]) for number, cell in enumerate(CELLS)] + [(749, 1, 250, 128), (833, 17, 320, 64)],
)
def test_selections_of_every_kind(start: int, rows: int, distance: int, tile: int) -> None:
    """A head a kind; the last one has other tiles and must be left alone. Tiles of 64 rows load by descriptors.

    Caches in float32 are read in place where they are long enough.
    """
    chosen = tuple(selections(start + rows, rows + 1).values())
    heads = len(chosen)
    cache = CACHES.get(start, torch.float32)
    cell = paged_cell(start, rows, distance, heads=heads, selections=chosen, cache=cache, in_order=True)
    plan = AttentionPlan(start, rows, distance, chosen, tile, whole_tiles=True)
    lists, head_tiles = plan_lists(plan, tile), torch.tensor([tile] * (heads - 1) + [192 - tile], dtype=torch.int32)
    order = torch.tensor([3, 5, 0, 4, 2, 1], dtype=torch.int32)
    staged = stage(cell.kv, cell.table, start + rows)
    is_in_place = staged.keys.data_ptr() == cell.kv.keys[0, 32].data_ptr()
    assert is_in_place == (cache == torch.float32 and start + rows >= 128)
    columns, visited = Columns.empty(heads, start + rows, staged.keys), torch.zeros(heads, dtype=torch.int64)
    entries = fill_entries(lists, plan_rows(plan), staged, order, head_tiles, visited, group=3)
    gather_columns(columns, lists, staged, order, head_tiles, group=3)
    out = torch.full((rows, heads, 16), torch.nan)
    sides, target = QuerySides(cell.q.intra, cell.q.succ, cell.q.inter), Target(tile == 64, tl.float32, torch.float32)
    sparse_attention(
        sides, plan_rows(plan), staged, columns, cell.scales, order, head_tiles, entries, tile, out, target
    )
    assert out[:, -1].isnan().all()
    torch.testing.assert_close(out[:, :-1].double(), cell.reference(plan)[:, :-1], atol=4e-6, rtol=4e-6)
    assert visited.tolist()[:-1] == [plan.visited_pairs(head) for head in range(heads - 1)]
