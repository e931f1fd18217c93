"""The slow twin: attention written as its definition, in float32 (or float64 when the inputs are).

Legend: `T` rows, `S` keys, `H` query heads, `K` KV heads, `D` head dim.
"""

from __future__ import annotations

import torch

from workers.attention.plan import AttentionPlan


def attend_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, plan: AttentionPlan, scale: float
) -> torch.Tensor:
    """Attention over a contiguous context, with the whole score matrix in memory.

    Args:
        q: `[T, H, D]`, rotated; row `i` stands at position `start + i`.
        k, v: `[S, K, D]`, rotated keys and values of positions `0 .. S - 1`.
        plan: which pairs take part; pairs it does not name are masked.
        scale: factor on the logits.

    Returns:
        `[T, H, D]` in float32 or float64.
    """
    rows, heads, _ = q.shape
    context, kv_heads, _ = k.shape
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = heads // kv_heads
    k_heads = k.to(work).repeat_interleave(group, dim=1)
    v_heads = v.to(work).repeat_interleave(group, dim=1)
    scores = torch.einsum("thd,shd->hts", q.to(work), k_heads) * scale
    scores = scores.masked_fill(~plan_mask(plan, rows, context, start), float("-inf"))
    return torch.einsum("hts,shd->thd", torch.softmax(scores, dim=-1), v_heads)


def plan_mask(plan: AttentionPlan, rows: int, context: int, start: int) -> torch.Tensor:
    """The pairs a plan visits as a boolean `[T, S]`."""
    mask = torch.zeros(rows, context, dtype=torch.bool)
    positions = torch.arange(context)
    for tile in plan.tiles:
        for keys in tile.keys:
            visible = (positions >= keys.start) & (positions < keys.stop)
            block = visible.expand(tile.stop - tile.start, context)
            if keys.causal:
                own = torch.arange(start + tile.start, start + tile.stop)
                block = block & (positions[None, :] <= own[:, None])
            mask[tile.start : tile.stop] |= block
    return mask
