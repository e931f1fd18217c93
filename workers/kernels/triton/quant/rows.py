"""Activations in e4m3 with a scale a token and 128 inputs, as the official FP8 recipe has them.

Legend: `T` tokens, `K` inputs, `G = ceil(K / 128)` groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from workers.kernels.triton.layer.heads import rounded

GROUP = 128  # inputs that share a scale
_GROUPS = 16  # of a program
_LARGEST = tl.constexpr(448.0)  # of e4m3
_SMALLEST = tl.constexpr(1.1754943508222875e-38)  # normal float32


class ScaledRows(NamedTuple):
    """Codes `[T, K]` e4m3 and scales `[T, G]` float32, both contiguous."""

    codes: torch.Tensor
    scales: torch.Tensor


@triton.jit
def quantise_rows_kernel(x, codes, scales, x_stride, depth, groups, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """One program: `GROUPS` groups of one row. What is not finite makes the scale of its group not finite."""
    row = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    d = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    values = tl.load(x + row * x_stride + d, mask=d < depth, other=0.0).to(tl.float32)
    # `/` is off by a last bit or two on a GPU; 0 * inf is NaN
    scale = tl.math.div_rn(tl.max(tl.abs(values), 1), _LARGEST) + tl.sum(values * 0.0, 1)
    tl.store(scales + row * groups + g, scale, mask=g < groups)
    divisor = tl.where(scale == scale, tl.maximum(scale, _SMALLEST), 1.0)[:, None]
    values = tl.where(values == values, tl.math.div_rn(values, divisor), 0.0)
    values = tl.clamp(rounded(values, 448), -448.0, 448.0)
    tl.store(codes + row * depth + d, values.to(codes.dtype.element_ty), mask=d < depth)


def quantise_rows(x: torch.Tensor) -> ScaledRows:
    """Return rows `[T, K]`, unit stride in `K`, as codes and scales: `scale = max |x| / 448` of 128 inputs."""
    tokens, depth = x.shape
    assert x.stride(1) == 1
    groups = triton.cdiv(depth, GROUP)
    codes = torch.empty(tokens, depth, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(tokens, groups, dtype=torch.float32, device=x.device)
    if tokens:
        size = min(_GROUPS, triton.next_power_of_2(groups))
        quantise_rows_kernel[(tokens, triton.cdiv(groups, size))](
            x, codes, scales, x.stride(0), depth, groups, GROUPS=size, GROUP=GROUP
        )
    return ScaledRows(codes, scales)
