"""Normalisation, linear layers and the gated MLP of the decoder.

Legend: `T` tokens, `M` hidden size, `I` intermediate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from workers.kernels.abi import STRIP
from workers.kernels.blocking import row_blocks
from workers.kernels.triton.layer import calls
from workers.kernels.triton.quant import calls as quantised
from workers.model import compiled
from workers.quant.weight import QuantizedWeight, RowStack, Weight, plain


def inverse_rms(wide: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute `1 / sqrt(mean(wide ** 2) + eps)` over the last dimension, which is kept with size 1, in float32."""
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return norm.square_().div_(wide.shape[-1]).add_(eps).rsqrt_()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute the root mean square norm over the last dimension, weighted in float32 and rounded once."""
    if compiled.supports_rms_norm(x):
        return compiled.rms_norm(x, weight, eps)
    out = torch.empty_like(x)
    wide_weight = weight.float()
    for rows in row_blocks(x):
        wide = x[rows].float()
        out[rows] = (wide * inverse_rms(wide, eps)).mul_(wide_weight)
    return out


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `x + delta` and its `rms_norm`, `[T, M]` each; `delta` may be overwritten, and is 0 where it is None."""
    if calls.supports(x.device):
        return calls.add_rms_norm(x, delta, weight, eps)
    if delta is not None and delta.is_contiguous() and compiled.supports_rms_norm(x):
        return delta, compiled.rms_norm(x, weight, eps, delta)  # one pass: a row's sum is normed while it is cached
    total = x if delta is None else delta.add_(x)
    return total, rms_norm(total, weight, eps)


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute `x @ weight.T + bias` for `[T, in]` and `[out, in]`; the weight may be packed (`compiled`) or quantised.

    A single row on a CPU takes the matrix-vector product: it reads plain weights once, where the matrix product repacks
    them first, at about half the speed.
    """
    if compiled.is_packed(weight) and x.dtype == torch.bfloat16:
        return compiled.linear(x, weight, bias)
    if isinstance(weight, RowStack):
        sizes = [part.shape[0] for part in weight.parts]
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        return torch.cat([linear(x, *part) for part in zip(weight.parts, biases, strict=True)], dim=-1)
    if isinstance(weight, QuantizedWeight) and quantised.supports(x, weight):
        return quantised.linear(x, weight, bias)
    weight = plain(weight, x.dtype)
    if x.shape[0] == 1 and x.device.type == "cpu":
        row = torch.mv(weight, x[0])
        return (row if bias is None else row.add_(bias))[None]
    return F.linear(x, weight, bias)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Compute `silu(gate) * up` for `[T, 2 I]` holding gate, then up; it may overwrite and return the first half."""
    if calls.supports(gate_up.device):
        return calls.swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate, inplace=True).mul_(up)


def gated_mlp(
    x: torch.Tensor, gate_up: Weight, down: Weight, gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Compute the dense MLP of one shard on `x` `[T, M]`; returns this shard's partial sum `[T, M]`."""
    if not (compiled.is_packed(gate_up) and compiled.has_pairs(gate_up)):
        return linear(swiglu(linear(x, gate_up, gate_up_bias)), down, down_bias)
    assert gate_up_bias is None
    assert down_bias is None
    if compiled.is_packed(down):
        return compiled.run_mlp(x, gate_up, down)
    turns = linear(x, gate_up).unflatten(1, (-1, 2, STRIP))
    return linear(swiglu(turns.transpose(1, 2).flatten(1)), down)
