"""Entries of every tile against the plan's keys, region by region."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workers.attention.cuda import plan_lists, plan_rows
from workers.attention.plan import AttentionPlan, Rotation, Selection
from workers.bench.cases.paged_cells import CELLS, selections
from workers.kernels.triton.entries import Entries, entry_bytes, entry_room, fill_entries
from workers.kernels.triton.staging import Staged, column_room, rows_per_head

HEADS, GROUP = 6, 3
ORDER = torch.tensor([5, 0, 3, 4, 1, 2], dtype=torch.int32)


def staged_room(stop: int) -> Staged:
    """Staged rows without the rows, which entries do not read."""
    empty = torch.empty(0, 16)
    return Staged(empty, empty, HEADS // GROUP, rows_per_head(stop), stop)


def rows_of(made: Entries, rank: int, tile: int, part: int) -> list[int]:
    """The rows that the entries of one part name: the blocks of a region, or its columns."""
    first, last = made.ends[rank, tile, part : part + 2].tolist()
    rows = []
    for entry in range(first, last):
        row, *words = made.entries[rank, tile, :, entry].tolist()
        assert any(words), "an entry without bits"
        bits = [(words[bit // 32] >> (bit % 32)) & 1 for bit in range(64)]
        rows += [row + bit for bit in range(64) if bits[bit]]
    return rows


@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize(("start", "rows", "distance"), CELLS)
def test_entries_name_the_keys_before_the_tile(start: int, rows: int, distance: int, tile: int) -> None:
    stop = start + rows
    plan = AttentionPlan(start, rows, distance, tuple(selections(stop, rows).values()), tile, whole_tiles=True)
    lists, head_tiles = plan_lists(plan, tile), torch.full((HEADS,), tile, dtype=torch.int32)
    head_tiles[2], head_tiles[4] = 0, 192 - tile  # heads that other kernels compute
    room, visited = column_room(lists.columns.shape[1]), torch.zeros(HEADS, dtype=torch.int64)
    staged = staged_room(stop)
    made = fill_entries(lists, plan_rows(plan), staged, ORDER, head_tiles, visited, GROUP)
    for rank, head in enumerate(ORDER.tolist()):
        if head_tiles[head] != tile:
            continue
        for number, each in enumerate(plan.tile_keys(head)):
            for region, rotation in enumerate((Rotation.INTER, Rotation.SUCC, Rotation.INTRA)):
                got = [row - head // GROUP * staged.head_rows for row in rows_of(made, rank, number, 2 * region)]
                assert all(0 <= key < stop for key in got)
                places = [row - rank * room for row in rows_of(made, rank, number, 2 * region + 1)]
                assert all(0 <= at < int(lists.num_columns[head]) for at in places)
                got += lists.columns[head, places].tolist()
                wanted = [key for key in each.keys.get(rotation, []) if key < start + number * tile]
                assert sorted(got) == sorted(wanted)
            begin, last = made.entries[rank, number, 0, : made.ends[rank, number, 1]], staged.last_block(64)
            assert (begin - head // GROUP * staged.head_rows <= last).all(), "blocks lie in the context"
        assert made.ends[rank].max() <= entry_room(lists)
    own = (head_tiles == tile).tolist()
    assert visited.tolist() == [plan.visited_pairs(head) if own[head] else 0 for head in range(HEADS)]
    assert entry_bytes(lists, plan_rows(plan)) * HEADS == made.entries.nbytes + made.ends.nbytes


def test_both_ends_of_the_masks() -> None:
    """A block of 64 keys has all bits, one of 32 those of a word; a region's border cuts a block in two."""
    first_row_sees_all = Selection(np.array([[0, 384]], np.int32), np.empty(0, np.int32))
    plan = AttentionPlan(384, 64, 160, (first_row_sees_all,) * HEADS, 64, whole_tiles=True)
    lists = plan_lists(plan, 64)
    made = fill_entries(
        lists, plan_rows(plan), staged_room(448), ORDER, torch.full((HEADS,), 64, dtype=torch.int32),
        torch.zeros(HEADS, dtype=torch.int64), GROUP,
    )  # fmt: skip
    count = int(made.ends[0, 0, 6])
    rows, low, high = made.entries[1, 0, :, :count].tolist()
    assert rows == [0, 64, 128, 160, 192, 256, 320]
    assert low == [-1] * count
    assert high == [-1, -1, 0, 0, -1, -1, -1]
    assert made.ends[1, 0].tolist() == [0, 3, 3, 6, 6, 7, 7]


def test_blocks_that_would_reach_behind_the_context_begin_before_it() -> None:
    """Keys 100 to 128 of 129 are the last bits of the block that begins at 65."""
    heads = (Selection(np.array([[0, 28]], np.int32), np.empty(0, np.int32)),) * HEADS
    plan = AttentionPlan(128, 1, heads=heads, whole_tiles=True)
    made = fill_entries(
        plan_lists(plan, 64), plan_rows(plan), staged_room(129), ORDER, torch.full((HEADS,), 64, dtype=torch.int32),
        torch.zeros(HEADS, dtype=torch.int64), GROUP,
    )  # fmt: skip
    assert made.ends[1, 0].tolist() == [0, 0, 0, 0, 0, 1, 1]
    row, low, high = made.entries[1, 0, :, 0].tolist()
    bits = (low & 0xFFFFFFFF) | (high & 0xFFFFFFFF) << 32
    assert [row + bit for bit in range(64) if bits >> bit & 1] == list(range(100, 128))
    assert row == 65
