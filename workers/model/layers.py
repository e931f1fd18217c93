"""Small pieces of the decoder: normalisation and the gated MLP.

Legend: `T` tokens, `M` hidden size, `I` intermediate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root mean square norm over the last dimension: computed in float32, rounded to the type of `x`, then weighted."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` for `[T, 2 I]` holding gate then up; returns `[T, I]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gated_mlp(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Dense MLP of one shard on `[T, M]`; the result is this shard's partial sum `[T, M]`."""
    return F.linear(swiglu(F.linear(x, gate_up, gate_up_bias)), down, down_bias)
