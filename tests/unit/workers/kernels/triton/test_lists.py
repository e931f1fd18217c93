"""Lists of a cell: what they say about every tile, against the plan's spelled out keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workers.attention.plan import AttentionPlan, Rotation, Selection
from workers.bench.cases.paged_cells import CELLS, selections
from workers.kernels.triton.lists import BLOCK, CellLists, Rows, block_keys, cell_lists, choose_tiles, most_blocks


def lists_of(heads: list[Selection], stop: int, tile: int) -> CellLists:
    return cell_lists([head.offsets for head in heads], [head.columns for head in heads], stop, tile)


@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize(("start", "rows", "distance"), CELLS)
def test_lists_name_the_keys_of_the_plan(start: int, rows: int, distance: int, tile: int) -> None:
    stop, named = start + rows, selections(start + rows, rows)
    lists = lists_of(list(named.values()), stop, tile)
    plan = AttentionPlan(start, rows, 0, tuple(named.values()), tile, whole_tiles=True)
    bits = np.unpackbits(lists.bitmap.numpy().view(np.uint8), axis=1, bitorder="little").astype(bool)
    for head in range(len(named)):
        blocks = lists.blocks[head, : lists.num_blocks[head]].tolist()
        counts = lists.counts[head, : lists.num_blocks[head]].tolist()
        assert blocks == sorted(blocks, reverse=True)
        assert all(1 <= count <= BLOCK for count in counts)
        distances = [far - at for far, count in zip(blocks, counts, strict=True) for at in range(count)]
        assert sorted(distances) == np.flatnonzero(bits[head]).tolist()
        columns = lists.columns[head, : lists.num_columns[head]].tolist()
        for number, each in enumerate(plan.tile_keys(head)):
            last = start + (number + 1) * tile - 1
            wanted = {last - far for far in distances if 0 <= last - far < stop}
            wanted |= {column for column in columns if column <= last and not bits[head][last - column]}
            assert sorted(each.keys[Rotation.INTRA].tolist()) == sorted(wanted)


@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize(("start", "rows"), [(0, 64), (0, 193), (500, 1), (777, 256)])
def test_heads_with_most_keys_in_blocks_are_dense(start: int, rows: int, tile: int) -> None:
    """The keys of whole tiles count; their number is at hand as a closed form, and here as a sum over tiles."""
    named = selections(start + rows)
    near = {high: Selection(np.array([[0, high]], np.int32), np.empty(0, np.int32)) for high in range(1, 700, 37)}
    heads = [*named.values(), *near.values()]
    lists, own = lists_of(heads, start + rows, tile), Rows(start, rows)
    head_tiles, keys = choose_tiles([lists], own, [1]).head_tiles.tolist(), block_keys(lists, own).tolist()
    for head in range(len(heads)):
        visited = causal = 0
        for last in range(start + tile - 1, start + rows + tile - 1, tile):
            causal += last + 1
            for far, count in zip(lists.blocks[head].tolist(), lists.counts[head].tolist(), strict=True):
                visited += max(0, min(count, last - far + count))
        assert keys[head] == visited
        are_many = lists.num_blocks[head] > most_blocks(own, tile)
        assert head_tiles[head] == (0 if 5 * visited > 3 * causal or are_many else tile)
    assert not head_tiles[0], "everything"
    assert start < tile or head_tiles[1], "nothing but the row's own key"


def test_heads_take_the_tile_with_less_pairs_by_rate() -> None:
    """Scattered offsets take small tiles unless those are much slower; columns cost the same in both."""
    scattered = np.array([[at, at] for at in range(0, 4000, 400)], np.int32)
    none, many = np.empty(0, np.int32), np.arange(0, 4000, 3, dtype=np.int32)
    near = np.array([[0, 1023]], np.int32)
    heads = [
        Selection(scattered, none), Selection(near, none), Selection(scattered, many),
        Selection.everything(4193), Selection(near[:, :1] * [[1, 1]], none),
    ]  # fmt: skip
    large, small = lists_of(heads, 4193, 128), lists_of(heads, 4193, 64)
    rows = Rows(4000, 193)
    chosen = choose_tiles([large, small], rows, [10, 7])
    assert chosen.head_tiles.tolist() == [64, 128, 128, 0, 64]
    assert chosen.order.tolist() == [2, 1, 0, 4, 3], "most work first, dense heads last"
    assert chosen.visited.tolist() == [0, 0, 0, rows.causal_pairs, 0]
    plan = AttentionPlan(4000, 193, heads=tuple(heads))
    assert rows.causal_pairs == plan.causal_pairs
    pairs = [block_keys(one, rows) * one.tile for one in (large, small)]
    assert pairs[0][0] == 2 * pairs[1][0]
    assert choose_tiles([large, small], rows, [10, 5]).head_tiles.tolist() == [128, 128, 128, 0, 128]
    assert choose_tiles([large, small], rows, [1, 1]).head_tiles.tolist()[:2] == [64, 64]
    for one in (large, small):
        assert choose_tiles([one], rows, [3]).head_tiles.tolist() == [one.tile] * 3 + [0, one.tile]


def test_distance_0_must_be_kept() -> None:
    with pytest.raises(ValueError, match=r"selection of head 1: offsets begin with \[\[1, 9\]\]: need distance 0"):
        lists_of([Selection.everything(9), Selection(np.array([[1, 9]], np.int32), np.empty(0, np.int32))], 100, 64)


def test_lists_have_room_for_the_longest_head() -> None:
    lists = lists_of(list(selections(300).values()), 300, 128)
    assert lists.blocks.shape == lists.counts.shape == (6, int(lists.num_blocks.max()))
    assert lists.columns.shape == (6, 300)
    assert lists.bitmap.dtype == torch.int32
    assert lists.bitmap.shape == (6, -(-428 // 32))
