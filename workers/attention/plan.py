"""The attention plan: for every tile of queries, which keys it visits and how.

One data structure serves every kind of attention: dense prefill visits all tiles, dual chunk attention tags them
with another rotation, sparse prefill lists fewer of them and adds gathered columns. Kernels only execute plans.

Legend: `T` rows of the slice, `S` context length including the slice. Rows are counted within the slice, keys are
absolute positions in the sequence.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Rotation(enum.Enum):
    """Which rotation of the query meets a range of keys (dual chunk attention has three, plain attention one)."""

    INTRA = "intra"


@dataclass(frozen=True, slots=True)
class KeyRange:
    """Keys `start .. stop - 1`; `causal` means row `i` of the tile sees only keys up to its own position."""

    start: int
    stop: int
    rotation: Rotation = Rotation.INTRA
    causal: bool = False


@dataclass(frozen=True, slots=True)
class QueryTile:
    """Rows `start .. stop - 1` of the slice and the key ranges they visit, in ascending order, without overlap."""

    start: int
    stop: int
    keys: tuple[KeyRange, ...]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Every row of a slice belongs to exactly one tile."""

    tiles: tuple[QueryTile, ...]

    @property
    def visited_pairs(self) -> int:
        """Query-key pairs the plan visits, for one head (a causal range of n keys counts n * (n + 1) / 2)."""
        total = 0
        for tile in self.tiles:
            for keys in tile.keys:
                width = keys.stop - keys.start
                total += width * (width + 1) // 2 if keys.causal else width * (tile.stop - tile.start)
        return total


def dense_plan(start: int, length: int, tile: int = 4096) -> AttentionPlan:
    """Causal attention of `length` rows that begin at position `start`: everything before the tile, then its diagonal.

    Args:
        start: position of the first row, which is also the number of keys before the slice.
        length: rows in the slice, at least 1.
        tile: most rows in a query tile; bounds the kernel's scratch memory.
    """
    if length < 1 or start < 0 or tile < 1:
        raise ValueError(f"dense_plan: start {start}, length {length}, tile {tile}: need start >= 0, length, tile >= 1")
    tiles = []
    for row in range(0, length, tile):
        stop = min(row + tile, length)
        first = start + row
        diagonal = KeyRange(first, first + stop - row, causal=True)
        tiles.append(QueryTile(row, stop, (KeyRange(0, first), diagonal) if first else (diagonal,)))
    return AttentionPlan(tuple(tiles))
