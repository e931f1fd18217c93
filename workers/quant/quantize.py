"""Quantise a matrix to groups of whole numbers that share a scale, and pack it as compressed-tensors stores it.

Codes are symmetric, -2^(bits - 1) to 2^(bits - 1) - 1. With 4 bits the scale of a group is the one of some candidates
whose squared error is least: cutting off the largest weights of a group makes the others more exact. Needs no data.

Legend: `N` outputs, `K` inputs, `G` groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from workers.quant.weight import pack_nibbles

_BLOCK = 1 << 18  # weights that are quantised together: they stay in a cache
# the largest weight of a group over its scale: from all of the range to a fifth of it cut off
_CANDIDATES = {8: (127.0,), 4: (7.0, 7.25, 7.5, 7.75, 8.0, 8.25, 8.5, 8.75, 9.0, 9.5)}


@dataclass(frozen=True, slots=True)
class QuantizedGroups:
    """Codes `[N, K]` int8 and scales `[N, G]` of a matrix, with what they lose of it."""

    codes: torch.Tensor
    scales: torch.Tensor
    squared_error: float  # summed over all weights
    squared_sum: float

    def packed(self, bits: int) -> dict[str, torch.Tensor]:
        """Return the tensors of the format pack-quantized by their names."""
        rows, columns = self.codes.shape
        codes = self.codes.view(torch.uint8) ^ 0x80 if bits == 8 else (self.codes + 8).to(torch.uint8)
        codes = pad(codes, (0, -columns % (32 // bits)))
        words = (pack_nibbles(codes) if bits == 4 else codes).contiguous().view(torch.int32)
        return {
            "weight_packed": words,
            "weight_scale": self.scales,
            "weight_shape": torch.tensor([rows, columns], dtype=torch.int64),
        }


def quantize_matrix(weight: torch.Tensor, bits: int, group: int) -> QuantizedGroups:
    """Quantise a matrix `[N, K]`; scales have its type.

    Args:
        bits: 4 or 8.
        group: inputs that share a scale; divides `K`.
    """
    rows, columns = weight.shape
    assert columns % group == 0, (columns, group)
    codes = torch.empty((rows, columns), dtype=torch.int8)
    scales = torch.empty((rows, columns // group), dtype=weight.dtype)
    error = total = 0.0
    step = max(1, _BLOCK // columns)
    for start in range(0, rows, step):
        block = weight[start : start + step].float().unflatten(-1, (-1, group))
        block_codes, scale, lost = _quantize_groups(block, bits, weight.dtype)
        codes[start : start + step] = block_codes.flatten(-2)
        scales[start : start + step] = scale
        error += float(lost.double().sum())
        total += float(block.double().square().sum())
    return QuantizedGroups(codes, scales, error, total)


def _quantize_groups(
    values: torch.Tensor, bits: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return codes `[n, G, group]`, scales `[n, G]` as they are stored, and squared errors `[n, G]`."""
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    largest = values.abs().amax(dim=-1)
    best: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    for candidate in _CANDIDATES[bits]:
        scale = (largest / candidate).to(dtype)
        wide = scale.float().unsqueeze(-1)
        inverse = torch.where(wide > 0, 1.0 / wide, torch.zeros_like(wide))
        codes = (values * inverse).round_().clamp_(low, high)
        error = (codes * wide - values).square_().sum(dim=-1)
        if best is not None:
            better = error < best[2]
            codes = torch.where(better.unsqueeze(-1), codes, best[0])
            scale, error = torch.where(better, scale, best[1]), torch.where(better, error, best[2])
        best = codes, scale, error
    assert best is not None
    return best[0].to(torch.int8), best[1], best[2]
