"""The tables of a step's cells."""

from __future__ import annotations

import pytest

from workers.kernels.triton.sparse.cells import CellSpan, CellTables, TileShape


def test_chunks_cover_the_keys_of_every_region() -> None:
    regions = ((0, 192, 2), (192, 288, 1), (288, 305, 0))
    spans = [CellSpan(0, 67, ((0, 67, 0),)), CellSpan(300, 305, regions, first_row=67)]
    tables = CellTables.make(spans, 17, TileShape(block=32, chunk=64), "cpu")
    assert tables.width == 320
    assert tables.cells.tolist() == [[67, 0, 17, 0, 2, 0, 0, 0], [305, 67, 5, 2, 8, 192, 288, 300]]
    assert tables.chunks.tolist() == [
        [0, 0, 64, 0, 0], [0, 64, 67, 0, 0],
        [1, 0, 64, 2, 2], [1, 64, 128, 2, 2], [1, 128, 192, 2, 2], [1, 192, 256, 1, 2], [1, 256, 288, 1, 1],
        [1, 288, 305, 0, 1],
    ]  # fmt: skip


def test_regions_shorter_than_a_tile_are_refused() -> None:
    with pytest.raises(ValueError, match="keys 0 to 31 are a region of 32: need 64 or more"):
        CellTables.make([CellSpan(40, 50, ((0, 32, 1), (32, 50, 0)))], 17, TileShape(), "cpu")
