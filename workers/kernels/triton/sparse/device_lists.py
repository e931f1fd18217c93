"""`lists.CellLists` made on the device from the bits of what heads keep.

Distances are prolonged by `TILE - 1` word by word: a kept distance sets the bits above it in its word, the words after
it, and the bits below it in the word `TILE / 32` further. Runs of set bits are longer than a word, so that a word
begins and ends one at most.

Legend: `C` cells, `H` query heads, `S` keys a cell sees, `W` words of kept distances, `X` words of the lists' bitmap,
`B` room for blocks, `U` room for runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from workers.kernels.triton import lists
from workers.kernels.triton.lists import CellLists
from workers.kernels.triton.sparse.cells import NUM_CELL_FIELDS, CellTables
from workers.kernels.triton.sparse.selection import Kept

_CELL_FIELDS = tl.constexpr(NUM_CELL_FIELDS)
_KEYS = tl.constexpr(lists.BLOCK)
_ALL = tl.constexpr(0xFFFFFFFF)
OPTIONS = {"num_warps": 8, "maxnreg": 128}  # left to itself the compiler keeps to 80 registers and spills


@triton.jit
def _load_kept(words: tl.tensor, at: tl.tensor, num_words: tl.tensor, seen: tl.tensor, dense: tl.tensor) -> tl.tensor:
    """Load words of kept distances as uint32; `dense` rows keep all below `seen`."""
    kept = tl.load(words + at, mask=(at >= 0) & (at < num_words), other=0).to(tl.uint32, bitcast=True)
    left = tl.minimum(tl.maximum(seen - at * 32, 0), 32)  # distances below `seen`
    below = tl.where(left == 32, _ALL, (tl.full(at.shape, 1, tl.uint32) << (left & 31).to(tl.uint32)) - 1)
    return tl.where(dense, tl.where(at >= 0, below, 0), kept).to(tl.uint32)


@triton.jit
def _load_prolonged(
    words: tl.tensor, at: tl.tensor, num_words: tl.tensor, seen: tl.tensor, dense: tl.tensor, TILE: tl.constexpr
) -> tl.tensor:
    """Load words of the distances `d` with a kept one in `d - TILE + 1 .. d`, as uint32."""
    kept = _load_kept(words, at, num_words, seen, dense)
    found = kept | ((kept ^ _ALL) + 1)  # from its lowest bit on
    for back in tl.static_range(1, TILE // 32):
        found |= tl.where(_load_kept(words, at - back, num_words, seen, dense) != 0, _ALL, 0).to(tl.uint32)
    last = _load_kept(words, at - TILE // 32, num_words, seen, dense) >> 1
    last |= last >> 1
    last |= last >> 2
    last |= last >> 4
    last |= last >> 8
    return found | last | (last >> 16)  # below its highest bit


@triton.jit
def _place(bit: tl.tensor) -> tl.tensor:
    """Return the index of the one bit that is set: the exponent of the float that equals the word."""
    return (bit.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit(
    do_not_specialize=["num_words", "map_words", "room", "run_room", "column_room", "steps"],
    do_not_specialize_on_alignment=[
        "bitmap",
        "blocks",
        "counts",
        "num_blocks",
        "num_columns",
        "nears",
        "fars",
        "ends",
    ],
)
def lists_kernel(
    bitmap: tl.tensor, blocks: tl.tensor, counts: tl.tensor, num_blocks: tl.tensor, num_columns: tl.tensor,
    nears: tl.tensor, fars: tl.tensor, ends: tl.tensor,
    words: tl.tensor, totals: tl.tensor, column_totals: tl.tensor, dense: tl.tensor, cells: tl.tensor,
    num_words: tl.tensor, map_words: tl.tensor, room: tl.tensor, run_room: tl.tensor, column_room: tl.tensor,
    steps: tl.tensor, HEADS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Make the bitmap, blocks and counts of one head of a cell, program `(cell, head)`.

    Args:
        bitmap, blocks, counts, num_blocks, num_columns: as in `CellLists`, for `C * H` heads.
        nears, fars, ends: `[C * H, U]`, first and last distance of every run of bits, and the blocks up to its end.
        words, totals: kept distances and their number; a head that keeps all of them has no columns.
        column_totals: `[C * H]`, columns it keeps; `column_room` of them are listed.
        dense: `[C * H]` int32, heads that visit everything.
        steps: the binary logarithm of `U`, rounded up.
    """
    row = tl.program_id(0)
    wide = row.to(tl.int64)
    seen = tl.load(cells + row // HEADS * _CELL_FIELDS)
    is_whole = (tl.load(dense + row) != 0) | (tl.load(totals + row) >= seen)
    tl.store(num_columns + row, tl.where(is_whole, 0, tl.minimum(tl.load(column_totals + row), column_room)))
    kept, own_runs = words + wide * num_words, wide * run_room
    begun, ended = row * 0, row * 0
    for first in range(0, map_words, BLOCK):
        at = first + tl.arange(0, BLOCK)
        word = _load_prolonged(kept, at, num_words, seen, is_whole, TILE)
        before = _load_prolonged(kept, at - 1, num_words, seen, is_whole, TILE) >> 31
        after = _load_prolonged(kept, at + 1, num_words, seen, is_whole, TILE) << 31
        tl.store(bitmap + wide * map_words + at, word.to(tl.int32, bitcast=True), mask=at < map_words)
        starts, stops = word & (((word << 1) | before) ^ _ALL), word & (((word >> 1) | after) ^ _ALL)
        is_start, is_stop = (starts != 0).to(tl.int32), (stops != 0).to(tl.int32)
        rank = begun + tl.cumsum(is_start) - 1
        tl.store(nears + own_runs + rank, at * 32 + _place(starts), mask=is_start != 0)
        rank = ended + tl.cumsum(is_stop) - 1
        tl.store(fars + own_runs + rank, at * 32 + _place(stops), mask=is_stop != 0)
        begun += tl.sum(is_start)
        ended += tl.sum(is_stop)
    tl.debug_barrier()
    total = row * 0
    for first in range(0, begun, BLOCK):
        at = first + tl.arange(0, BLOCK)
        length = tl.load(fars + own_runs + at, mask=at < begun, other=-1)
        length -= tl.load(nears + own_runs + at, mask=at < begun, other=0) - 1
        size = (length + _KEYS - 1) // _KEYS
        tl.store(ends + own_runs + at, total + tl.cumsum(size), mask=at < begun)
        total += tl.sum(size)
    tl.debug_barrier()
    for first in range(0, total, BLOCK):
        at = first + tl.arange(0, BLOCK)
        wanted = total - 1 - at  # far blocks come first
        low, high = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32) + begun - 1
        for _ in range(steps):  # the first run that ends after the block
            middle = (low + high) // 2
            is_later = tl.load(ends + own_runs + middle) <= wanted
            low, high = tl.where(is_later, tl.minimum(middle + 1, high), low), tl.where(is_later, high, middle)
        far = tl.load(fars + own_runs + low) - (tl.load(ends + own_runs + low) - 1 - wanted) * _KEYS
        count = tl.minimum(far - tl.load(nears + own_runs + low) + 1, _KEYS)
        tl.store(blocks + wide * room + at, far, mask=at < total)
        tl.store(counts + wide * room + at, count, mask=at < total)
    tl.store(num_blocks + row, total)


def make_lists(
    offsets: Kept, columns: Kept, dense: torch.Tensor, tables: CellTables, tile: int, block: int = 1024
) -> list[CellLists]:
    """Make the lists of every cell.

    Args:
        offsets, columns: what the heads keep, distance 0 included; columns are listed.
        dense: `[C, H]` int32, not 0 for heads that visit every key.
        tile: rows of a tile, a multiple of 32.
    """
    assert columns.indices is not None
    num_cells, heads, num_words = offsets.words.shape
    run_room = (tables.width + tile) // (tile + 1) + 1
    room, map_words = (tables.width + tile) // lists.BLOCK + run_room + 1, (tables.width + tile) // 32 + 1
    column_room = columns.indices.shape[2]

    sizes, rows = (room, room, map_words, run_room, run_room, run_room, 1, 1), num_cells * heads
    filled = torch.zeros(rows * sum(sizes), dtype=torch.int32, device=offsets.words.device)  # in one launch
    parts = filled.split([rows * size for size in sizes])
    blocks, counts, bitmap, nears, fars, ends, *numbers = (
        part.view(num_cells, heads, size) for part, size in zip(parts, sizes, strict=True)
    )
    num_blocks, num_columns = (number[..., 0] for number in numbers)
    lists_kernel[(num_cells * heads,)](
        bitmap, blocks, counts, num_blocks, num_columns, nears, fars, ends, offsets.words, offsets.totals,
        columns.totals, dense, tables.cells, num_words, map_words, room, run_room, column_room,
        run_room.bit_length(), HEADS=heads, TILE=tile, BLOCK=block, **OPTIONS,
    )  # fmt: skip
    return [
        CellLists(
            blocks[cell], counts[cell], num_blocks[cell], bitmap[cell], columns.indices[cell], num_columns[cell], tile
        )
        for cell in range(num_cells)
    ]
