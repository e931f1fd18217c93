"""Parts that the attention kernels share: rows of K, V and queries, and one step of the online softmax.

Legend: `M` rows of a tile, `N` keys of a block, `D` head dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from workers.kernels.device import capability
from workers.kernels.triton.staging import Columns, Staged

LOG2_E = tl.constexpr(1.4426950408889634)


class Target(NamedTuple):
    """How kernels read memory and multiply, and for which compute capability.

    `tma`: by tensor descriptors, from 9.0 on; `dot`: the type of the operands; `rows_dtype`: that of staged rows.
    """

    tma: bool
    dot: tl.dtype
    rows_dtype: torch.dtype
    capability: tuple[int, int] = (8, 0)

    @staticmethod
    def of(device: torch.device) -> Target:
        """Return that of a GPU; of other devices that of the interpreter, which multiplies no bfloat16."""
        if device.type == "cpu":
            return Target(False, tl.float32, torch.float32)
        found = capability(device)
        return Target(found >= (9, 0), tl.bfloat16, torch.bfloat16, found)

    def sides(self, rows: Staged | Columns, keys: int) -> tuple[Any, Any]:
        """Return keys and values as kernels take them that load blocks of so many rows."""
        if not self.tma:
            return rows.keys, rows.values
        box = [keys, rows.keys.shape[1]]
        return TensorDescriptor.from_tensor(rows.keys, box), TensorDescriptor.from_tensor(rows.values, box)


class QuerySides(NamedTuple):
    """Queries `[T, H, D]` with unit stride in `D` for the three regions; None where no row has keys of a region."""

    intra: torch.Tensor
    succ: torch.Tensor | None
    inter: torch.Tensor | None

    def arguments(self) -> list[Any]:
        """Return tensor, stride of rows and stride of heads of each region; `intra` stands in for missing ones."""
        sides = [self.intra if side is None else side for side in self]
        return [value for side in sides for value in (side, side.stride(0), side.stride(1))]


@triton.jit
def load_block(side: tl.tensor, row: tl.tensor, N: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr) -> tl.tensor:
    """Load rows `row .. row + N - 1` of keys or values `[rows, D]`: `[N, D]`.

    `side` is a tensor descriptor with blocks `[N, D]` where `TMA` is set, else a pointer; all rows must exist.
    """
    if TMA:
        block = side.load([row, 0])
    else:
        rows = row.to(tl.int64) + tl.arange(0, N)
        block = tl.load(side + rows[:, None] * D + tl.arange(0, D)[None, :])
    return block


@triton.jit
def load_queries(
    q: tl.tensor, row_stride: tl.tensor, head_stride: tl.tensor, head: tl.tensor, first: tl.tensor, length: tl.tensor,
    M: tl.constexpr, D: tl.constexpr, DOT: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Load queries `[M, D]` of one head from row `first` on; 0 for rows from `length` on."""
    rows = first + tl.arange(0, M)
    at = q + head.to(tl.int64) * head_stride + rows.to(tl.int64)[:, None] * row_stride + tl.arange(0, D)[None, :]
    return tl.load(at, mask=rows[:, None] < length, other=0.0).to(DOT)


@triton.jit
def store_rows(
    out: tl.tensor, values: tl.tensor, row_stride: tl.tensor, head: tl.tensor, first: tl.tensor, length: tl.tensor,
    M: tl.constexpr, D: tl.constexpr,
) -> None:  # fmt: skip
    """Store `[M, D]` in rows from `first` on of `out` `[T, H, D]`; nothing from row `length` on."""
    rows = first + tl.arange(0, M)
    at = out + head.to(tl.int64) * D + rows.to(tl.int64)[:, None] * row_stride + tl.arange(0, D)[None, :]
    tl.store(at, values.to(out.dtype.element_ty), mask=rows[:, None] < length)


@triton.jit
def load_scales(scales: tl.tensor, first: tl.tensor, length: tl.tensor, M: tl.constexpr) -> tl.tensor:
    """Load the factors of the rows' logits `[M]`, for powers of 2."""
    rows = first + tl.arange(0, M)
    return tl.load(scales + rows, mask=rows < length, other=1.0) * LOG2_E


@triton.jit
def softmax_step(
    logits: tl.tensor, v: tl.tensor, scale: tl.tensor, out: tl.tensor, total: tl.tensor, largest: tl.tensor,
    DOT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Add a block of keys to the online softmax.

    Args:
        logits: `[M, N]` without the factor `scale` `[M]`; minus infinity for pairs that take no part.
        v: `[N, D]`.
        out: `[M, D]`, the values weighted so far.
        total: `[M]`, the sum of the weights.
        largest: `[M]`, the largest scaled logit; finite, or `logits` has a finite one in every row.

    Returns:
        The new `out`, `total` and `largest`.
    """
    new = tl.maximum(largest, tl.max(logits, 1) * scale)
    weights = tl.exp2(logits * scale[:, None] - new[:, None])
    decay = tl.exp2(largest - new)
    out = tl.dot(weights.to(DOT), v.to(DOT), out * decay[:, None])
    return out, total * decay + tl.sum(weights, 1), new


@triton.jit
def causal_step(
    q: tl.tensor, keys: tl.tensor, values: tl.tensor, own: tl.tensor, first: tl.tensor, last_block: tl.tensor,
    scale: tl.tensor, out: tl.tensor, total: tl.tensor, largest: tl.tensor, M: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, TMA: tl.constexpr, DOT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Add the keys of the tile's own rows, which are at positions from `first` on; the state is that of softmax_step.

    It must be the first of a tile's steps: every row sees a key of the first block, so that `largest` is finite from
    then on. `own` is the row of the first position in keys and values, and `last_block` the last position at which a
    block may begin: no row behind the context is read.
    """
    for begin in tl.range(0, M, N, num_stages=2):
        at = tl.minimum(first + begin, last_block)
        key = (at + tl.arange(0, N))[None, :]
        k = load_block(keys, own + at, N, D, TMA).to(DOT)
        logits = tl.dot(q, k.T)
        seen = (first + tl.arange(0, M)[:, None] >= key) & (key >= first + begin)
        logits = tl.where(seen, logits, float("-inf"))
        v = load_block(values, own + at, N, D, TMA)
        out, total, largest = softmax_step(logits, v, scale, out, total, largest, DOT)
    return out, total, largest
