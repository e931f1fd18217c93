"""Blocks cover all rows once, and their float32 copies fit a core's cache."""

import pytest
import torch

from workers.kernels.blocking import row_blocks


@pytest.mark.parametrize("shape", [(1, 7), (17, 4096), (1000, 3, 1024), (5, 1 << 19), (0, 8)])
def test_blocks_of_rows(shape: tuple[int, ...]):
    x = torch.empty(shape, dtype=torch.bfloat16)
    blocks = list(row_blocks(x))
    assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(shape[0]))
    for block in blocks:
        assert len(x[block]) == 1 or x[block].numel() * 4 <= 1 << 20


def test_other_devices_have_one_block():
    assert list(row_blocks(torch.empty(5000, 4096, device="meta"))) == [slice(0, 5000)]
