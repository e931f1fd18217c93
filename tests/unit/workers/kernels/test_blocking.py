"""Blocks of rows cover a matrix in order and fit the cache."""

from __future__ import annotations

import pytest
import torch

from workers.kernels.blocking import row_blocks


@pytest.mark.parametrize("rows", [0, 1, 17, 67, 193, 5000])
@pytest.mark.parametrize("width", [1, 193, 4096, 1 << 19])
def test_blocks_cover_the_rows_in_order(rows: int, width: int) -> None:
    x = torch.empty(1).expand(rows, width)
    blocks = list(row_blocks(x))
    assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(rows))
    assert all(block.stop - block.start == 1 or (block.stop - block.start) * width * 4 <= 1 << 20 for block in blocks)


def test_other_devices_take_one_block() -> None:
    assert list(row_blocks(torch.empty(5000, 4096, device="meta"))) == [slice(0, 5000)]
