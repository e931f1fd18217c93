"""Cutting rows into blocks that stay in a core's cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

_BLOCK_VALUES = 1 << 18  # float32 values of a block: 1 MiB, so that every pass after the first finds it in L2


def row_blocks(x: torch.Tensor) -> Iterator[slice]:
    """Cut the rows of `x` so that a float32 copy of a block stays in a core's cache; one block on other devices."""
    rows = x.shape[0]
    step = max(1, _BLOCK_VALUES * rows // max(1, x.numel())) if x.device.type == "cpu" else max(1, rows)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
