"""Unpacked blocks in the internal layout: 4-bit types stay 4 bits a code, those of 5, 6 and 8 bits take 8.

Scales and zero points are float16. Types with one scale and no minimum (Q4_0, Q5_0, Q8_0) lose nothing. A zero point
(minimum / scale) and the two-level scales of the K types are rounded: at most 2^-9 of the largest magnitude in a group
is lost (or 2^-25 a code, where scales are below 2^-14), as by rounding weights to bfloat16, and 4-bit files keep their
size. `exact` keeps them in float32.
"""

from __future__ import annotations

import torch

from workers.quant.gguf.blocks import Unpacked
from workers.quant.weight import QuantizedWeight, pack_nibbles

_MOST = 60_000.0  # of a zero point in float16


def to_weight(blocks: Unpacked, exact: bool = False) -> QuantizedWeight:
    """Return rows `[R, K]` in the internal layout; scales and zero points in float32 with `exact`."""
    scales, zeros, codes = blocks.scales, None, blocks.codes
    if blocks.minima is not None:
        scales, zeros, codes = _with_zeros(blocks, torch.float32 if exact else torch.float16)
    elif not exact:
        scales = scales.half()
    if blocks.bits > 4:
        return QuantizedWeight("int8", blocks.group, codes.view(torch.uint8), scales, zeros)
    if zeros is None:
        codes = codes + 8
    return QuantizedWeight("int4", blocks.group, pack_nibbles(codes.view(torch.uint8)), scales, zeros)


def _with_zeros(blocks: Unpacked, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return scales, zero points and codes with `scale * (code - zero)` the value of each weight.

    The zero point is that of the rounded scale. A group whose minimum dwarfs its scale is constant as far as the type
    tells: it has the codes 0, and its minimum as scale.
    """
    assert blocks.minima is not None
    minima = blocks.minima.float()
    scales = blocks.scales.to(dtype).float()
    zeros = -minima / scales
    flat = ~(zeros.abs() <= _MOST) if dtype == torch.float16 else ~zeros.isfinite()  # also 0 / 0
    zeros = torch.where(flat, -torch.ones_like(zeros), zeros).to(dtype)
    scales = torch.where(flat, minima, scales).to(dtype)
    kept = (~flat).to(torch.uint8).repeat_interleave(blocks.group, dim=1)
    return scales, zeros, blocks.codes * kept
