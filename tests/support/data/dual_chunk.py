"""Dual chunk attention from its definition, pair by pair: nothing is shared with the product but the tensors.

Every pair of a query at `p` and a key at `j` has one relative position, which depends on the chunks of both; the logit
is the rotation of the pair by it, so no tensor is ever rotated by a position.
"""

from __future__ import annotations

import math

import torch


def relative_positions(
    queries: torch.Tensor, keys: torch.Tensor, chunk_size: int, local_size: int, continuous: bool = False
) -> torch.Tensor:
    """Position of the query minus that of the key, `[T, S]`, for absolute positions `[T]` and `[S]`.

    `continuous` leaves out the limits, as the estimate of sparse prefill does.
    """
    size = chunk_size - local_size
    chunk, key_chunk = (queries // size)[:, None], (keys // size)[None, :]
    own = (queries % size)[:, None].expand(len(queries), len(keys))
    following, far = own + size, own + chunk_size
    if not continuous:
        following, far = following.clamp(max=chunk_size), torch.full_like(own, min(2 * size - 1, chunk_size))
    position = torch.where(key_chunk == chunk, own, torch.where(key_chunk == chunk - 1, following, far))
    return position - (keys % size)[None, :]


def length_scale(row: int, prompt_len: int, original: int) -> float:
    """`s(n)` of a row."""
    return max(1.0, 0.1 * math.log(max(prompt_len, row + 1) / original) + 1.0) if original > 0 else 1.0


def pairwise_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, relative: torch.Tensor, inv_freq: torch.Tensor,
    scales: torch.Tensor, visible: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention of the last rows of a context in float64.

    Args:
        q: `[T, H, D]`, not rotated, of the last `T` positions. k, v: `[S, K, D]`, not rotated.
        relative: `[T, S]`. inv_freq: `[D / 2]`. scales: `[T]`, the factor on a row's logits.
        visible: `[H, T, S]`, pairs that take part; None: all.
    """
    weights = probabilities(q, k, relative, inv_freq, scales, visible)
    return torch.einsum("hts,shd->thd", weights, v.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1))


def probabilities(
    q: torch.Tensor, k: torch.Tensor, relative: torch.Tensor, inv_freq: torch.Tensor, scales: torch.Tensor,
    visible: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The softmax `[H, T, S]` of the last rows of a context; `visible` `[H, T, S]` leaves out more than later keys."""
    rows, heads, dim = q.shape
    context, kv_heads, half = k.shape[0], k.shape[1], dim // 2
    angles = relative.double()[..., None] * inv_freq.double()
    cos, sin = angles.cos(), angles.sin()
    later = torch.arange(context)[None, :] > torch.arange(context - rows, context)[:, None]
    logits = torch.empty(heads, rows, context, dtype=torch.float64)
    for head in range(heads):
        own = head // (heads // kv_heads)
        (a, b), (c, d) = q[:, head].double().split(half, dim=1), k[:, own].double().split(half, dim=1)
        same = torch.einsum("ti,si,tsi->ts", a, c, cos) + torch.einsum("ti,si,tsi->ts", b, d, cos)
        cross = torch.einsum("ti,si,tsi->ts", b, c, sin) - torch.einsum("ti,si,tsi->ts", a, d, sin)
        logits[head] = (same - cross) * scales.double()[:, None]
    logits.masked_fill_(later, -torch.inf)
    return torch.softmax(logits if visible is None else logits.masked_fill_(~visible, -torch.inf), dim=-1)
