"""Dense attention in one, two and three regions against its definition in float64."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl

from workers.attention.cuda import plan_rows, stage
from workers.bench.cases.paged_cells import CELLS, PagedCell, paged_cell
from workers.kernels.triton.blocks import QuerySides, Target
from workers.kernels.triton.dense_attention import block_keys, dense_attention


def run(cell: PagedCell, target: Target | None = None, head_tiles: torch.Tensor | None = None) -> torch.Tensor:
    q, plan = cell.q, cell.plan
    out = torch.full(q.intra.shape, torch.nan, dtype=q.intra.dtype)
    staged = stage(cell.kv, cell.table, plan.start + plan.length)
    sides = QuerySides(q.intra, q.succ, q.inter)
    dense_attention(sides, plan_rows(plan), staged, cell.scales, out, head_tiles, target)
    return out


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize(("start", "rows", "distance"), CELLS)
def test_rows_of_every_size(start: int, rows: int, distance: int, tma: bool) -> None:
    cell = paged_cell(start, rows, distance, heads=2)
    target = Target(tma, tl.float32, torch.float32)
    torch.testing.assert_close(run(cell, target).double(), cell.reference(), atol=4e-6, rtol=4e-6)


@pytest.mark.parametrize(
    "capability", [(8, 0), (9, 0), (12, 0)], ids=["64 keys a block", "128 keys a block", "32 keys a block"]
)
@pytest.mark.parametrize(("start", "rows", "distance"), [(127, 1, 0), *CELLS[3:]])
def test_caches_in_place(start: int, rows: int, distance: int, capability: tuple[int, int]) -> None:
    """What lies behind the context, and before it, is NaN."""
    cell = paged_cell(start, rows, distance, heads=2, in_order=True)
    staged = stage(cell.kv, cell.table, start + rows)
    assert staged.keys.data_ptr() == cell.kv.keys[0, 32].data_ptr()
    target = Target(capability >= (9, 0), tl.float32, torch.float32, capability)
    torch.testing.assert_close(run(cell, target).double(), cell.reference(), atol=4e-6, rtol=4e-6)


@pytest.mark.parametrize("cache", [torch.int8, torch.float8_e4m3fn, torch.bfloat16], ids=str)
def test_caches_of_other_types(cache: torch.dtype) -> None:
    cell = paged_cell(300, 17, 128, cache=cache, dim=32)
    torch.testing.assert_close(run(cell).double(), cell.reference(), atol=4e-6, rtol=4e-6)


def test_bfloat16_queries() -> None:
    cell = paged_cell(100, 67)
    narrow = PagedCell(cell.plan, cell.q.map(torch.Tensor.bfloat16), cell.k, cell.v, cell.kv, cell.table, cell.scales)
    got = run(narrow)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), narrow.reference(), atol=1.6e-2, rtol=1.6e-2)


def test_blocks_as_wide_as_a_tile() -> None:
    """What Hopper runs: 128 keys a block."""
    assert [block_keys(capability) for capability in ((8, 0), (9, 0), (10, 0))] == [64, 128, 64]
    assert [block_keys(capability) for capability in ((8, 6), (8, 9), (12, 0))] == [32] * 3
    cell = paged_cell(640, 67, 256, heads=2)
    target = Target(True, tl.float32, torch.float32, (9, 0))
    torch.testing.assert_close(run(cell, target).double(), cell.reference(), atol=4e-6, rtol=4e-6)


def test_other_heads_are_left_alone() -> None:
    cell = paged_cell(300, 17, 128)
    got, wanted = run(cell, head_tiles=torch.tensor([64, 0, 128, 0], dtype=torch.int32)), cell.reference()
    assert got[:, [0, 2]].isnan().all()
    torch.testing.assert_close(got[:, [1, 3]].double(), wanted[:, [1, 3]], atol=4e-6, rtol=4e-6)
