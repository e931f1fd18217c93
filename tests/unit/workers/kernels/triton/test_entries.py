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


def staged_room(stop: int, columns: int) -> Staged:
    """Staged rows without the rows, which entries do not read."""
    rows = rows_per_head(stop)
    empty = torch.empty(0, 16)
    return Staged(empty, empty, HEADS // GROUP, rows, HEADS * columns, stop)


def keys_of(made: Entries, rank: int, tile: int, region: int) -> list[int]:
    """The rows that the entries of one region name."""
    first, last = made.ends[rank, tile, region : region + 2].tolist()
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
    lists, dense = plan_lists(plan, tile), torch.zeros(HEADS, dtype=torch.bool)
    dense[2] = True
    room, visited = column_room(lists.columns.shape[1]), torch.full((HEADS, -(-rows // tile)), -1)
    staged = staged_room(stop, room)
    made = fill_entries(lists, plan_rows(plan), staged, ORDER, dense, visited, GROUP)
    first_column = staged.kv_heads * staged.head_rows
    for rank, head in enumerate(ORDER.tolist()):
        for number, each in enumerate(plan.tile_keys(head)):
            if dense[head]:
                assert not made.ends[rank, number].any()
                continue
            for region, rotation in enumerate((Rotation.INTER, Rotation.SUCC, Rotation.INTRA)):
                got = []
                for row in keys_of(made, rank, number, region):
                    at = row - first_column - rank * room
                    is_column = 0 <= at < int(lists.num_columns[head])
                    assert is_column or head // GROUP * staged.head_rows <= row < first_column
                    got.append(int(lists.columns[head, at]) if is_column else row - head // GROUP * staged.head_rows)
                wanted = [key for key in each.keys.get(rotation, []) if key < start + number * tile]
                assert sorted(got) == sorted(wanted)
    pairs = visited.sum(dim=1).tolist()
    assert pairs == [plan.causal_pairs if dense[head] else plan.visited_pairs(head) for head in range(HEADS)]
    assert made.ends.max() <= entry_room(lists)
    assert entry_bytes(lists, plan_rows(plan)) * HEADS == made.entries.nbytes + made.ends.nbytes


def test_both_ends_of_the_masks() -> None:
    """A block of 64 keys has all bits, one of 32 those of a word; a region's border cuts a block in two."""
    first_row_sees_all = Selection(np.array([[0, 384]], np.int32), np.empty(0, np.int32))
    plan = AttentionPlan(384, 64, 160, (first_row_sees_all,) * HEADS, 64, whole_tiles=True)
    lists = plan_lists(plan, 64)
    made = fill_entries(
        lists, plan_rows(plan), staged_room(448, 64), ORDER, torch.zeros(HEADS, dtype=torch.bool),
        torch.zeros(HEADS, 1, dtype=torch.int64), GROUP,
    )  # fmt: skip
    count = int(made.ends[0, 0, 3])
    rows, low, high = made.entries[1, 0, :, :count].tolist()
    assert rows == [0, 64, 128, 160, 192, 256, 320]
    assert low == [-1] * count
    assert high == [-1, -1, 0, 0, -1, -1, -1]
    assert made.ends[1, 0].tolist() == [0, 3, 6, 7]
