"""Attention of one piece of a step: by the compiled kernel or those of CUDA where they can, else by PyTorch."""

from __future__ import annotations

import torch

from workers.attention import compiled, cuda, torch_backend
from workers.attention.plan import AttentionPlan, Queries
from workers.kv.paged import LayerKV, PageTable


def attend(
    q: Queries, kv: LayerKV, table: PageTable, plan: AttentionPlan, scales: torch.Tensor,
    visited: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Compute attention of the rows of one plan over their paged context.

    Args:
        q: `[T, H, D]` under every rotation that `plan.regions` names.
        kv: one layer of the cache; the rows' own keys and values are already written.
        table: the pages of the sequence.
        plan: which keys every tile of rows visits.
        scales: `[T]` float32 in host memory, the factor on a row's logits.
        visited: `[H]` int64 in host memory, filled with the number of query-key pairs that every head visits.

    Returns:
        `[T, H, D]` in the type of `q`.
    """
    if compiled.supports(q.intra, kv):
        return compiled.attend(q, kv, table, plan, scales, visited=visited)
    if cuda.supports(q.intra, kv, plan):
        return cuda.attend(q, kv, table, plan, scales, visited)
    if visited is not None:
        visited.copy_(torch.tensor([plan.visited_pairs(head) for head in range(len(visited))]))
    return torch_backend.attend(q, kv, table, plan, scales)
