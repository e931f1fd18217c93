"""Staging: keys and values of one layer as contiguous rows, so that attention kernels know neither pages nor 8 bits.

One kernel follows the pages and multiplies 8-bit rows by their scales. A cache that has the type of staged rows and
whose context lies in one run of slots is such rows as it is: nothing is copied. Another kernel copies the columns that
heads selected to rows of their own.

Legend: `S` staged positions, `R >= S` rows a KV head, `K` KV heads, `H` query heads, `D` head dim, `P` page size,
`C` columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from workers.kernels.triton.lists import BLOCK, CellLists

_ROWS = 64  # rows of one program
MOST_KEYS = 128  # of a block that a kernel loads; no context has fewer staged rows


def rows_per_head(stop: int) -> int:
    """Return `R` for the positions before `stop`: whole blocks of `_ROWS`, and no fewer than a kernel loads at once."""
    return max(MOST_KEYS, -(-stop // _ROWS) * _ROWS)


def staged_bytes(stop: int, kv_heads: int, dim: int) -> int:
    """Return the scratch memory of staging in bfloat16: about `4 S K D` bytes."""
    return 4 * dim * rows_per_head(stop) * kv_heads


def column_bytes(capacity: int, dim: int) -> int:
    """Return the scratch memory of the gathered columns of one head in bfloat16."""
    return 4 * dim * column_room(capacity)


@dataclass(frozen=True, slots=True, eq=False)
class Staged:
    """Keys and values `[rows, D]`: position `p < stop` of KV head `k` is row `k * head_rows + p`.

    Other rows may hold anything, NaN too, but for those before `MOST_KEYS`, which are 0. So kernels read blocks of keys
    from positions up to `last_block` on.
    """

    keys: torch.Tensor
    values: torch.Tensor
    kv_heads: int
    head_rows: int
    stop: int

    def last_block(self, keys: int) -> int:
        """Return the last position at which a block of so many keys may begin, without one behind the context."""
        return max(0, self.stop - keys)

    def by_head(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values `[K, stop, D]`, as views."""
        keys, values = (
            side.as_strided(
                (self.kv_heads, self.stop, side.shape[1]), (self.head_rows * side.shape[1], side.shape[1], 1)
            )
            for side in (self.keys, self.values)
        )
        return keys, values


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """Gathered columns: keys and values `[n * room, D]`, those of the `i`-th head from row `i * room` on."""

    keys: torch.Tensor
    values: torch.Tensor
    room: int

    @staticmethod
    def empty(heads: int, capacity: int, like: torch.Tensor) -> Columns:
        """Make room for `capacity` columns of some heads, of the type of the staged rows `like`."""
        room = column_room(capacity)
        keys, values = (like.new_empty(heads * room, like.shape[1]) for _ in range(2))
        return Columns(keys, values, room)


def in_place(keys: torch.Tensor, values: torch.Tensor, first_slot: int, stop: int) -> Staged:
    """Return the rows of a cache `[K, slots, D]` whose positions before `stop` lie from slot `first_slot` on, as views.

    Raises:
        ValueError: the context is shorter than a block of keys, or its slots are not there.
    """
    kv_heads, slots, dim = keys.shape
    if not MOST_KEYS <= stop <= slots - first_slot:
        raise ValueError(f"positions before {stop} from slot {first_slot} of {slots}: need {MOST_KEYS} or more, in one")
    head_rows = keys.stride(0) // dim
    assert keys.stride() == values.stride() == (head_rows * dim, dim, 1)
    shape = (kv_heads - 1) * head_rows + stop, dim
    flat = [side.as_strided(shape, (dim, 1), side.storage_offset() + first_slot * dim) for side in (keys, values)]
    return Staged(flat[0], flat[1], kv_heads, head_rows, stop)


def stage(
    keys: torch.Tensor, values: torch.Tensor, key_scales: torch.Tensor | None, value_scales: torch.Tensor | None,
    page_slots: torch.Tensor, page_size: int, stop: int, *, dtype: torch.dtype = torch.bfloat16,
) -> Staged:  # fmt: skip
    """Stage the positions before `stop` of one sequence in one layer.

    Args:
        keys, values: the cache `[K, slots, D]`, rows contiguous, in a floating point type of 8, 16 or 32 bits or int8.
        key_scales, value_scales: `[K, slots]` float32, the factors of 8-bit rows; None where there are none.
        page_slots: `[pages]` int32 on the device, the first slot of every page.
        dtype: of the staged rows.

    Raises:
        ValueError: the pages do not reach position `stop - 1`.
    """
    kv_heads, _, dim = keys.shape
    if not 0 < stop <= len(page_slots) * page_size:
        raise ValueError(f"staging: positions before {stop} of {len(page_slots)} pages of {page_size}: out of range")
    head_rows = rows_per_head(stop)
    side_rows = [torch.empty(kv_heads * head_rows, dim, dtype=dtype, device=keys.device) for _ in range(2)]
    staged = Staged(side_rows[0], side_rows[1], kv_heads, head_rows, stop)
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
    columns: Columns, lists: CellLists, staged: Staged, order: torch.Tensor, head_tiles: torch.Tensor, group: int
) -> None:
    """Copy the columns of the heads `order` `[n]` that have tiles of the rows of `lists`.

    Args:
        head_tiles: `[H]` of `lists.Choice`; heads with another value are left out.
        group: query heads a KV head.
    """
    assert len(order) * columns.room <= len(columns.keys)
    gather_columns_kernel[columns.room // _ROWS, len(order)](
        columns.keys, columns.values, staged.keys, staged.values, lists.columns, lists.columns.stride(0),
        lists.num_columns, order, head_tiles, staged.head_rows, columns.room, group, M=lists.tile, N=_ROWS,
        D=staged.keys.shape[1], num_warps=4,
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


@triton.jit(do_not_specialize=["column_stride"], do_not_specialize_on_alignment=["columns", "num_columns", "order"])
def gather_columns_kernel(
    column_keys: tl.tensor, column_values: tl.tensor, keys: tl.tensor, values: tl.tensor, columns: tl.tensor,
    column_stride: tl.tensor, num_columns: tl.tensor, order: tl.tensor, head_tiles: tl.tensor, head_rows: tl.tensor,
    room: tl.tensor, group: tl.tensor, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
) -> None:  # fmt: skip
    """Copy `N` columns of one head; 0 from the end of its list to that of the block, nothing after it."""
    rank = tl.program_id(1)
    head = tl.load(order + rank)
    count = tl.where(tl.load(head_tiles + head) == M, tl.load(num_columns + head), 0)
    index = tl.program_id(0) * N + tl.arange(0, N)
    is_there = index < count
    column = tl.load(columns + head.to(tl.int64) * column_stride + index, mask=is_there, other=0)
    is_written = (index < (count + N - 1) // N * N)[:, None]
    dim = tl.arange(0, D)[None, :]
    source = ((head // group) * head_rows + column).to(tl.int64)[:, None] * D + dim
    target = (rank * room + index).to(tl.int64)[:, None] * D + dim
    for_keys = tl.load(keys + source, mask=is_there[:, None], other=0.0)
    tl.store(column_keys + target, for_keys, mask=is_written)
    for_values = tl.load(values + source, mask=is_there[:, None], other=0.0)
    tl.store(column_values + target, for_values, mask=is_written)
