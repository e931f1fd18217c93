"""Block tables against position-by-position arithmetic, and the cache they point into."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.kv_cache import BlockTable, PagedKV, PlanMismatch, SlotRun


def slots(table: BlockTable, start: int, stop: int) -> list[int]:
    return [run.first + i for run in table.runs(start, stop) for i in range(run.length)]


@settings(max_examples=150, deadline=None)
@given(
    page=st.sampled_from([1, 2, 7, 16, 64]),
    blocks=st.lists(st.integers(0, 40), min_size=1, max_size=12, unique=True),
    cuts=st.lists(st.integers(0, 12), max_size=4),
    data=st.data(),
)
def test_runs_are_the_slots_of_every_position(page: int, blocks: list[int], cuts: list[int], data: st.DataObject):
    table = BlockTable(page)
    edges = sorted({0, len(blocks), *(cut for cut in cuts if cut < len(blocks))})
    for low, high in itertools.pairwise(edges):
        table.append(blocks[low:high])
    assert table.num_blocks == len(blocks)
    total = len(blocks) * page
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    expected = [blocks[p // page] * page + p % page for p in range(start, stop)]
    assert slots(table, start, stop) == expected
    runs = table.runs(start, stop)
    assert all(run.length > 0 for run in runs)
    assert all(a.first + a.length != b.first for a, b in itertools.pairwise(runs)), "neighbours are one run"


@pytest.mark.parametrize("page", [1, 16, 64])
def test_neighbouring_blocks_are_one_run(page: int):
    table = BlockTable(page)
    table.append([5, 6, 7])
    table.append([8, 3])
    assert table.runs(0, 5 * page) == [SlotRun(5 * page, 4 * page), SlotRun(3 * page, page)]
    assert table.runs(4 * page, 4 * page) == []


@pytest.mark.parametrize(("stop", "ok"), [(31, True), (32, True), (33, False)])
def test_positions_beyond_the_table_are_refused(stop: int, ok: bool):
    table = BlockTable(16)
    table.append([0, 1])
    if ok:
        assert sum(run.length for run in table.runs(0, stop)) == stop
    else:
        with pytest.raises(PlanMismatch, match="position 32 lies beyond the 2 blocks"):
            table.runs(0, stop)


@pytest.mark.parametrize("page", [1, 16])
def test_write_puts_rows_where_the_table_says(page: int):
    kv = PagedKV(layers=2, kv_heads=3, head_dim=4, num_blocks=9, page_size=page, dtype=torch.float32)
    kv.keys(1).fill_(torch.nan)
    kv.values(1).fill_(torch.nan)
    table = BlockTable(page)
    table.append([7, 2, 3])
    length = 3 * page
    keys, values = torch.randn(2, length, 3, 4)
    kv.write(1, table.runs(0, length), keys, values)
    where = slots(table, 0, length)
    assert torch.equal(kv.keys(1)[:, where].transpose(0, 1), keys)
    assert torch.equal(kv.values(1)[:, where].transpose(0, 1), values)
    untouched = sorted(set(range(9 * page)) - set(where))
    assert kv.keys(1)[:, untouched].isnan().all()
    assert kv.values(1)[:, untouched].isnan().all()


@pytest.mark.parametrize("length", [1, 16])
def test_a_block_outside_the_cache_is_refused(length: int):
    kv = PagedKV(1, 2, 4, num_blocks=4, page_size=16, dtype=torch.float32)
    table = BlockTable(16)
    table.append([4])
    rows = torch.zeros(length, 2, 4)
    with pytest.raises(PlanMismatch, match=f"slot {63 + length} of a plan lies outside the cache of 64 slots"):
        kv.write(0, table.runs(0, length), rows, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_bytes_is_what_the_cache_allocates(dtype: torch.dtype):
    kv = PagedKV(3, 2, 8, num_blocks=5, page_size=16, dtype=dtype)
    allocated = kv.keys(0).untyped_storage().nbytes()
    assert allocated == 5 * PagedKV.block_bytes(3, 2, 8, 16, dtype)


def test_an_empty_cache_is_refused():
    with pytest.raises(ValueError, match="num_blocks: 0"):
        PagedKV(1, 1, 1, 0, 16, torch.float32)
