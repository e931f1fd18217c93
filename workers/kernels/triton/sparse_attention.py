"""Vertical-slash attention of one cell: a kernel that executes entries and decides nothing.

A program computes one tile of rows of one head. It adds the keys of its own rows with a causal mask, and then the
blocks of keys that its entries name, under the rotation of their region, in one softmax. All heads share the kernel;
programs run head by head, so that the keys of few heads are in the L2 cache, and heads with most entries first.

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
from workers.kernels.triton.staging import Staged


def launch_options(tile: int, capability: tuple[int, int]) -> dict[str, int]:
    """Return how the kernel is built.

    A block is loaded from where its entry says. Of five stages keys and values are in three, so that two blocks are
    under way while one is multiplied; on 8.x and 10.x that spills with heads of 64 values.
    """
    return {"num_warps": 8 if tile == 128 else 4, "num_stages": 5 if capability[0] == 9 else 3}


def sparse_attention(
    q: QuerySides, rows: Rows, staged: Staged, scales: torch.Tensor, order: torch.Tensor, dense: torch.Tensor,
    entries: Entries, tile: int, out: torch.Tensor, target: Target | None = None,
) -> None:  # fmt: skip
    """Compute attention of the heads `order` `[n]` that are not `dense` `[H]` into `out` `[T, H, D]`.

    Args:
        scales: `[T]` float32 on the device, the factors on the logits.
        entries: those of the heads in `order`, made with `tile` rows a tile.
    """
    length, heads, dim = out.shape
    target = target or Target.of(out.device)
    tiles, keys = rows.tiles(tile), target.sides(staged, BLOCK)
    sparse_attention_kernel[(tiles * len(order),)](
        *q.arguments(), *keys, scales, out, out.stride(0), order, dense, entries.entries, entries.ends, rows.start,
        length, tiles, entries.entries.shape[-1], staged.head_rows, heads // staged.kv_heads, M=tile, N=BLOCK, D=dim,
        TMA=target.tma, DOT=target.dot, **launch_options(tile, target.capability),
    )  # fmt: skip


@triton.jit(do_not_specialize=["start", "length", "tiles", "room"])
def sparse_attention_kernel(
    intra: tl.tensor, intra_row: tl.tensor, intra_head: tl.tensor,
    succ: tl.tensor, succ_row: tl.tensor, succ_head: tl.tensor,
    inter: tl.tensor, inter_row: tl.tensor, inter_head: tl.tensor,
    keys: tl.tensor, values: tl.tensor, scales: tl.tensor, out: tl.tensor, out_row: tl.tensor,
    order: tl.tensor, dense: tl.tensor, entries: tl.tensor, ends: tl.tensor,
    start: tl.tensor, length: tl.tensor, tiles: tl.tensor, room: tl.tensor, head_rows: tl.tensor, group: tl.tensor,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr, DOT: tl.constexpr,
) -> None:  # fmt: skip
    """Compute attention of tile `pid % tiles`, from the last, of head `order[pid // tiles]`; dense heads are left out.

    Args:
        intra, succ, inter: queries `[T, H, D]` with strides of rows and heads.
        keys, values: `[rows, D]`: `head_rows` rows a KV head by position, then gathered columns.
        scales: `[T]` float32, the factors on the logits.
        out: `[T, H, D]`, rows `out_row` values apart.
        entries, ends: of the heads in `order`, as `entries.fill_entries` makes them; `room` is `E`.
        start: the position of the first row.
        group: `H // K`.
    """
    rank = tl.program_id(0) // tiles
    tile = tiles - 1 - tl.program_id(0) % tiles
    head = tl.load(order + rank)
    is_dense = tl.load(dense + head) != 0
    first = tile * M
    stop = tl.where(is_dense, 0, length)  # rows from here on are not stored
    scale = load_scales(scales, first, length, M)
    q = load_queries(intra, intra_row, intra_head, head, first, length, M, D, DOT)
    acc, total = tl.zeros([M, D], tl.float32), tl.zeros([M], tl.float32)
    largest = tl.full([M], float("-inf"), tl.float32)
    own = head // group * head_rows + start + first
    acc, total, largest = causal_step(q, keys, values, own, scale, acc, total, largest, M, N, D, TMA, DOT)

    program = (rank * tiles + tile).to(tl.int64)
    row_at = entries + program * 3 * room
    low_at, high_at = row_at + room, row_at + 2 * room
    key = tl.arange(0, N)
    for turn in range(3):
        region = 2 - turn  # intra, succ, inter: entries are in order of position
        side = tl.where(region == 2, intra, tl.where(region == 1, succ, inter))
        row_stride = tl.where(region == 2, intra_row, tl.where(region == 1, succ_row, inter_row))
        head_stride = tl.where(region == 2, intra_head, tl.where(region == 1, succ_head, inter_head))
        q = load_queries(side, row_stride, head_stride, head, first, length, M, D, DOT)
        for entry in range(tl.load(ends + program * 4 + region), tl.load(ends + program * 4 + region + 1)):
            row = tl.load(row_at + entry)
            word = tl.where(key < 32, tl.load(low_at + entry), tl.load(high_at + entry))
            bias = tl.where((word >> (key % 32)) & 1 != 0, 0.0, float("-inf"))
            k = load_block(keys, row, N, D, TMA).to(DOT)
            logits = tl.dot(q, k.T) + bias[None, :]
            v = load_block(values, row, N, D, TMA)
            acc, total, largest = softmax_step(logits, v, scale, acc, total, largest, DOT)
    store_rows(out, acc / total[:, None], out_row, head, first, stop, M, D)
