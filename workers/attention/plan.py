"""The attention plan: for every tile of queries, which keys it visits and under which rotation; and the query rows.

One data structure covers every kind of attention. Dense prefill visits every key up to the row's own; dual chunk
attention (DCA, arXiv 2402.17463) tags key ranges with another rotation of the query; sparse prefill visits fewer ranges
and adds gathered columns. Kernels execute plans, they decide nothing.

A plan is compact: the offsets (distances from query to key) and columns of a head determine the keys of any tile.
`AttentionPlan.tile_keys` spells them out; the compiled kernel computes the same lists while it runs.

Legend: `T` rows of the plan, `H` query heads of the shard, `D` head dim, `L` tokens between the starts of two DCA
chunks. Rows are counted within the plan, keys are absolute positions in the sequence.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

QUERY_TILE = 64  # rows that share one list of keys

IntArray = npt.NDArray[np.int32]


class Rotation(enum.IntEnum):
    """The rotation of the query for a range of keys: of its own DCA chunk, the chunk before it, or earlier ones."""

    INTRA = 0
    SUCC = 1
    INTER = 2


@dataclass(frozen=True, slots=True)
class Queries:
    """The rows `[T, H, D]` under each rotation: unit stride in `D`, any strides of rows and heads.

    None where the plan has no region of that rotation.
    """

    intra: torch.Tensor
    succ: torch.Tensor | None = None
    inter: torch.Tensor | None = None

    def of(self, rotation: Rotation) -> torch.Tensor:
        """Return the rows that meet keys tagged with `rotation`."""
        rows = (self.intra, self.succ, self.inter)[rotation]
        assert rows is not None, f"the plan needs {rotation.name} queries"
        return rows

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Queries:
        """Return the rows under each rotation, changed by one function."""
        succ, inter = (None if rows is None else change(rows) for rows in (self.succ, self.inter))
        return Queries(change(self.intra), succ, inter)

    def __getitem__(self, rows: slice | torch.Tensor) -> Queries:
        return self.map(lambda each: each[rows])


class TileKeys(NamedTuple):
    """Rows `start .. stop - 1` and the keys they visit, by rotation: each once, and masked in the rows before it."""

    start: int
    stop: int
    keys: dict[Rotation, IntArray]


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """The keys that one query head keeps in one cell.

    `offsets` `[n, 2]` are closed intervals of distances from query to key, ascending and neither overlapping nor
    adjacent; `columns` `[m]` are key positions, ascending, each once. A pair is kept when its offset or its column is.
    """

    offsets: IntArray
    columns: IntArray

    @staticmethod
    def everything(stop: int) -> Selection:
        """Return the selection that keeps all keys of rows before position `stop`."""
        return Selection(np.array([[0, stop - 1]], np.int32), np.empty(0, np.int32))


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """Rows at positions `start .. start + length - 1`, all in one DCA chunk.

    `distance` is `L`, 0 for plain attention (one infinite chunk). `heads` has a selection per query head; with None
    every head visits all keys up to the row's own position. `tile` rows share a list of keys; with `head_tiles` they
    are `head_tiles[h]` rows for head `h`. With `whole_tiles` the last tile, which may have fewer rows, takes the list
    that a whole one would have, without keys after its last row.
    """

    start: int
    length: int
    distance: int = 0
    heads: tuple[Selection, ...] | None = None
    tile: int = QUERY_TILE
    whole_tiles: bool = False
    head_tiles: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.length < 1 or self.start < 0 or self.tile < 1 or self.distance < 0:
            raise ValueError(
                f"attention plan: start {self.start}, length {self.length}, tile {self.tile}, distance {self.distance}"
                ": need start, distance >= 0 and length, tile >= 1"
            )
        last = self.start + self.length - 1
        if self.distance and self.start // self.distance != last // self.distance:
            raise ValueError(f"attention plan: rows {self.start} to {last} cross a DCA chunk of {self.distance} tokens")

    @property
    def regions(self) -> tuple[tuple[int, int, Rotation], ...]:
        """The key regions `(start, stop, rotation)` in ascending order, without empty ones."""
        stop = self.start + self.length
        if not self.distance:
            return ((0, stop, Rotation.INTRA),)
        intra = self.start // self.distance * self.distance
        succ = max(0, intra - self.distance)
        regions = ((0, succ, Rotation.INTER), (succ, intra, Rotation.SUCC), (intra, stop, Rotation.INTRA))
        return tuple(region for region in regions if region[0] < region[1])

    def tile_keys(self, head: int) -> Iterator[TileKeys]:
        """Yield the keys of one head, tile by tile: per region those of offsets, ascending, then other columns."""
        selection = self.heads[head] if self.heads else Selection.everything(self.start + self.length)
        tile = self.head_tiles[head] if self.head_tiles else self.tile
        for row in range(0, self.length, tile):
            stop = min(row + tile, self.length)
            first = self.start + row
            last = first + tile - 1 if self.whole_tiles else self.start + stop - 1
            visited = _visited(selection.offsets, first, last)
            columns = selection.columns[selection.columns <= last]
            for low, high in visited:
                columns = columns[(columns < low) | (columns >= high)]
            keys = {}
            for low, high, rotation in self.regions:
                ranges = [np.arange(max(low, begin), min(high, end), dtype=np.int32) for begin, end in visited]
                keys[rotation] = np.concatenate([*ranges, columns[(columns >= low) & (columns < high)]])
            yield TileKeys(row, stop, {rotation: positions for rotation, positions in keys.items() if len(positions)})

    @property
    def causal_pairs(self) -> int:
        """The number of query-key pairs of causal attention of the rows."""
        return self.length * (self.start + 1) + self.length * (self.length - 1) // 2

    def visited_pairs(self, head: int) -> int:
        """Return the number of pairs that one head visits, without those that the causal mask removes."""
        if self.heads is None:
            return self.causal_pairs
        return sum(
            int(np.minimum(self.start + tile.stop - keys, tile.stop - tile.start).sum(dtype=np.int64))
            for tile in self.tile_keys(head)
            for keys in tile.keys.values()
        )


def _visited(offsets: IntArray, first: int, last: int) -> list[tuple[int, int]]:
    """Return the key ranges that rows at `first .. last` reach through intervals of offsets: ascending, disjoint."""
    ranges: list[tuple[int, int]] = []
    for low, high in offsets[::-1].tolist():  # large offsets are early keys
        start, stop = max(0, first - high), last - low + 1
        if start >= stop:
            continue
        if ranges and start <= ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], max(ranges[-1][1], stop))
        else:
            ranges.append((start, stop))
    return ranges
