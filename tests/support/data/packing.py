"""Weights in the order of the compiled products, and back."""

from __future__ import annotations

import torch

from workers.kernels.abi import STRIP
from workers.model.compiled import packed

__all__ = ["packed", "unpacked"]


def unpacked(weight: torch.Tensor) -> torch.Tensor:
    """Return a packed weight in plain order, `[N, K]` or `[Er, N, K]`: a copy; any other tensor is returned itself."""
    if weight.dim() == 7:  # [Er, strip, which, tile, pair, row, of pair]
        experts, strips = weight.shape[:2]
        return weight.permute(0, 2, 1, 5, 3, 4, 6).reshape(experts, 2 * strips * STRIP, -1)
    if weight.dim() == 6:
        return weight.permute(0, 1, 4, 2, 3, 5).reshape(weight.shape[0], weight.shape[1] * STRIP, -1)
    if weight.dim() == 5:
        return weight.permute(0, 3, 1, 2, 4).reshape(weight.shape[0] * STRIP, -1)
    return weight
