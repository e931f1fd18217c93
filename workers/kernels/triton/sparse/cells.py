"""Tables of the sparse cells of a step for the selection kernels: what the host knows before the step begins.

Legend: `C` cells of the step, `K` KV heads, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from workers.kernels.device import moved

NUM_CELL_FIELDS = 8  # seen, first row, sampled rows, first and last chunk, stop of INTER, stop of SUCC, start
NUM_CHUNK_FIELDS = 5  # cell, start, stop, rotation, rotation of the keys before
INTRA = 0  # `Rotation`


@dataclass(frozen=True, slots=True)
class CellSpan:
    """Where one cell is.

    It has the positions `start .. stop - 1`, `regions` `(start, stop, rotation)` of the keys before `stop`, ascending,
    and its sequence begins at row `first_row` of the staged keys of every KV head.
    """

    start: int
    stop: int
    regions: tuple[tuple[int, int, int], ...]
    first_row: int = 0


@dataclass(frozen=True, slots=True)
class TileShape:
    """How the kernels cut their work: keys of a tile and of a chunk, and query heads that share a tile of keys.

    Sums keep more values a thread than log-sum-exps do: with four heads they spill.
    """

    block: int = 64
    chunk: int = 4096
    shared: int = 4
    shared_sums: int = 2
    warps: int = 8


@dataclass(frozen=True, slots=True)
class CellTables:
    """`cells` `[C, 8]` and `chunks` `[n, 5]`, int32 on the device; `width` is a number of keys that no cell exceeds.

    A chunk lies in one region. Widths are multiples of 64, so that rows of sums and of bitmaps are aligned.
    """

    spans: tuple[CellSpan, ...]
    cells: torch.Tensor
    chunks: torch.Tensor
    width: int

    @staticmethod
    def make(spans: Sequence[CellSpan], last_q: int, shape: TileShape, device: torch.device | str) -> CellTables:
        """Make the tables; the copy to the device does not wait for it.

        Raises:
            ValueError: a region that another one follows is shorter than a tile of keys.
        """
        cells: list[tuple[int, ...]] = []
        chunks: list[tuple[int, ...]] = []
        for number, span in enumerate(spans):
            first = len(chunks)
            chunks += _chunks(number, span, shape)
            borders = dict.fromkeys(range(3), 0)
            for _, stop, rotation in span.regions:
                borders[rotation] = stop
            num_rows = min(last_q, span.stop - span.start)
            inter, succ = borders[2], max(borders[1], borders[2])
            cells.append((span.stop, span.first_row, num_rows, first, len(chunks), inter, succ, span.start))
        width = -(-max(span.stop for span in spans) // 64) * 64
        return CellTables(tuple(spans), to_device(cells, device), to_device(chunks, device), width)


def to_device(rows: Sequence[Sequence[int]], device: torch.device | str) -> torch.Tensor:
    """Return int32 numbers on the device, copied there without waiting for it."""
    return moved(torch.tensor(rows, dtype=torch.int32), device)


def _chunks(number: int, span: CellSpan, shape: TileShape) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for start, stop, rotation in span.regions:
        if stop - start < shape.block and stop < span.stop:
            raise ValueError(f"keys {start} to {stop - 1} are a region of {stop - start}: need {shape.block} or more")
        for low in range(start, stop, shape.chunk):
            before = found[-1][3] if low == start and found else rotation
            found.append((number, low, min(low + shape.chunk, stop), rotation, before))
    return found
