"""The choice of every head's tiles on the device: `lists.choose_tiles` in two launches a cell.

Legend: `H` query heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from workers.kernels.triton import lists as cell_lists
from workers.kernels.triton.lists import CellLists, Choice, Rows, most_blocks

_SHARE, _WHOLE = (tl.constexpr(part) for part in cell_lists.DENSE_SHARE)
_BLOCK = 256  # key blocks that are read at a time


@triton.jit
def _block_keys(
    far: tl.tensor, counts: tl.tensor, number: tl.tensor, start: tl.tensor, length: tl.tensor, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the keys that the blocks of a head have in all tiles of the cell, as `lists.block_keys`."""
    tiles, first_last = (length + TILE - 1) // TILE, start + TILE - 1
    keys = tl.zeros([BLOCK], tl.int64)
    for begin in range(0, number, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        distance = tl.load(far + at, mask=at < number, other=0)
        count = tl.load(counts + at, mask=at < number, other=0)
        before = (tl.maximum(distance - first_last, 0) + TILE - 1) // TILE
        reaching = tl.maximum(first_last + (before - 1) * TILE - distance + count, 0)
        reaching = tl.where((before > 0) & (before <= tiles), reaching, 0)
        keys += tl.maximum(tiles - before, 0).to(tl.int64) * count + reaching
    return tl.sum(keys, 0)


@triton.jit(
    do_not_specialize=[
        "first_stride",
        "second_stride",
        "start",
        "length",
        "first_most",
        "second_most",
        "rate",
        "other",
    ],
    do_not_specialize_on_alignment=[
        "first_blocks",
        "first_counts",
        "first_numbers",
        "second_blocks",
        "second_counts",
        "second_numbers",
        "num_columns",
    ],
)
def weigh_kernel(
    head_tiles: tl.tensor, work: tl.tensor, visited: tl.tensor, first_blocks: tl.tensor, first_counts: tl.tensor,
    first_numbers: tl.tensor, first_stride: tl.tensor, second_blocks: tl.tensor, second_counts: tl.tensor,
    second_numbers: tl.tensor, second_stride: tl.tensor, num_columns: tl.tensor, start: tl.tensor, length: tl.tensor,
    first_most: tl.tensor, second_most: tl.tensor, rate: tl.tensor, other: tl.tensor, FIRST: tl.constexpr,
    SECOND: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Choose the tiles of head `program_id(0)`; `work` `[H]` int64 is comparable between heads, -1 for dense ones."""
    head = tl.program_id(0)
    at = head.to(tl.int64)
    columns = tl.load(num_columns + head).to(tl.int64)
    number = tl.load(first_numbers + head)
    keys = _block_keys(
        first_blocks + at * first_stride, first_counts + at * first_stride, number, start, length, FIRST, BLOCK,
    )  # fmt: skip
    tiles = (length + FIRST - 1) // FIRST
    least = (keys + tiles * columns) * FIRST * other
    causal = tiles.to(tl.int64) * (start + FIRST) + tiles.to(tl.int64) * (tiles - 1) // 2 * FIRST
    is_dense, tile = (keys * _WHOLE > causal * _SHARE) | (number > first_most), head * 0 + FIRST
    if SECOND != FIRST:
        number = tl.load(second_numbers + head)
        keys = _block_keys(
            second_blocks + at * second_stride, second_counts + at * second_stride, number, start, length, SECOND,
            BLOCK,
        )  # fmt: skip
        tiles = (length + SECOND - 1) // SECOND
        second = (keys + tiles * columns) * SECOND * rate
        causal = tiles.to(tl.int64) * (start + SECOND) + tiles.to(tl.int64) * (tiles - 1) // 2 * SECOND
        is_many = (keys * _WHOLE > causal * _SHARE) | (number > second_most)
        is_dense = tl.where(second < least, is_many, is_dense)
        tile = tl.where(second < least, SECOND, FIRST)
        least = tl.minimum(least, second)
    pairs = length.to(tl.int64) * (start + 1) + length.to(tl.int64) * (length - 1) // 2
    tl.store(head_tiles + head, tl.where(is_dense, 0, tile))
    tl.store(work + head, tl.where(is_dense, -1, least))
    tl.store(visited + head, tl.where(is_dense, pairs, 0))


@triton.jit
def order_kernel(order: tl.tensor, work: tl.tensor, heads: tl.tensor, HEADS: tl.constexpr) -> None:
    """Order heads by `work` `[H]`, most first, and then the lower head; `HEADS` is a power of two, `H` or more."""
    head = tl.arange(0, HEADS)
    own = tl.load(work + head, mask=head < heads, other=-2)
    is_before = (own[None, :] > own[:, None]) | ((own[None, :] == own[:, None]) & (head[None, :] < head[:, None]))
    tl.store(order + tl.sum(is_before.to(tl.int32), 1), head, mask=head < heads)


def choose_tiles(lists: Sequence[CellLists], rows: Rows, rates: Sequence[int]) -> Choice:
    """Choose the tiles of every head of a cell, without waiting for the device; the contract is that of the twin."""
    first, second, heads = lists[0], lists[-1], len(lists[0].num_blocks)
    chosen = Choice(
        torch.empty_like(first.num_blocks), torch.empty_like(first.num_blocks),
        torch.empty_like(first.num_blocks, dtype=torch.int64),
    )  # fmt: skip
    work = torch.empty_like(chosen.visited)
    sides = [(one.blocks, one.counts, one.num_blocks, one.blocks.stride(0)) for one in (first, second)]
    most = [most_blocks(rows, one.tile) for one in (first, second)]
    weigh_kernel[(heads,)](
        chosen.head_tiles, work, chosen.visited, *sides[0], *sides[1], first.num_columns, rows.start, rows.length,
        *most, rates[0], rates[-1], FIRST=first.tile, SECOND=second.tile, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    order_kernel[(1,)](chosen.order, work, heads, HEADS=triton.next_power_of_2(heads), num_warps=4)
    return chosen
