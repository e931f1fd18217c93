"""The definition of the weighted sum of experts, one token and one expert at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from protos.stage.messages import Span


def run_experts_reference(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
    local: Span,
) -> torch.Tensor:  # fmt: skip
    """Compute what `moe.run_experts` computes, in float32; the result has the type of `x`."""
    out = torch.zeros(x.shape, dtype=torch.float32)
    for token in range(x.shape[0]):
        for expert, weight in zip(experts[token].tolist(), weights[token].tolist(), strict=True):
            if local.start <= expert < local.stop:
                gate, up = (gate_up[expert - local.start].float() @ x[token].float()).chunk(2)
                out[token] += weight * (down[expert - local.start].float() @ (F.silu(gate) * up))
    return out.to(x.dtype)
