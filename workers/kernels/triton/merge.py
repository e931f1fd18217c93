"""Join attention over disjoint parts of the keys, which a library computed one after the other, in one kernel.

Legend: `T` rows, `H` query heads, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

MOST_PARTS = 4  # three regions of DCA, and the rows' own keys
_ROWS = 16  # of one head, of a program


def merge_parts(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Return `[T, H, D]`: the outputs of 2 to 4 parts weighted by their sums of exponentials, rounded once.

    Args:
        parts: outputs `[T, H, D]` of one type with unit stride in `D`, and natural log-sum-exps `[T, H]` float32, of
            any other strides; minus infinity where a row sees no key of a part, but not of all.
    """
    first = parts[0][0]
    rows, heads, dim = first.shape
    assert 2 <= len(parts) <= MOST_PARTS
    assert all(out.stride(2) == 1 and out.dtype == first.dtype for out, _ in parts)
    merged = torch.empty((rows, heads, dim), dtype=first.dtype, device=first.device)
    padded = [*parts, *[parts[0]] * (MOST_PARTS - len(parts))]
    merge_parts_kernel[triton.cdiv(rows, _ROWS), heads](
        merged, *(one for out, lse in padded for one in (out, *out.stride()[:2], lse, *lse.stride())),
        rows, heads, PARTS=len(parts), ROWS=_ROWS, DIM=dim, WIDTH=triton.next_power_of_2(dim), num_warps=4,
    )  # fmt: skip
    return merged


@triton.jit
def _add_part(
    total: tl.tensor, weight: tl.tensor, largest: tl.tensor, out: tl.tensor, out_row: tl.tensor, out_head: tl.tensor,
    lse: tl.tensor, lse_row: tl.tensor, lse_head: tl.tensor, row: tl.tensor, head: tl.tensor, inside: tl.tensor,
    DIM: tl.constexpr, WIDTH: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Add a part to the weighted sum `total` `[ROWS, WIDTH]`, relative to the `largest` log-sum-exp so far."""
    d = tl.arange(0, WIDTH)
    own = tl.load(lse + row * lse_row + head * lse_head, mask=inside, other=0.0)
    new = tl.maximum(largest, own)
    finite = tl.where(new == float("-inf"), 0.0, new)
    decay, share = tl.exp(largest - finite), tl.exp(own - finite)
    at = out + row[:, None] * out_row + head * out_head + d[None, :]
    values = tl.load(at, mask=inside[:, None] & (d < DIM)[None, :], other=0.0).to(tl.float32)
    return total * decay[:, None] + values * share[:, None], weight * decay + share, new


@triton.jit(do_not_specialize=["rows", "lse_head_0", "lse_head_1", "lse_head_2", "lse_head_3"])  # `T`, as libraries do
def merge_parts_kernel(
    merged,
    out_0, row_0, head_0, lse_0, lse_row_0, lse_head_0,
    out_1, row_1, head_1, lse_1, lse_row_1, lse_head_1,
    out_2, row_2, head_2, lse_2, lse_row_2, lse_head_2,
    out_3, row_3, head_3, lse_3, lse_row_3, lse_head_3,
    rows, heads, PARTS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Join `ROWS` rows of one head."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    inside, d = row < rows, tl.arange(0, WIDTH)
    total, weight = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS], tl.float32)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total, weight, largest = _add_part(
        total, weight, largest, out_0, row_0, head_0, lse_0, lse_row_0, lse_head_0, row, head, inside, DIM, WIDTH
    )
    total, weight, largest = _add_part(
        total, weight, largest, out_1, row_1, head_1, lse_1, lse_row_1, lse_head_1, row, head, inside, DIM, WIDTH
    )
    if PARTS > 2:
        total, weight, largest = _add_part(
            total, weight, largest, out_2, row_2, head_2, lse_2, lse_row_2, lse_head_2, row, head, inside, DIM, WIDTH
        )
    if PARTS > 3:
        total, weight, largest = _add_part(
            total, weight, largest, out_3, row_3, head_3, lse_3, lse_row_3, lse_head_3, row, head, inside, DIM, WIDTH
        )
    to = merged + (row[:, None] * heads + head) * DIM + d[None, :]
    mean = total / weight[:, None]
    tl.store(to, mean.to(merged.dtype.element_ty), mask=inside[:, None] & (d < DIM)[None, :])
