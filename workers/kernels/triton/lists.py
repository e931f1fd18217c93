"""What a head visits in one cell, as lists that are the same for every tile of its rows.

The rows of a cell are cut into tiles of `tile` rows. What a tile visits through intervals of offsets are intervals of
distances from the tile's last row: the head's own intervals, prolonged by `tile - 1`. So one list of key blocks serves
all tiles of the cell. The last tile of a cell may have fewer rows; it takes the list of a whole one, as if the missing
rows were there. All tiles visit every key of their own rows, before and at the row.

Each head has tiles of the size that is the least work for it. Large tiles visit more pairs where offsets are scattered,
but a GPU computes them faster.

Legend: `H` query heads, `B` blocks, `C` columns, `W` words of 32 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from workers.kernels.device import moved

BLOCK = 64  # keys of a block: the bits of a mask
TILES = (128, 64)  # rows of a tile that the kernels are built for
DENSE_SHARE = 3, 5  # more than so many of a head's causal keys in its blocks: the head visits all keys

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows at positions `start .. start + length - 1`; keys before `succ` are inter, those from `intra` on intra."""

    start: int
    length: int
    succ: int = 0
    intra: int = 0

    def tiles(self, tile: int) -> int:
        """Return the number of tiles."""
        return -(-self.length // tile)

    @property
    def causal_pairs(self) -> int:
        """The number of query-key pairs of causal attention of the rows."""
        return self.length * (self.start + 1) + self.length * (self.length - 1) // 2


@dataclass(frozen=True, slots=True, eq=False)
class CellLists:
    """The lists of every head of one cell, int32 on one device; B, C and W are capacities, the same for all heads.

    `blocks` `[H, B]` are distances from the last row of a tile to the first key of a block, far ones first. A block has
    `counts` `[H, B]` keys, 1 to `BLOCK`, and none that another one has; `num_blocks` `[H]` of them are set. `columns`
    `[H, C]` are key positions, ascending; `num_columns` `[H]` of them are set. Bit `d % 32` of word `d // 32` of
    `bitmap` `[H, W]` tells whether distance `d` from the last row of a tile lies in a block, for all `d < stop + tile`
    where `stop` is the position after the cell.
    """

    blocks: torch.Tensor
    counts: torch.Tensor
    num_blocks: torch.Tensor
    bitmap: torch.Tensor
    columns: torch.Tensor
    num_columns: torch.Tensor
    tile: int = TILES[0]


def cell_lists(
    offsets: Sequence[IntArray], columns: Sequence[IntArray], stop: int, tile: int = TILES[0],
    device: torch.device | str = "cpu",
) -> CellLists:  # fmt: skip
    """Make the lists of a cell that ends before position `stop` from the selections of its heads, in NumPy.

    Args:
        offsets: per head closed intervals of distances `[n, 2]`, ascending and disjoint, the first from 0.
        columns: per head key positions `[m]`, ascending.

    Raises:
        ValueError: a head does not keep distance 0.
    """
    heads = [_blocks(one, tile) for one in offsets]
    for number, one in enumerate(offsets):
        if not len(one) or one[0, 0] != 0:
            raise ValueError(f"selection of head {number}: offsets begin with {one[:1].tolist()}: need distance 0 kept")
    bits = np.zeros((len(heads), -(-(stop + tile) // 32) * 32), np.bool_)
    for row, (blocks, counts) in zip(bits, heads, strict=True):
        for far, count in zip(blocks, counts, strict=True):
            row[far - count + 1 : far + 1] = True
    packed = np.packbits(bits, axis=1, bitorder="little").view("<i4")
    return CellLists(
        _padded([blocks for blocks, _ in heads], device),
        _padded([counts for _, counts in heads], device),
        moved(torch.tensor([len(blocks) for blocks, _ in heads], dtype=torch.int32), device),
        moved(torch.from_numpy(packed.astype(np.int32)), device),
        _padded(columns, device),
        moved(torch.tensor([len(one) for one in columns], dtype=torch.int32), device),
        tile,
    )


class Choice(NamedTuple):
    """How the heads of a cell are computed, on one device.

    `head_tiles` `[H]` int32 are the rows of each head's tiles, and 0 for heads that visit all keys. `order` `[H]` int32
    are the heads, those with most work first. `visited` `[H]` int64 are the pairs of heads that visit all keys, else 0.
    """

    head_tiles: torch.Tensor
    order: torch.Tensor
    visited: torch.Tensor


def choose_tiles(lists: Sequence[CellLists], rows: Rows, rates: Sequence[int]) -> Choice:
    """Choose the tiles of every head: the slow twin of `workers.kernels.triton.tiles`.

    Of two sizes a head takes that with less `pairs / rate`, and the first one where they are equal. Pairs are those of
    its blocks and columns, all tiles taken as whole ones, and columns that lie in blocks not left out. A head whose
    blocks at this size have over 60 % of the causal keys, or are more than `most_blocks`, visits all keys.

    Args:
        lists: of one or two sizes of tiles.
        rates: of each size, pairs in the same time; in total below 2**20.
    """
    first, second = lists[0], lists[-1]
    rate, other = rates[0], rates[-1]
    blocks, causal, work = [], [], []
    for one, factor in ((first, other), (second, rate)):
        tiles, last = rows.tiles(one.tile), rows.start + one.tile - 1  # position of the first tile's last row
        blocks.append(block_keys(one, rows))
        causal.append(tiles * (last + 1) + one.tile * (tiles * (tiles - 1) // 2))
        work.append((blocks[-1] + tiles * one.num_columns.long()) * (one.tile * factor))
    is_second = work[1] < work[0]
    share, whole = DENSE_SHARE
    are_many = [
        (keys * whole > pairs * share) | (one.num_blocks > most_blocks(rows, one.tile))
        for keys, pairs, one in zip(blocks, causal, (first, second), strict=True)
    ]
    is_dense = torch.where(is_second, are_many[1], are_many[0])
    head_tiles = torch.where(is_second, second.tile, first.tile).masked_fill(is_dense, 0).int()
    work_left = torch.minimum(*work).masked_fill(is_dense, -1)
    order = torch.argsort(work_left, descending=True, stable=True).int()
    return Choice(head_tiles, order, torch.where(is_dense, rows.causal_pairs, 0))


def most_blocks(rows: Rows, tile: int) -> int:
    """Return the most blocks of a head that does not visit all keys: 60 % of those that the whole context has."""
    share, whole = DENSE_SHARE
    return share * (rows.start + rows.length + tile) // (whole * BLOCK) + 1


def block_keys(lists: CellLists, rows: Rows) -> torch.Tensor:
    """Return the keys that blocks have in all tiles of the cell, `[H]` int64: those up to a whole tile's last row."""
    tiles, first_last = rows.tiles(lists.tile), rows.start + lists.tile - 1
    far, count = lists.blocks.long(), lists.counts.long()
    is_set = torch.arange(far.shape[1], device=far.device) < lists.num_blocks[:, None]
    # A block lies before the first key in early tiles, then reaches into the context in one, and then is inside.
    before = ((far - first_last).clamp_min(0) + lists.tile - 1) // lists.tile
    inside = (tiles - before).clamp_min(0)
    reaching = first_last + (before - 1) * lists.tile - far + count
    reaching = torch.where((before > 0) & (before <= tiles), reaching.clamp_min(0), 0)
    return torch.where(is_set, inside * count + reaching, 0).sum(dim=1)


def _blocks(offsets: IntArray, tile: int) -> tuple[list[int], list[int]]:
    """Return distances and counts of the blocks of one head."""
    merged: list[list[int]] = []
    for low, high in offsets.tolist():
        if merged and low <= merged[-1][1] + tile:  # prolonged by tile - 1 they touch
            merged[-1][1] = high
        else:
            merged.append([low, high])
    blocks, counts = [], []
    for low, high in reversed(merged):
        for far in range(high + tile - 1, low - 1, -BLOCK):
            blocks.append(far)
            counts.append(min(BLOCK, far - low + 1))
    return blocks, counts


def _padded(rows: Sequence[Sequence[int] | IntArray], device: torch.device | str) -> torch.Tensor:
    """Return `[H, n]`, at least one wide: rows of different lengths are filled up with 0."""
    out = np.zeros((len(rows), max(1, *(len(row) for row in rows))), np.int32)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return moved(torch.from_numpy(out), device)
