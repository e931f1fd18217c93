"""Entries: what one tile of one head visits, as blocks of keys with a mask, made from the lists of the cell.

An entry is a row of the staged keys, or of the gathered columns, and a mask of 64 bits over the 64 rows from it on.
Its keys lie before the tile's own rows and in one region, and its rows before the end of the context. A column that
also lies in a visited block has no bit, and an entry without bits is left out. The keys of the tile's own rows have no
entries: all tiles visit them.

Legend: `H` query heads, `n` of them at a time, `E` room for the entries of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from workers.kernels.triton.lists import BLOCK, CellLists, Rows
from workers.kernels.triton.staging import Staged, column_room

_BLOCKS = 128  # of a list, read at a time
_COLUMN_BLOCKS = 16  # of `BLOCK` columns, read at a time


@dataclass(frozen=True, slots=True, eq=False)
class Entries:
    """The entries of every tile of `n` heads.

    `entries` `[n, tiles, 3, E]` int32: row, and the masks of the first 32 rows and of the others. Blocks of region `r`
    (inter 0, succ 1, intra 2) are `ends[..., 2 r]` to `ends[..., 2 r + 1] - 1`, and then come its columns up to
    `ends[..., 2 r + 2] - 1`, where `ends` is `[n, tiles, 7]` int32.
    """

    entries: torch.Tensor
    ends: torch.Tensor


def entry_room(lists: CellLists, num_blocks: int | None = None) -> int:
    """Return `E` for heads of at most `num_blocks`; by default of as many as `lists` have room for.

    Each border between regions cuts one block and one block of columns in two.
    """
    room = lists.blocks.shape[1]
    return min(room, num_blocks or room) + column_room(lists.columns.shape[1]) // BLOCK + 4


def entry_bytes(lists: CellLists, rows: Rows, num_blocks: int | None = None) -> int:
    """Return the memory of one head's entries."""
    return rows.tiles(lists.tile) * (12 * entry_room(lists, num_blocks) + 28)


def fill_entries(
    lists: CellLists, rows: Rows, staged: Staged, order: torch.Tensor, head_tiles: torch.Tensor,
    visited: torch.Tensor, group: int, num_blocks: int | None = None,
) -> Entries:  # fmt: skip
    """Make the entries of the heads `order` `[n]`, those of `order[i]` at `i`.

    Args:
        head_tiles: `[H]` of `lists.Choice`; nothing is written for heads with other tiles than `lists` has.
        visited: `[H]` int64; the number of query-key pairs that each of these heads visits is added.
        group: query heads a KV head.
        num_blocks: the most blocks of a head; by default as many as `lists` have room for.
    """
    tiles, room = rows.tiles(lists.tile), entry_room(lists, num_blocks)
    made = Entries(
        torch.empty(len(order), tiles, 3, room, dtype=torch.int32, device=order.device),
        torch.empty(len(order), tiles, 7, dtype=torch.int32, device=order.device),
    )
    entries_kernel[tiles, len(order)](
        lists.blocks, lists.counts, lists.blocks.stride(0), lists.num_blocks, lists.bitmap, lists.bitmap.stride(0),
        lists.columns, lists.columns.stride(0), lists.num_columns, order, head_tiles, made.entries, made.ends,
        visited, rows.start, rows.length, rows.succ, rows.intra, room, staged.last_block(BLOCK), staged.head_rows,
        column_room(lists.columns.shape[1]), group, M=lists.tile, N=BLOCK, NB=_BLOCKS, NC=_COLUMN_BLOCKS, num_warps=4,
    )  # fmt: skip
    return made


@triton.jit
def _store_entries(
    entries: tl.tensor, room: tl.tensor, at: tl.tensor, row: tl.tensor, low: tl.tensor, high: tl.tensor
) -> tl.tensor:
    """Append entries to a tile's, without those that have no bits; returns the new number of entries."""
    keep = (low | high) != 0
    kept = keep.to(tl.int32)
    place = entries + at + tl.cumsum(kept, 0) - kept
    tl.store(place, row, mask=keep)
    tl.store(place + room, low, mask=keep)
    tl.store(place + 2 * room, high, mask=keep)
    return at + tl.sum(kept, 0)


@triton.jit
def _lowest(count: tl.tensor) -> tl.tensor:
    """Return words whose lowest `count` bits are set; all from 32 on, none below 1."""
    few = (1 << (tl.maximum(count, 0) % 32)) - 1
    return tl.where(count >= 32, -1, few)


@triton.jit(
    do_not_specialize=[
        "block_stride",
        "bitmap_stride",
        "column_stride",
        "start",
        "length",
        "succ",
        "intra",
        "room",
        "last_block",
        "column_room",
    ],
    do_not_specialize_on_alignment=["blocks", "counts", "num_blocks", "bitmap", "columns", "num_columns", "order"],
)
def entries_kernel(
    blocks: tl.tensor, counts: tl.tensor, block_stride: tl.tensor, num_blocks: tl.tensor, bitmap: tl.tensor,
    bitmap_stride: tl.tensor, columns: tl.tensor, column_stride: tl.tensor, num_columns: tl.tensor, order: tl.tensor,
    head_tiles: tl.tensor, entries: tl.tensor, ends: tl.tensor, visited: tl.tensor, start: tl.tensor,
    length: tl.tensor, succ: tl.tensor, intra: tl.tensor, room: tl.tensor, last_block: tl.tensor,
    head_rows: tl.tensor, column_room: tl.tensor, group: tl.tensor, M: tl.constexpr, N: tl.constexpr,
    NB: tl.constexpr, NC: tl.constexpr,
) -> None:  # fmt: skip
    """Make the entries of tile `program_id(0)` of head `order[program_id(1)]`; sizes are those of `fill_entries`."""
    tile, tiles, rank = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    head = tl.load(order + rank)
    if tl.load(head_tiles + head) != M:
        return
    num_blocks, num_columns = tl.load(num_blocks + head), tl.load(num_columns + head)
    wide = head.to(tl.int64)
    blocks, counts = blocks + wide * block_stride, counts + wide * block_stride
    bitmap, columns = bitmap + wide * bitmap_stride, columns + wide * column_stride
    program = (rank * tiles + tile).to(tl.int64)
    entries, ends = entries + program * 3 * room, ends + program * 7
    head_row, column_row = head // group * head_rows, rank * column_room
    first = start + tile * M  # position of the tile's first row, and of its last one if it is whole
    last = first + M - 1

    bit = tl.arange(0, 32)[None, None, :]
    index = tl.arange(0, NC)[:, None, None] * N + tl.arange(0, 2)[None, :, None] * 32 + bit  # [NC, 2, 32]
    at, keys = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    tl.store(ends, 0)
    for region in range(3):
        lower = tl.where(region == 0, 0, tl.where(region == 1, succ, intra))
        upper = tl.where(region == 0, succ, tl.where(region == 1, intra, first))
        is_empty = lower >= upper
        for begin in range(0, tl.where(is_empty, 0, num_blocks), NB):
            number = begin + tl.arange(0, NB)
            key = last - tl.load(blocks + number, mask=number < num_blocks, other=0)
            count = tl.load(counts + number, mask=number < num_blocks, other=0)
            low_key = tl.maximum(key, lower)
            count = tl.maximum(tl.minimum(key + count, upper) - low_key, 0)
            row = tl.minimum(low_key, last_block)
            skip, end = low_key - row, low_key - row + count
            low, high = _lowest(end) ^ _lowest(skip), _lowest(end - 32) ^ _lowest(skip - 32)
            at = _store_entries(entries, room, at, head_row + row, low, high)
            keys += tl.sum(count, 0)
        tl.store(ends + 2 * region + 1, at)
        for begin in range(0, tl.where(is_empty, 0, num_columns), NC * N):
            column = tl.load(columns + begin + index, mask=begin + index < num_columns, other=-1)
            seen = (column >= lower) & (column < upper)
            distance = tl.where(seen, last - column, 0)
            word = tl.load(bitmap + distance // 32, mask=seen, other=-1)
            seen = seen & (((word >> (distance % 32)) & 1) == 0)
            low, high = tl.split(tl.sum(seen.to(tl.int32) << bit, 2))
            row = column_row + begin + tl.arange(0, NC) * N
            at = _store_entries(entries, room, at, row, low, high)
            keys += tl.sum(tl.sum(tl.sum(seen.to(tl.int32), 2), 1), 0)
        tl.store(ends + 2 * region + 2, at)
    rows = tl.minimum(M, start + length - first)
    tl.atomic_add(visited + head, rows.to(tl.int64) * keys + rows * (rows + 1) // 2)
