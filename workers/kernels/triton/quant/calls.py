"""Calls of the products with quantised weights; Triton is imported when one is called for the first time.

Where `supports` says no, weights are dequantised for each call.

Legend: `T` tokens, `K` inputs, `N` outputs, `M` hidden size, `I` intermediate, `Er` experts of the shard.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from workers.kernels.device import capability
from workers.kernels.triton.layer import calls

if TYPE_CHECKING:
    from workers.quant.weight import QuantizedWeight

_TYPES = (torch.bfloat16, torch.float16)


def supports(x: torch.Tensor, *weights: QuantizedWeight) -> bool:
    """Return whether the kernels multiply rows `x` with all of these weights."""
    if x.dtype not in _TYPES or not calls.supports(x.device):
        return False
    from workers.kernels.triton.quant import products

    return all(products.takes(weight) for weight in weights)


def linear(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute `x @ weight.T + bias` for `[T, K]` and `[N, K]`."""
    from workers.kernels.triton.quant import products

    return products.linear(x, weight, bias, capability(x.device))


def run_experts(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, gate_up: QuantizedWeight, down: QuantizedWeight,
    first: int,
) -> torch.Tensor:  # fmt: skip
    """Compute the weighted sum of experts `first` on `[T, M]`, without waiting for the device."""
    from workers.kernels.triton.quant import products

    return products.run_experts(x, experts, weights, gate_up, down, first, capability(x.device))
