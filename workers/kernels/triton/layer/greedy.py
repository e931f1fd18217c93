"""The greedy choice of tokens on the device.

Legend: `B` rows, `V` vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096  # logits of a program


@triton.jit
def best_of_parts_kernel(logits, best, ids, damaged, row_stride, width, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """One program: the greatest of `BLOCK` logits of one row, the lowest of its ids, and whether any is not finite."""
    part, row = tl.program_id(0), tl.program_id(1)
    d = part * BLOCK + tl.arange(0, BLOCK)
    inside = d < width
    x = tl.load(logits + row.to(tl.int64) * row_stride + d, mask=inside, other=float("-inf")).to(tl.float32)
    top = tl.max(x, 0)
    at = row * PARTS + part
    tl.store(best + at, top)
    tl.store(ids + at, tl.min(tl.where(x == top, d, width), 0))
    tl.store(damaged + at, tl.sum((inside & (x * 0.0 != 0.0)).to(tl.int32), 0))


@triton.jit
def best_of_rows_kernel(best, ids, damaged, tokens, finite, width, PARTS: tl.constexpr, PADDED: tl.constexpr):
    """One program: the best of the parts of one row."""
    row = tl.program_id(0)
    part = tl.arange(0, PADDED)
    inside = part < PARTS
    value = tl.load(best + row * PARTS + part, mask=inside, other=float("-inf"))
    token = tl.load(ids + row * PARTS + part, mask=inside, other=width)
    wrong = tl.sum(tl.load(damaged + row * PARTS + part, mask=inside, other=0), 0)
    token = tl.min(tl.where(value == tl.max(value, 0), token, width), 0)
    tl.store(tokens + row, tl.minimum(token, width - 1).to(tl.int64))
    tl.store(finite + row, (wrong == 0).to(tl.int32))


def choose_greedily(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids of the greatest logits of `[B, V]`, the lowest of equal ones, without waiting for the device.

    Returns:
        Ids `[B]` int64, inside the vocabulary whatever the logits are; and `[B]` int32, 1 where all logits are finite.
    """
    rows, width = logits.shape
    assert logits.stride(1) == 1
    parts = triton.cdiv(width, _BLOCK)
    best = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    ids, damaged = torch.empty(2, rows, parts, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    finite = torch.empty(rows, dtype=torch.int32, device=logits.device)
    if rows:
        best_of_parts_kernel[(parts, rows)](
            logits, best, ids, damaged, logits.stride(0), width, PARTS=parts, BLOCK=_BLOCK
        )
        padded = triton.next_power_of_2(parts)
        best_of_rows_kernel[(rows,)](best, ids, damaged, tokens, finite, width, PARTS=parts, PADDED=padded)
    return tokens, finite
