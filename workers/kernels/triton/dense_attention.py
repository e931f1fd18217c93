"""Dense attention of the rows of one DCA chunk over their whole staged context: one softmax over the three regions.

It takes rows of different logit factors, and serves the dense heads of a sparse cell: others are left out on the
device, so that the choice need not be known to the host. No row of keys or values behind the context is read.

Legend: `T` rows, `H` query heads, `K` KV heads, `D` head dim, `M` rows of a tile, `N` keys of a block.
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
from workers.kernels.triton.lists import Rows
from workers.kernels.triton.staging import Staged

TILE = 128
OPTIONS = {  # by keys of a block
    128: {"num_warps": 8, "num_stages": 2},
    64: {"num_warps": 8, "num_stages": 3},
    32: {"num_warps": 8, "num_stages": 3},
}


def block_keys(capability: tuple[int, int]) -> int:
    """Return the keys of a block: 128 only fit the registers of Hopper's kernels, and 64 spill on 8.6, 8.9 and 12.x."""
    if capability[0] == 9:
        return 128
    return 32 if capability in ((8, 6), (8, 9)) or capability[0] == 12 else 64


def dense_attention(
    q: QuerySides, rows: Rows, staged: Staged, scales: torch.Tensor, out: torch.Tensor,
    head_tiles: torch.Tensor | None = None, target: Target | None = None,
) -> None:  # fmt: skip
    """Compute attention of heads over all keys into `out` `[T, H, D]`.

    Args:
        scales: `[T]` float32 on the device, the factors on the logits.
        head_tiles: `[H]` of `lists.Choice`; only heads that have 0 there are computed. None: all heads.
    """
    length, heads, dim = out.shape
    target = target or Target.of(out.device)
    keys, tiles = block_keys(target.capability), rows.tiles(TILE)
    dense_attention_kernel[(tiles * heads,)](
        *q.arguments(), *target.sides(staged, keys), scales, out, out.stride(0), head_tiles, rows.start, length,
        rows.succ, rows.intra, tiles, staged.last_block(keys), staged.head_rows, heads // staged.kv_heads, M=TILE,
        N=keys, D=dim, TMA=target.tma, DOT=target.dot, **OPTIONS[keys],
    )  # fmt: skip


@triton.jit(do_not_specialize=["start", "length", "succ_start", "intra_start", "tiles", "last_block"])
def dense_attention_kernel(
    intra: tl.tensor, intra_row: tl.tensor, intra_head: tl.tensor,
    succ: tl.tensor, succ_row: tl.tensor, succ_head: tl.tensor,
    inter: tl.tensor, inter_row: tl.tensor, inter_head: tl.tensor,
    keys: tl.tensor, values: tl.tensor, scales: tl.tensor, out: tl.tensor, out_row: tl.tensor, head_tiles: tl.tensor,
    start: tl.tensor, length: tl.tensor, succ_start: tl.tensor, intra_start: tl.tensor, tiles: tl.tensor,
    last_block: tl.tensor, head_rows: tl.tensor, group: tl.tensor,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr, DOT: tl.constexpr,
) -> None:  # fmt: skip
    """Compute attention of tile `pid % tiles`, from the last, of head `pid // tiles`.

    Args:
        intra, succ, inter: queries `[T, H, D]` with strides of rows and heads.
        keys, values: `[rows, D]`: `head_rows` rows a KV head by position.
        scales: `[T]` float32, the factors on the logits.
        out: `[T, H, D]`, rows `out_row` values apart.
        head_tiles: `[H]` int32, 0 for the heads to compute; None for all.
        start: the position of the first row.
        succ_start, intra_start: the first keys of these regions.
        last_block: the last position at which a block of keys may begin; the keys of a block that would reach behind
            it are the last ones of one that does not.
        group: `H // K`.
    """
    head = tl.program_id(0) // tiles
    tile = tiles - 1 - tl.program_id(0) % tiles
    first = tile * M
    if head_tiles is not None:  # noqa: SIM102
        if tl.load(head_tiles + head) != 0:
            return
    scale = load_scales(scales, first, length, M)
    q = load_queries(intra, intra_row, intra_head, head, first, length, M, D, DOT)
    acc, total = tl.zeros([M, D], tl.float32), tl.zeros([M], tl.float32)
    largest = tl.full([M], float("-inf"), tl.float32)
    own = head // group * head_rows
    acc, total, largest = causal_step(
        q, keys, values, own, start + first, last_block, scale, acc, total, largest, M, N, D, TMA, DOT
    )
    for turn in range(3):
        region = 2 - turn  # intra, succ, inter
        side = tl.where(region == 2, intra, tl.where(region == 1, succ, inter))
        row_stride = tl.where(region == 2, intra_row, tl.where(region == 1, succ_row, inter_row))
        head_stride = tl.where(region == 2, intra_head, tl.where(region == 1, succ_head, inter_head))
        lower = tl.where(region == 2, intra_start, tl.where(region == 1, succ_start, 0))
        upper = tl.where(region == 2, start + first, tl.where(region == 1, intra_start, succ_start))
        q = load_queries(side, row_stride, head_stride, head, first, length, M, D, DOT)
        for key in range(lower, upper, N):
            at = tl.minimum(key, last_block)
            k = load_block(keys, own + at, N, D, TMA).to(DOT)
            position = at + tl.arange(0, N)
            bias = tl.where((position >= key) & (position < upper), 0.0, float("-inf"))
            logits = tl.dot(q, k.T) + bias[None, :]
            v = load_block(values, own + at, N, D, TMA)
            acc, total, largest = softmax_step(logits, v, scale, acc, total, largest, DOT)
    store_rows(out, acc / total[:, None], out_row, head, first, length, M, D)
