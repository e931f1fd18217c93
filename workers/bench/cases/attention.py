"""The definition of a plan's attention: the whole score matrix, in float32 (or float64 when the inputs are).

Legend: `T` rows, `S` keys, `H` query heads, `K` KV heads, `D` head dim.
"""

from __future__ import annotations

import numpy as np
import torch

from workers.attention.plan import AttentionPlan, Queries

UNVISITED = -1


def attend_reference(
    q: Queries, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan, scales: torch.Tensor
) -> torch.Tensor:
    """Compute attention over a contiguous context.

    Args:
        q: `[T, H, D]` under every rotation the plan needs; row `i` stands at position `plan.start + i`.
        k, v: `[S, K, D]`, rotated keys and values of positions `0 .. S - 1`.
        plan: which pairs take part; pairs it does not name are masked.
        scales: `[T]`, the factor on a row's logits.

    Returns:
        `[T, H, D]` in float32 or float64.
    """
    work = torch.float64 if q.intra.dtype == torch.float64 else torch.float32
    outputs = []
    for head in range(q.intra.shape[1]):
        scores, v_head = _scores(q, k, v, plan, scales, head, work)
        outputs.append(torch.softmax(scores, dim=-1) @ v_head)
    return torch.stack(outputs, dim=1)


def attend_rounded(
    q: Queries, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Compute the same as a kernel does whose operands have `dtype`: the error of that is what a kernel may have.

    Keys, values and probabilities are rounded to `dtype`, and so is the result; sums are in float32.
    """
    k, v = k.to(dtype), v.to(dtype)
    outputs = []
    for head in range(q.intra.shape[1]):
        scores, v_head = _scores(q, k, v, plan, scales, head, torch.float32)
        mass = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
        outputs.append(mass.to(dtype).float() @ v_head / mass.sum(dim=-1, keepdim=True))
    return torch.stack(outputs, dim=1).to(dtype)


def _scores(
    q: Queries, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan, scales: torch.Tensor, head: int,
    work: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the scaled scores `[T, S]` of one head, minus infinity for pairs it does not visit, and its values."""
    k_head, v_head = (side[:, head * k.shape[1] // q.intra.shape[1]].to(work) for side in (k, v))
    tags = plan_tags(plan, head, k.shape[0]).to(k.device)
    scores = torch.full(tags.shape, -torch.inf, dtype=work, device=k.device)
    for rotation in {rotation for _, _, rotation in plan.regions}:
        scores = torch.where(tags == rotation, q.of(rotation)[:, head].to(work) @ k_head.T, scores)
    return scores * scales.to(k.device, work)[:, None], v_head


def plan_tags(plan: AttentionPlan, head: int, context: int) -> torch.Tensor:
    """Return the rotation of every pair `[T, S]` that one head visits, `UNVISITED` for the others."""
    tags = torch.full((plan.length, context), UNVISITED)
    positions = torch.arange(context)
    for tile in plan.tile_keys(head):
        block = tags[tile.start : tile.stop]
        for rotation, keys in tile.keys.items():
            block[:, torch.from_numpy(keys).long()] = rotation
    own = torch.arange(plan.start, plan.start + plan.length)
    return tags.masked_fill_(positions > own[:, None], UNVISITED)


def tile_pairs(plan: AttentionPlan, head: int) -> int:
    """Count the query-key pairs that one head visits from the spelled out lists of every tile."""
    total = 0
    for tile in plan.tile_keys(head):
        rows = np.arange(plan.start + tile.start, plan.start + tile.stop)
        for keys in tile.keys.values():
            total += int(np.searchsorted(np.sort(keys), rows, side="right").sum())
    return total
