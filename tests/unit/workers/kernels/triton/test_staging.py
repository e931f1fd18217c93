"""Staged rows against the pages and scales they come from."""

from __future__ import annotations

import pytest
import torch

from workers.bench.cases.paged_cells import CACHES, PagedCell, paged_cell
from workers.kernels.triton.staging import Staged, column_room, gather_columns, rows_per_head, stage, staged_bytes

SIZES = (1, 17, 128, 193)


def staged_rows(cell: PagedCell, stop: int, column_rows: int = 0, dtype: torch.dtype = torch.float32) -> Staged:
    kv = cell.kv
    slots = cell.table.slots_on(torch.device("cpu"))
    sides = kv.keys, kv.values, kv.key_scales, kv.value_scales
    return stage(*sides, slots, cell.table.page_size, stop, column_rows=column_rows, dtype=dtype)


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("stop", SIZES)
def test_rows_are_in_order_of_position(stop: int, cache: torch.dtype) -> None:
    cell = paged_cell(0, 193, cache=cache, page_size=(1, 16, 64)[stop % 3])
    staged = staged_rows(cell, stop)
    for got, wanted in zip(staged.by_head(0, stop), (cell.k, cell.v), strict=True):
        assert torch.equal(got, wanted[:stop].transpose(0, 1))
    for side in staged.by_head(stop, staged.head_rows):
        assert not side.any(), "rows behind the context are multiplied by 0"


@pytest.mark.parametrize("cache", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_bfloat16_rows(cache: torch.dtype) -> None:
    cell = paged_cell(0, 67, cache=cache)
    keys, _ = staged_rows(cell, 67, dtype=torch.bfloat16).by_head(0, 67)
    error = (keys.float() - cell.k.transpose(0, 1)).abs()
    assert (error <= cell.k.transpose(0, 1).abs() * 2**-7).all(), "the interpreter truncates"


def test_a_tile_may_reach_behind_the_context() -> None:
    for stop in SIZES:
        assert rows_per_head(stop) >= stop + 128
        assert rows_per_head(stop) % 128 == 0


def test_scratch_memory() -> None:
    cell = paged_cell(0, 193)
    staged = staged_rows(cell, 193, 640, torch.bfloat16)
    assert staged.keys.nbytes + staged.values.nbytes == staged_bytes(193, 2, 16, 640)
    million = staged_bytes(1 << 20, 4, 128)
    assert 4 * (1 << 20) * 4 * 128 <= million < 1.001 * 4 * (1 << 20) * 4 * 128


def test_pages_must_reach_the_context() -> None:
    with pytest.raises(ValueError, match="positions before 209 of 13 pages of 16"):
        staged_rows(paged_cell(0, 193), 209)


def test_columns_lie_behind_the_rows() -> None:
    cell, capacity = paged_cell(0, 193), 100
    room, generator = column_room(capacity), torch.Generator().manual_seed(1)
    assert room == 128
    staged = staged_rows(cell, 193, 3 * room)
    staged.keys[-3 * room :], staged.values[-3 * room :] = torch.nan, torch.nan
    columns = torch.stack([torch.randperm(193, generator=generator)[:capacity].sort().values for _ in range(4)]).int()
    counts, order = torch.tensor([64, 0, 65, 100], dtype=torch.int32), torch.tensor([2, 1, 3], dtype=torch.int32)
    gather_columns(staged, columns, counts, order, group=2)
    for side, rows in ((staged.keys, cell.k), (staged.values, cell.v)):
        for rank, head in enumerate(order.tolist()):
            got, count = side[-3 * room :][rank * room : (rank + 1) * room], int(counts[head])
            assert torch.equal(got[:count], rows[columns[head, :count].long(), head // 2])
            whole = -(-count // 64) * 64
            assert not got[count:whole].any()
            assert got[whole:].isnan().all(), "blocks without columns are not written"
