"""Mixture of experts: route, sort tokens by expert, grouped matrix products, combine.

Legend: `T` tokens, `M` hidden size, `I` expert intermediate, `E` experts of the model, `Er` experts of this shard,
`k` experts a token uses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from protos.messages import Span
from workers.model.layers import swiglu


def route(x: torch.Tensor, router: torch.Tensor, top_k: int, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` experts of every token and their weights.

    Args:
        x: `[T, M]`.
        router: `[E, M]`.
        normalise: divide the kept probabilities by their sum (config key `norm_topk_prob`).

    Returns:
        Expert ids `[T, k]` and weights `[T, k]` in float32.
    """
    probabilities = torch.softmax(F.linear(x, router), dim=-1, dtype=torch.float32)
    weights, experts = probabilities.topk(top_k, dim=-1)
    if normalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return experts, weights


def run_experts(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
    local: Span,
) -> torch.Tensor:  # fmt: skip
    """Weighted sum of this shard's experts; tokens without a local expert get zeros.

    Args:
        x: `[T, M]`.
        experts, weights: `[T, k]` from `route`.
        gate_up: `[Er, 2 I, M]`; down: `[Er, M, I]`.
        local: global ids of the shard's experts.

    Returns:
        `[T, M]`, this shard's partial sum.
    """
    tokens, top_k = experts.shape
    flat = experts.flatten() - local.start
    flat = torch.where((flat >= 0) & (flat < local.size), flat, local.size)  # foreign experts sort behind ours
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=local.size + 1)[: local.size]
    rows = int(counts.sum())
    order = order[:rows]
    hidden = swiglu(_grouped_linear(x[order // top_k], gate_up, counts))
    hidden = hidden * weights.flatten()[order, None].to(hidden.dtype)
    out = _grouped_linear(hidden, down, counts)
    return _combine(out, order, tokens, top_k)


def _combine(out: torch.Tensor, order: torch.Tensor, tokens: int, top_k: int) -> torch.Tensor:
    """Sum the rows that belong to one token; slots served by other shards read a row of zeros."""
    rows = out.shape[0]
    place = torch.full((tokens * top_k,), rows, dtype=torch.int64, device=out.device)
    place[order] = torch.arange(rows, device=out.device)
    if rows < tokens * top_k:
        out = torch.cat([out, out.new_zeros(1, out.shape[1])])
    if tokens == 1:
        return out[place].sum(dim=0, keepdim=True)
    # a bag of rows per token: gathers and adds in one pass, without the [T * k, M] copy
    return F.embedding_bag(place.view(tokens, top_k), out, mode="sum")


def _grouped_linear(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """`x[rows of e] @ weight[e].T` for rows sorted by expert: `[n, in]`, `[Er, out, in]`, `[Er]` -> `[n, out]`."""
    if x.device.type == "cuda" and x.dtype == torch.bfloat16:
        ends = counts.cumsum(0).to(torch.int32)
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    out = x.new_empty(x.shape[0], weight.shape[1])
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            torch.mm(x[start : start + count], weight[expert].t(), out=out[start : start + count])
        start += count
    return out


def run_experts_reference(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
    local: Span,
) -> torch.Tensor:  # fmt: skip
    """Slow twin of `run_experts`: one token and one expert at a time."""
    out = torch.zeros(x.shape, dtype=torch.float32)
    for token in range(x.shape[0]):
        for expert, weight in zip(experts[token].tolist(), weights[token].tolist(), strict=True):
            if local.start <= expert < local.stop:
                gate, up = (gate_up[expert - local.start].float() @ x[token].float()).chunk(2)
                out[token] += weight * (down[expert - local.start].float() @ (F.silu(gate) * up))
    return out.to(x.dtype)
