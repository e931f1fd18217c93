"""Blocks of rows that stay in a core's L2 cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

_BLOCK_VALUES = 1 << 18  # float32 values: 1 MiB


def row_blocks(x: torch.Tensor) -> Iterator[slice]:
    """Yield slices of the rows of `x` whose float32 copies fit the L2 cache of a core; one slice on other devices."""
    rows = x.shape[0]
    step = max(1, _BLOCK_VALUES * rows // max(1, x.numel())) if x.device.type == "cpu" else max(1, rows)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
