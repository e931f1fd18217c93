"""Calls of the kernels of a layer; Triton is imported when one is called for the first time.

Where `supports` says no, PyTorch functions of `workers.model` compute the same: on CPUs, and without Triton.

Legend: `T` tokens, `M` hidden size, `I` intermediate, `E` experts of the model, `k` experts per token, `V` vocabulary.
"""

from __future__ import annotations

import functools
import logging

import torch

from workers.kernels.device import capability, runs_triton
from workers.kernels.triton import PROVEN_ON

_log = logging.getLogger(__name__)


def supports(device: torch.device) -> bool:
    """Return whether the kernels run on a device."""
    return runs_triton(device)


@functools.cache
def warn_unproven(device: torch.device) -> None:
    """Say once in the log that the kernels were never run on such a device."""
    name = ".".join(map(str, capability(device)))
    if name not in PROVEN_ON:
        _log.warning("kernels of Triton were never run on compute capability %s: pytest tests/gpu checks them", name)


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `x + delta` and its root mean square norm, `[T, M]` each; overwrites `delta`."""
    from workers.kernels.triton.layer import rows

    return rows.add_rms_norm(x, delta, weight, eps)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Return `silu(gate) * up` of `[T, 2 I]`, in memory of its own."""
    from workers.kernels.triton.layer import rows

    return rows.swiglu(gate_up)


def route(logits: torch.Tensor, top_k: int, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the experts of every token by its logits `[T, E]`: ids `[T, k]` int64, weights `[T, k]` float32."""
    from workers.kernels.triton.layer import routing

    return routing.route(logits, top_k, normalise)


def run_experts(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
    first: int,
) -> torch.Tensor:  # fmt: skip
    """Compute the weighted sum of experts `first` on `[T, M]`, without waiting for the device."""
    from workers.kernels.triton.layer import experts as products

    return products.run_experts(x, experts, weights, gate_up, down, first, capability(x.device))


def choose_greedily(logits: torch.Tensor) -> torch.Tensor:
    """Return `[2, n]` int64 on the device: the ids of the greatest logits of `[n, V]`, and 1 where all are finite."""
    from workers.kernels.triton.layer import greedy

    return torch.stack([side.to(torch.int64) for side in greedy.choose_greedily(logits)])
