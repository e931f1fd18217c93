"""Dual chunk attention from its definition, pair by pair: nothing is shared with the product but the tensors.

Every pair of a query at `p` and a key at `j` has one relative position, which depends on the chunks of both; the logit
is the rotation of the pair by it, so no tensor is ever rotated by a position.
"""

from __future__ import annotations

import math

import torch


def relative_positions(queries: torch.Tensor, keys: torch.Tensor, chunk_size: int, local_size: int) -> torch.Tensor:
    """Position of the query minus that of the key, `[T, S]`, for absolute positions `[T]` and `[S]`."""
    size = chunk_size - local_size
    chunk, key_chunk = (queries // size)[:, None], (keys // size)[None, :]
    own = (queries % size)[:, None].expand(len(queries), len(keys))
    following = (own + size).clamp(max=chunk_size)
    far = torch.full_like(own, min(2 * size - 1, chunk_size))
    position = torch.where(key_chunk == chunk, own, torch.where(key_chunk == chunk - 1, following, far))
    return position - (keys % size)[None, :]


def length_scale(row: int, prompt_len: int, original: int) -> float:
    """`s(n)` of a row."""
    return max(1.0, 0.1 * math.log(max(prompt_len, row + 1) / original) + 1.0) if original > 0 else 1.0


def pairwise_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, relative: torch.Tensor, inv_freq: torch.Tensor,
    scales: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Attention of the last rows of a context in float64.

    Args:
        q: `[T, H, D]`, not rotated, of the last `T` positions. k, v: `[S, K, D]`, not rotated.
        relative: `[T, S]`. inv_freq: `[D / 2]`. scales: `[T]`, the factor on a row's logits.
    """
    rows, heads, dim = q.shape
    context, kv_heads, half = k.shape[0], k.shape[1], dim // 2
    angles = relative.double()[..., None] * inv_freq.double()
    cos, sin = angles.cos(), angles.sin()
    later = torch.arange(context)[None, :] > torch.arange(context - rows, context)[:, None]
    out = torch.empty(rows, heads, dim, dtype=torch.float64)
    for head in range(heads):
        own = head // (heads // kv_heads)
        (a, b), (c, d) = q[:, head].double().split(half, dim=1), k[:, own].double().split(half, dim=1)
        same = torch.einsum("ti,si,tsi->ts", a, c, cos) + torch.einsum("ti,si,tsi->ts", b, d, cos)
        cross = torch.einsum("ti,si,tsi->ts", b, c, sin) - torch.einsum("ti,si,tsi->ts", a, d, sin)
        logits = ((same - cross) * scales.double()[:, None]).masked_fill(later, -torch.inf)
        out[:, head] = torch.softmax(logits, dim=1) @ v[:, own].double()
    return out
