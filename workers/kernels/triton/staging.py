"""Staging: keys and values of one layer as contiguous rows, so that attention kernels know neither pages nor 8 bits.

One kernel follows the pages and multiplies 8-bit rows by their scales; another one copies the columns that a head
selected behind the staged rows. Both sides are one tensor each: a row number names a row of any head, or a column.

Legend: `S` staged positions, `R >= S` rows a KV head, `K` KV heads, `D` head dim, `P` page size, `C` columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from workers.kernels.triton.lists import BLOCK, TILES

_ROWS = 64  # rows of one program
_PADDING = max(TILES)  # rows after the context that a tile may reach into: their keys are masked, but are multiplied


def rows_per_head(stop: int) -> int:
    """Return `R` for the positions before `stop`: the rows behind them, at least a whole tile, are 0."""
    return -(-stop // _PADDING) * _PADDING + _PADDING


def staged_bytes(stop: int, kv_heads: int, dim: int, column_rows: int = 0) -> int:
    """Return the scratch memory of staging in bfloat16: about `4 S K D` bytes, and `4 D` a row for columns."""
    return 4 * dim * (rows_per_head(stop) * kv_heads + column_rows)


@dataclass(frozen=True, slots=True, eq=False)
class Staged:
    """Keys and values `[K * head_rows + column_rows, D]`: position `p` of KV head `k` is row `k * head_rows + p`.

    Positions before `stop` are staged. The last `column_rows` rows are room for gathered columns.
    """

    keys: torch.Tensor
    values: torch.Tensor
    kv_heads: int
    head_rows: int
    column_rows: int
    stop: int

    def by_head(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values `[K, stop - start, D]` of a range of positions, as views."""
        whole = self.kv_heads * self.head_rows
        keys, values = (
            side[:whole].view(self.kv_heads, self.head_rows, side.shape[1])[:, start:stop]
            for side in (self.keys, self.values)
        )
        return keys, values


def stage(
    keys: torch.Tensor, values: torch.Tensor, key_scales: torch.Tensor | None, value_scales: torch.Tensor | None,
    page_slots: torch.Tensor, page_size: int, stop: int, *, column_rows: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Staged:  # fmt: skip
    """Stage the positions before `stop` of one sequence in one layer.

    Args:
        keys, values: the cache `[K, slots, D]`, rows contiguous, in a floating point type of 8, 16 or 32 bits or int8.
        key_scales, value_scales: `[K, slots]` float32, the factors of 8-bit rows; None where there are none.
        page_slots: `[pages]` int32 on the device, the first slot of every page.
        column_rows: room for gathered columns.
        dtype: of the staged rows.

    Raises:
        ValueError: the pages do not reach position `stop - 1`.
    """
    kv_heads, _, dim = keys.shape
    if not 0 < stop <= len(page_slots) * page_size:
        raise ValueError(f"staging: positions before {stop} of {len(page_slots)} pages of {page_size}: out of range")
    head_rows = rows_per_head(stop)
    shape = kv_heads * head_rows + column_rows, dim
    side_rows = [torch.empty(shape, dtype=dtype, device=keys.device) for _ in range(2)]
    staged = Staged(side_rows[0], side_rows[1], kv_heads, head_rows, column_rows, stop)
    for side, scales, target in ((keys, key_scales, staged.keys), (values, value_scales, staged.values)):
        stage_kernel[head_rows // _ROWS, kv_heads](
            side, side.stride(0), scales, 0 if scales is None else scales.stride(0), page_slots, target, stop,
            head_rows, P=page_size, N=_ROWS, D=dim, num_warps=4,
        )  # fmt: skip
    return staged


def column_room(capacity: int) -> int:
    """Return the rows that the gathered columns of one head take: whole blocks."""
    return -(-capacity // BLOCK) * BLOCK


def gather_columns(
    staged: Staged, columns: torch.Tensor, num_columns: torch.Tensor, order: torch.Tensor, group: int
) -> None:
    """Copy the columns of the heads `order` `[n]` behind the staged rows; those of `order[i]` are the `i`-th there.

    Args:
        columns, num_columns: `[H, C]` and `[H]` of `CellLists`.
        group: query heads a KV head.
    """
    room, dim = column_room(columns.shape[1]), staged.keys.shape[1]
    assert len(order) * room <= staged.column_rows
    gather_columns_kernel[room // _ROWS, len(order)](
        staged.keys, staged.values, columns, columns.stride(0), num_columns, order, staged.head_rows,
        staged.kv_heads * staged.head_rows, room, group, N=_ROWS, D=dim, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["stop"])
def stage_kernel(
    side: tl.tensor, side_head: tl.tensor, scales: tl.tensor, scale_head: tl.tensor, page_slots: tl.tensor,
    target: tl.tensor, stop: tl.tensor, head_rows: tl.tensor, P: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
) -> None:  # fmt: skip
    """Write `N` rows of one KV head of keys or values; 0 for positions from `stop` on."""
    head = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0) * N + tl.arange(0, N)
    is_there = position < stop
    slot = tl.load(page_slots + position // P, mask=is_there, other=0) + position % P
    dim = tl.arange(0, D)[None, :]
    source = side + head * side_head + slot.to(tl.int64)[:, None] * D + dim
    rows = tl.load(source, mask=is_there[:, None])
    if scales is not None:
        factor = tl.load(scales + head * scale_head + slot, mask=is_there, other=0.0)
        rows = rows.to(tl.float32) * factor[:, None]
    wide = tl.where(is_there[:, None], rows.to(tl.float32), 0.0)
    at = target + (head * head_rows + position.to(tl.int64))[:, None] * D + dim
    tl.store(at, wide.to(target.dtype.element_ty))


@triton.jit(do_not_specialize=["column_stride"])
def gather_columns_kernel(
    keys: tl.tensor, values: tl.tensor, columns: tl.tensor, column_stride: tl.tensor, num_columns: tl.tensor,
    order: tl.tensor, head_rows: tl.tensor, first_row: tl.tensor, room: tl.tensor, group: tl.tensor,
    N: tl.constexpr, D: tl.constexpr,
) -> None:  # fmt: skip
    """Copy `N` columns of one head; 0 from the end of its list to that of the block, nothing after it."""
    rank = tl.program_id(1)
    head = tl.load(order + rank)
    count = tl.load(num_columns + head)
    index = tl.program_id(0) * N + tl.arange(0, N)
    is_there = index < count
    column = tl.load(columns + head.to(tl.int64) * column_stride + index, mask=is_there, other=0)
    is_written = (index < (count + N - 1) // N * N)[:, None]
    dim = tl.arange(0, D)[None, :]
    source = ((head // group) * head_rows + column).to(tl.int64)[:, None] * D + dim
    target = (first_row + rank * room + index).to(tl.int64)[:, None] * D + dim
    tl.store(keys + target, tl.load(keys + source, mask=is_there[:, None], other=0.0), mask=is_written)
    tl.store(values + target, tl.load(values + source, mask=is_there[:, None], other=0.0), mask=is_written)
