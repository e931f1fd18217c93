"""Vertical-slash attention of one cell: a kernel that executes entries and decides nothing.

A program computes one tile of rows of one head. It adds the keys of its own rows with a causal mask, and then the
blocks of keys that its entries name, under the rotation of their region, in one softmax. All heads share the kernel;
programs run head by head, so that the keys of few heads are in the L2 cache, and heads with most work first. Heads
choose the rows of a tile on the device: the kernel is launched for each size, and leaves out heads of another one.

Keys by position and gathered columns are tensors of their own, so that a cache may be read where it lies.

Legend: `T` rows of the cell, `H` query heads, `K` KV heads, `D` head dim, `M` rows of a tile, `E` room for entries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from workers.kernels.triton.blocks import (
    QuerySides,
    Target,
    causal_step,
    load_block,
    load_queries,
    load_scales,
    softmax_step,
    store_rows,
)
from workers.kernels.triton.entries import Entries
from workers.kernels.triton.lists import BLOCK, Rows
from workers.kernels.triton.staging import Columns, Staged


def launch_options(tile: int, capability: tuple[int, int]) -> dict[str, int]:
    """Return how the kernel is built.

    A block is loaded from where its entry says. Of five stages keys and values are in three, so that two blocks are
    under way while one is multiplied; on 8.x and 10.x that spills with heads of 64 values, and on
    10.x three do in tiles of 64 rows.
    """
    return {"num_warps": 8 if tile == 128 else 4, "num_stages": {9: 5, 10: 2}.get(capability[0], 3)}


def sparse_attention(
    q: QuerySides, rows: Rows, staged: Staged, columns: Columns, scales: torch.Tensor, order: torch.Tensor,
    head_tiles: torch.Tensor, entries: Entries, tile: int, out: torch.Tensor, target: Target | None = None,
) -> None:  # fmt: skip
    """Compute attention of the heads `order` `[n]` that have tiles of `tile` rows into `out` `[T, H, D]`.

    Args:
        columns: those of the heads in `order`.
        scales: `[T]` float32 on the device, the factors on the logits.
        head_tiles: `[H]` of `lists.Choice`; heads with another value are left out.
        entries: those of the heads in `order`, made with `tile` rows a tile.
    """
    length, heads, dim = out.shape
    target = target or Target.of(out.device)
    tiles, sides = rows.tiles(tile), (*target.sides(staged, BLOCK), *target.sides(columns, BLOCK))
    sparse_attention_kernel[(tiles * len(order),)](
        *q.arguments(), *sides, scales, out, out.stride(0), order, head_tiles, entries.entries, entries.ends,
        rows.start, length, tiles, entries.entries.shape[-1], staged.last_block(BLOCK), staged.head_rows,
        heads // staged.kv_heads, M=tile, N=BLOCK, D=dim, TMA=target.tma, DOT=target.dot,
        **launch_options(tile, target.capability),
    )  # fmt: skip


@triton.jit
def _entries_step(
    q: tl.tensor, keys: tl.tensor, values: tl.tensor, entries: tl.tensor, room: tl.tensor, begin: tl.tensor,
    end: tl.tensor, scale: tl.tensor, acc: tl.tensor, total: tl.tensor, largest: tl.tensor, N: tl.constexpr,
    D: tl.constexpr, TMA: tl.constexpr, DOT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Add the keys that entries `begin .. end - 1` of a tile name; the state is that of softmax_step."""
    key = tl.arange(0, N)
    for entry in range(begin, end):
        row = tl.load(entries + entry)
        word = tl.where(key < 32, tl.load(entries + room + entry), tl.load(entries + 2 * room + entry))
        bias = tl.where((word >> (key % 32)) & 1 != 0, 0.0, float("-inf"))
        k = load_block(keys, row, N, D, TMA).to(DOT)
        logits = tl.dot(q, k.T) + bias[None, :]
        v = load_block(values, row, N, D, TMA)
        acc, total, largest = softmax_step(logits, v, scale, acc, total, largest, DOT)
    return acc, total, largest


@triton.jit(
    do_not_specialize=["start", "length", "tiles", "room", "last_block"], do_not_specialize_on_alignment=["order"]
)
def sparse_attention_kernel(
    intra: tl.tensor, intra_row: tl.tensor, intra_head: tl.tensor,
    succ: tl.tensor, succ_row: tl.tensor, succ_head: tl.tensor,
    inter: tl.tensor, inter_row: tl.tensor, inter_head: tl.tensor,
    keys: tl.tensor, values: tl.tensor, column_keys: tl.tensor, column_values: tl.tensor, scales: tl.tensor,
    out: tl.tensor, out_row: tl.tensor, order: tl.tensor, head_tiles: tl.tensor, entries: tl.tensor, ends: tl.tensor,
    start: tl.tensor, length: tl.tensor, tiles: tl.tensor, room: tl.tensor, last_block: tl.tensor,
    head_rows: tl.tensor, group: tl.tensor,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr, DOT: tl.constexpr,
) -> None:  # fmt: skip
    """Compute attention of tile `pid % tiles`, from the last, of head `order[pid // tiles]`.

    Args:
        intra, succ, inter: queries `[T, H, D]` with strides of rows and heads.
        keys, values: `[rows, D]`: `head_rows` rows a KV head by position.
        column_keys, column_values: `[rows, D]`, gathered columns.
        scales: `[T]` float32, the factors on the logits.
        out: `[T, H, D]`, rows `out_row` values apart.
        head_tiles: `[H]` int32; a head with another value than `M` is left out.
        entries, ends: of the heads in `order`, as `entries.fill_entries` makes them; `room` is `E`.
        start: the position of the first row.
        last_block: the last position at which a block of the tile's own keys may begin.
        group: `H // K`.
    """
    rank = tl.program_id(0) // tiles
    tile = tiles - 1 - tl.program_id(0) % tiles
    head = tl.load(order + rank)
    if tl.load(head_tiles + head) != M:
        return
    first = tile * M
    scale = load_scales(scales, first, length, M)
    q = load_queries(intra, intra_row, intra_head, head, first, length, M, D, DOT)
    acc, total = tl.zeros([M, D], tl.float32), tl.zeros([M], tl.float32)
    largest = tl.full([M], float("-inf"), tl.float32)
    own = head // group * head_rows
    acc, total, largest = causal_step(
        q, keys, values, own, start + first, last_block, scale, acc, total, largest, M, N, D, TMA, DOT
    )
    program = (rank * tiles + tile).to(tl.int64)
    entries, ends = entries + program * 3 * room, ends + program * 7
    for turn in range(3):
        region = 2 - turn  # intra, succ, inter: entries are in order of position
        side = tl.where(region == 2, intra, tl.where(region == 1, succ, inter))
        row_stride = tl.where(region == 2, intra_row, tl.where(region == 1, succ_row, inter_row))
        head_stride = tl.where(region == 2, intra_head, tl.where(region == 1, succ_head, inter_head))
        q = load_queries(side, row_stride, head_stride, head, first, length, M, D, DOT)
        begin, middle = tl.load(ends + 2 * region), tl.load(ends + 2 * region + 1)
        end = tl.load(ends + 2 * region + 2)
        acc, total, largest = _entries_step(
            q, keys, values, entries, room, begin, middle, scale, acc, total, largest, N, D, TMA, DOT
        )
        acc, total, largest = _entries_step(
            q, column_keys, column_values, entries, room, middle, end, scale, acc, total, largest, N, D, TMA, DOT
        )
    store_rows(out, acc / total[:, None], out_row, head, first, length, M, D)
