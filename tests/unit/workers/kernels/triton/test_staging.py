"""Staged rows against the pages and scales they come from."""

from __future__ import annotations

import pytest
import torch

from workers.bench.cases.paged_cells import CACHES, PagedCell, paged_cell
from workers.kernels.triton.lists import CellLists
from workers.kernels.triton.staging import (
    MOST_KEYS,
    Columns,
    Staged,
    column_bytes,
    column_room,
    gather_columns,
    in_place,
    rows_per_head,
    stage,
    staged_bytes,
)

SIZES = (1, 17, 128, 193)


def staged_rows(cell: PagedCell, stop: int, dtype: torch.dtype = torch.float32) -> Staged:
    kv = cell.kv
    slots = cell.table.slots_on(torch.device("cpu"))
    sides = kv.keys, kv.values, kv.key_scales, kv.value_scales
    return stage(*sides, slots, cell.table.page_size, stop, dtype=dtype)


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("stop", SIZES)
def test_rows_are_in_order_of_position(stop: int, cache: torch.dtype) -> None:
    cell = paged_cell(0, 193, cache=cache, page_size=(1, 16, 64)[stop % 3])
    staged = staged_rows(cell, stop)
    for got, wanted in zip(staged.by_head(), (cell.k, cell.v), strict=True):
        assert torch.equal(got, wanted[:stop].transpose(0, 1))
    for side in (staged.keys, staged.values):
        assert not side.view(2, staged.head_rows, 16)[:, stop:].any(), "rows behind a short context are multiplied by 0"


@pytest.mark.parametrize("cache", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_bfloat16_rows(cache: torch.dtype) -> None:
    cell = paged_cell(0, 67, cache=cache)
    keys, _ = staged_rows(cell, 67, torch.bfloat16).by_head()
    error = (keys.float() - cell.k.transpose(0, 1)).abs()
    assert (error <= cell.k.transpose(0, 1).abs() * 2**-7).all(), "the interpreter truncates"


def test_blocks_of_keys_lie_in_the_context_or_in_rows_of_zeros() -> None:
    empty = torch.empty(0, 16)
    for stop in SIZES:
        rows = rows_per_head(stop)
        for keys in (64, MOST_KEYS):
            last = Staged(empty, empty, 2, rows, stop).last_block(keys)
            assert last == max(0, stop - keys)
            assert last + keys <= (stop if stop >= keys else rows)
    assert [rows_per_head(stop) for stop in (1, 128, 129, 193)] == [128, 128, 192, 256]


def test_scratch_memory() -> None:
    cell = paged_cell(0, 193)
    for stop in SIZES:
        staged = staged_rows(cell, stop, torch.bfloat16)
        assert staged.keys.nbytes + staged.values.nbytes == staged_bytes(stop, 2, 16)
    columns = Columns.empty(3, 100, staged.keys)
    assert columns.keys.nbytes + columns.values.nbytes == 3 * column_bytes(100, 16)
    million = staged_bytes(1 << 20, 4, 128)
    assert 4 * (1 << 20) * 4 * 128 <= million < 1.001 * 4 * (1 << 20) * 4 * 128


def test_pages_must_reach_the_context() -> None:
    with pytest.raises(ValueError, match="positions before 209 of 13 pages of 16"):
        staged_rows(paged_cell(0, 193), 209)


def test_columns_are_gathered_for_heads_of_one_tile() -> None:
    cell, generator = paged_cell(0, 193), torch.Generator().manual_seed(1)
    assert column_room(100) == 128
    staged = staged_rows(cell, 193)
    columns = Columns.empty(4, 100, staged.keys)
    columns.keys.fill_(torch.nan)
    columns.values.fill_(torch.nan)
    picked = torch.stack([torch.randperm(193, generator=generator)[:100].sort().values for _ in range(4)]).int()
    counts, order = torch.tensor([64, 0, 65, 100], dtype=torch.int32), torch.tensor([2, 1, 3, 0], dtype=torch.int32)
    none = torch.empty(0)
    lists = CellLists(none, none, none, none, picked, counts, tile=64)
    gather_columns(columns, lists, staged, order, torch.tensor([128, 64, 64, 64], dtype=torch.int32), group=2)
    for side, rows in ((columns.keys, cell.k), (columns.values, cell.v)):
        for rank, head in enumerate(order.tolist()):
            got, count = side[rank * 128 : (rank + 1) * 128], int(counts[head]) if head else 0
            assert torch.equal(got[:count], rows[picked[head, :count].long(), head // 2])
            whole = -(-count // 64) * 64
            assert not got[count:whole].any()
            assert got[whole:].isnan().all(), "blocks without columns, and other heads, are not written"


def test_a_cache_in_place() -> None:
    cell = paged_cell(0, 193, in_order=True)
    kv, (run,) = cell.kv, cell.table.runs(0, 193)
    staged = in_place(kv.keys, kv.values, run.first, 193)
    assert staged.head_rows == kv.keys.shape[1]
    assert len(staged.keys) == kv.keys.shape[1] + 193, "nothing behind the context of the last head"
    for got, wanted in zip(staged.by_head(), (cell.k, cell.v), strict=True):
        assert torch.equal(got, wanted.transpose(0, 1))
    assert torch.equal(staged.values[staged.head_rows + 5], cell.v[5, 1])
    for stop in (127, kv.keys.shape[1]):
        with pytest.raises(ValueError, match=f"positions before {stop} from slot 32 of 256: need 128 or more"):
            in_place(kv.keys, kv.values, run.first, stop)
