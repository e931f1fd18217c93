"""Experts on the device: grouped products of entries sorted by expert, and the weighted sum of a token's rows.

Nothing returns to the host: grids are as large as any distribution of entries needs, so that a step can be captured in
a graph.

Legend: `T` tokens, `M` hidden size, `I` expert intermediate, `Er` experts of this shard, `k` experts per token,
`N = T * k` entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from workers.kernels.triton.layer.routing import Sorted, sort_entries
from workers.kernels.triton.layer.rows import dot_type, swiglu

_COMBINED = 1024  # columns
_FEW_ROWS, _SOME_ROWS = 16, 96  # of an expert in the mean, up to which tiles are narrow, and half as wide
# compute capabilities, without the minor number, whose products are of more than one warp, and for which PyTorch has a
# grouped product
_WIDE_UNITS = (9, 10)
_GROUPED_MIN_ROWS = 64  # an expert, from which PyTorch's grouped product is used; it gathers and activates apart


class Tiling(NamedTuple):
    """The sizes of a grouped product: rows and columns of a program, depth of a step, warps and stages of loads."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int

    @staticmethod
    def of(entries: int, experts: int, dtype: torch.dtype, gated: bool, capability: tuple[int, int]) -> Tiling:
        """Choose by the mean rows of an expert: narrow tiles read weights from many multiprocessors at once."""
        rows = entries / max(1, min(entries, experts))
        if dtype == torch.float32:
            return Tiling(16, 32, 32, 4, 2)
        if rows <= _FEW_ROWS:
            return Tiling(16, 32 if gated else 64, 128, 4, 4)
        if rows <= _SOME_ROWS:
            return Tiling(64, 64, 64, 4, 3)
        # two sums of 128 columns spill, or do not fit shared memory, where warps multiply: on 8.x and 12.x
        return Tiling(128, 64 if gated and capability[0] not in _WIDE_UNITS else 128, 64, 8, 3)


@triton.jit
def expert_tile(totals, tile, experts, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the expert of a tile of `ROWS` rows, its first place and its number of rows: 0 or less past the last."""
    e = tl.arange(0, BLOCK)
    total = tl.load(totals + e, mask=e < experts, other=0)
    tiles = (total + ROWS - 1) // ROWS
    ends = tl.cumsum(tiles, 0)
    expert = tl.sum((ends <= tile).to(tl.int32), 0)
    done = (tile - tl.sum(tl.where(e < expert, tiles, 0), 0)) * ROWS
    rows = tl.minimum(ROWS, tl.sum(tl.where(e == expert, total, 0), 0) - done)
    return expert, tl.sum(tl.where(e < expert, total, 0), 0) + done, rows


@triton.jit
def grouped_kernel(
    x, weight, order, totals, out, experts, x_stride, TOP_K: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
    GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """One program: `COLUMNS` columns of a tile of rows of one expert.

    With `GATED` the rows are gathered from tokens and the result is `silu(gate) * up`, of weights `[Er, 2 I, M]`;
    else rows lie in the order of places and are multiplied by `[Er, M, I]`. `DEPTH` and `WIDTH` are `M` and `I` or
    `I` and `M`.
    """
    expert, start, rows = expert_tile(totals, tl.program_id(1), experts, ROWS, BLOCK)
    if rows > 0:
        r, s = tl.arange(0, ROWS), tl.arange(0, STEP)
        c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        row = start + r
        if GATED:
            row = tl.load(order + row, mask=r < rows, other=0) // TOP_K
        source = x + row[:, None].to(tl.int64) * x_stride + s[None, :]
        side: tl.constexpr = WIDTH * DEPTH
        matrix = weight + expert.to(tl.int64) * (2 * side if GATED else side) + c[:, None] * DEPTH + s[None, :]
        main = tl.zeros([ROWS, COLUMNS], tl.float32)
        up = tl.zeros([ROWS, COLUMNS], tl.float32)
        for depth in range(0, DEPTH, STEP):
            if DEPTH % STEP == 0:
                inside, known = (r < rows)[:, None], (c < WIDTH)[:, None]
            else:
                inside = (r < rows)[:, None] & (depth + s < DEPTH)[None, :]
                known = (c < WIDTH)[:, None] & (depth + s < DEPTH)[None, :]
            part = tl.load(source + depth, mask=inside, other=0.0).to(DOT)
            columns = tl.load(matrix + depth, mask=known, other=0.0).to(DOT)
            main = tl.dot(part, tl.trans(columns), main, input_precision="ieee")
            if GATED:
                columns = tl.load(matrix + side + depth, mask=known, other=0.0).to(DOT)
                up = tl.dot(part, tl.trans(columns), up, input_precision="ieee")
        if GATED:
            main = main * tl.sigmoid(main) * up
        to = out + (start + r)[:, None].to(tl.int64) * WIDTH + c[None, :]
        tl.store(to, main.to(out.dtype.element_ty), mask=(r < rows)[:, None] & (c < WIDTH)[None, :])


@triton.jit
def combine_kernel(rows, places, weights, out, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """One program: `BLOCK` columns of the weighted sum of one token."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for each in tl.static_range(TOP_K):
        place = tl.load(places + token * TOP_K + each)
        weight = tl.load(weights + token * TOP_K + each)
        row = tl.load(rows + place.to(tl.int64) * width + d, mask=(d < width) & (place >= 0), other=0.0)
        total += weight * row.to(tl.float32)
    tl.store(out + token * width + d, total.to(out.dtype.element_ty), mask=d < width)


def combine(rows: torch.Tensor, by_expert: Sorted, weights: torch.Tensor, out: torch.Tensor) -> None:
    """Write the weighted sums of the rows of places `[N, M]` to `out` `[T, M]`; `weights` are `[T, k]`."""
    tokens, width = out.shape
    block = min(_COMBINED, triton.next_power_of_2(width))
    combine_kernel[(tokens, triton.cdiv(width, block))](
        rows, by_expert.places, weights, out, width, TOP_K=weights.shape[1], BLOCK=block
    )


def _product(
    x: torch.Tensor, weight: torch.Tensor, by_expert: Sorted, top_k: int, tiling: Tiling, gated: bool
) -> torch.Tensor:
    """Return `silu(gate) * up` of gathered tokens `[N, I]`, or `x @ down.T` of rows in order of places `[N, M]`."""
    experts, width, depth = weight.shape
    width = width // 2 if gated else width
    entries = by_expert.order.numel()
    assert x.stride(1) == 1
    assert weight.is_contiguous()
    out = x.new_empty(entries, width)
    most = min(entries, entries // tiling.rows + experts)  # tiles: an expert has at most one that is not full
    grouped_kernel[(triton.cdiv(width, tiling.columns), most)](
        x, weight, by_expert.order, by_expert.totals, out, experts, x.stride(0), TOP_K=top_k, DEPTH=depth,
        WIDTH=width, GATED=gated, ROWS=tiling.rows, COLUMNS=tiling.columns, STEP=tiling.step,
        BLOCK=triton.next_power_of_2(experts), DOT=dot_type(x.dtype), num_warps=tiling.warps,
        num_stages=tiling.stages,
    )  # fmt: skip
    return out


def _by_library(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, by_expert: Sorted, top_k: int
) -> torch.Tensor:
    """Compute the rows of all places `[N, M]` by PyTorch's grouped product; those of no expert are unspecified."""
    ends = by_expert.totals.cumsum(0, dtype=torch.int32)
    token = by_expert.order.clamp(0, by_expert.order.numel() - 1) // top_k
    hidden = swiglu(F.grouped_mm(x[token], gate_up.transpose(1, 2), offs=ends))
    return F.grouped_mm(hidden, down.transpose(1, 2), offs=ends)


def prefers_library(entries: int, experts: int, dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Return whether PyTorch's grouped product is used: for many rows in bfloat16, on sm_90 and sm_10x.

    On other devices (sm_120 too), and for other types, it is a loop on the host, which waits for the device.
    """
    return dtype == torch.bfloat16 and capability[0] in _WIDE_UNITS and entries >= _GROUPED_MIN_ROWS * experts


def run_experts(
    x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
    first: int, capability: tuple[int, int], tilings: tuple[Tiling, Tiling] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Compute the weighted sum of this shard's experts, in float32 and rounded once.

    Args:
        x: `[T, M]`, unit stride in `M`.
        chosen, weights: `[T, k]` from `route`, contiguous.
        gate_up: `[Er, 2 I, M]`; down: `[Er, M, I]`.
        first: global id of the shard's first expert; entries of others are left out.
        capability: of the device; on 9.x and 10.x, many rows go to PyTorch's grouped product.
        tilings: of the two products, instead of those that `Tiling.of` chooses.

    Returns:
        `[T, M]`, this shard's partial sum.
    """
    tokens, top_k = chosen.shape
    experts, width = down.shape[:2]
    out = x.new_empty(tokens, width)
    if not tokens:
        return out
    by_expert = sort_entries(chosen, first, experts)
    if prefers_library(tokens * top_k, experts, x.dtype, capability):
        rows = _by_library(x, gate_up, down, by_expert, top_k)
    else:
        sizes = (tokens * top_k, experts, x.dtype)
        up, back = tilings or (Tiling.of(*sizes, gated, capability) for gated in (True, False))
        hidden = _product(x, gate_up, by_expert, top_k, up, True)
        rows = _product(hidden, down, by_expert, top_k, back, False)
    combine(rows, by_expert, weights, out)
    return out
