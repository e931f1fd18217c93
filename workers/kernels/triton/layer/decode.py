"""Decode attention: the keys of every row are split over the whole card, read from pages, and merged by one kernel.

A program takes all query heads of a KV head, so that every key is read once, padded to the 16 rows of a matrix unit.
8-bit keys and values are multiplied as they are; their scales go to the logits and to the probabilities. Under dual
chunk attention (DCA) a key's position decides the rotation of the query that meets it. Positions, pages and scales are
tensors on the device, so that a captured graph serves any step of the same number of rows and splits.

Legend: `B` rows, each of another sequence, `H` and `K` query and KV heads, `G = H // K`, `D` head dim, `R` rotations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from workers.kernels.triton.layer.heads import LIMITS
from workers.kernels.triton.layer.rows import dot_type

if TYPE_CHECKING:
    from workers.kv.paged import LayerKV

_BLOCK = 64  # keys of one product
_MIN_BLOCKS = 4  # a split; below, merging costs more than the keys
_PROGRAMS = 3  # a multiprocessor has room for as many, by their registers
_MERGED = 16  # splits that are added at once
_MAX_SPLITS = 256  # a power of two; one build merges up to so many


@dataclass(frozen=True, slots=True)
class Rows:
    """What the kernels need to know of the rows of a step, on the device."""

    tables: torch.Tensor  # [N, pages] int32, the first slot of every page; rows of any stride
    places: torch.Tensor  # [B] int32, which of the tables is that of a row
    lengths: torch.Tensor  # [B] int32, keys that a row sees, its own included; 0 for rows that only fill a graph
    scales: torch.Tensor  # [B] float32, the factor on a row's logits
    page_size: int
    distance: int  # tokens between the starts of two DCA chunks, 0 for plain attention
    splits: int


def count_splits(rows: int, kv_heads: int, processors: int, longest: int) -> int:
    """Return into how many parts the keys of `rows` rows are split for a card of so many multiprocessors.

    `longest` is the greatest number of keys that a row may have.
    """
    wanted = -(-_PROGRAMS * processors // max(1, rows * kv_heads))
    return max(1, min(wanted, -(-longest // (_BLOCK * _MIN_BLOCKS)), _MAX_SPLITS))


def launch_options(limit: int) -> dict[str, int]:
    """Return how the kernel is built for rows whose greatest code is `limit`, 0 for others: codes in 3 stages spill.

    The number of registers is the compiler's: given a limit, it spills more where it needs fewer.
    """
    return {"num_stages": 2 if limit else 3}


@triton.jit
def _widened(rows, LIMIT: tl.constexpr, DOT: tl.constexpr):
    """Convert keys or values to the type of products; e4m3 by way of float32, as float16 to bfloat16 is a slow one."""
    if LIMIT == 448:
        rows = rows.to(tl.float16).to(tl.float32)
    return rows.to(DOT)


@triton.jit(
    do_not_specialize=["table_stride", "splits"], do_not_specialize_on_alignment=["places", "lengths", "scales"]
)
def attend_splits_kernel(
    q, keys, values, key_scales, value_scales, tables, places, lengths, scales, partial, sums, rotation_stride,
    row_stride, head_stride, key_stride, value_stride, key_scale_stride, value_scale_stride, table_stride, distance,
    splits, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, ROTATIONS: tl.constexpr, LIMIT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program: a split of the keys of one row and one KV head, for all `GROUP` query heads.

    Writes the weighted values `[GROUP, D]` and the logarithm to base 2 of the sum of exponentials.
    """
    split, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads = tl.num_programs(1)
    length = tl.load(lengths + row)
    per_split = tl.cdiv(tl.cdiv(length, BLOCK), splits) * BLOCK
    first = split * per_split
    last = tl.minimum(first + per_split, length)
    scale = tl.load(scales + row) * 1.4426950408889634  # exponentials are taken to base 2
    intra = 0
    if ROTATIONS > 1:
        intra = tl.maximum(length - 1, 0) // distance * distance
    g, d, n = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    real = (g < GROUP)[:, None] & (d < DIM)[None, :]
    head = kv_head * GROUP + g
    table = tables + tl.load(places + row).to(tl.int64) * table_stride
    keys += kv_head.to(tl.int64) * key_stride
    values += kv_head.to(tl.int64) * value_stride
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, WIDTH], tl.float32)
    for rotation in range(ROTATIONS):  # of the row's own DCA chunk, the one before it, and all earlier ones
        stop = tl.where(rotation > 0, tl.maximum(intra - (rotation - 1) * distance, 0), length)
        start = tl.where(rotation > 0, tl.where(rotation > 1, 0, tl.maximum(intra - distance, 0)), intra)
        start, stop = tl.maximum(start, first), tl.minimum(stop, last)
        at = rotation * rotation_stride + row.to(tl.int64) * row_stride + head[:, None] * head_stride + d[None, :]
        query = tl.load(q + at, mask=real, other=0.0).to(DOT)
        for key in range(start, stop, BLOCK):
            position = key + n
            visible = position < stop
            slot = tl.load(table + position // PAGE, mask=visible, other=0).to(tl.int64) + position % PAGE
            place = slot[:, None] * DIM + d[None, :]
            inside = visible[:, None] & (d < DIM)[None, :]
            k = _widened(tl.load(keys + place, mask=inside, other=0.0), LIMIT, DOT)
            logits = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
            if LIMIT > 0:
                steps = tl.load(key_scales + kv_head * key_scale_stride + slot, mask=visible, other=0.0)
                logits = logits * steps[None, :]
            logits = tl.where(visible[None, :], logits, float("-inf"))
            higher = tl.maximum(best, tl.max(logits, 1))
            shrink = tl.exp2(best - higher)
            weights = tl.exp2(logits - higher[:, None])
            total = total * shrink + tl.sum(weights, 1)
            best = higher
            v = _widened(tl.load(values + place, mask=inside, other=0.0), LIMIT, DOT)
            if LIMIT > 0:
                steps = tl.load(value_scales + kv_head * value_scale_stride + slot, mask=visible, other=0.0)
                weights = weights * steps[None, :]
            out = tl.dot(weights.to(DOT), v, out * shrink[:, None], input_precision="ieee")
    flat = (row.to(tl.int64) * kv_heads * GROUP + head) * splits + split
    tl.store(sums + flat, best + tl.log2(total), mask=g < GROUP)  # -inf where there are no keys
    if first < last:
        tl.store(partial + flat[:, None] * DIM + d[None, :], out / total[:, None], mask=real)


@triton.jit(do_not_specialize=["splits"])
def merge_splits_kernel(
    partial, sums, out, splits, PADDED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    MERGED: tl.constexpr,
):  # fmt: skip
    """One program: the average of the splits of one row and head, weighted by their sums; 0 without any keys."""
    head = tl.program_id(0).to(tl.int64)  # of [B, H]
    each, d = tl.arange(0, PADDED), tl.arange(0, WIDTH)
    best = tl.max(tl.load(sums + head * splits + each, mask=each < splits, other=float("-inf")), 0)
    total = 0.0
    added = tl.zeros([WIDTH], tl.float32)
    for start in range(0, splits, MERGED):
        split = start + tl.arange(0, MERGED)
        size = tl.load(sums + head * splits + split, mask=split < splits, other=float("-inf"))
        weight = tl.where(size == float("-inf"), 0.0, tl.exp2(size - best))  # such a split was not written
        mask = (size > float("-inf"))[:, None] & (d < DIM)[None, :]
        rows = tl.load(partial + (head * splits + split)[:, None] * DIM + d[None, :], mask=mask, other=0.0)
        added += tl.sum(weight[:, None] * rows, 0)
        total += tl.sum(weight, 0)
    average = added / tl.where(total > 0.0, total, 1.0)
    tl.store(out + head * DIM + d, average.to(out.dtype.element_ty), mask=d < DIM)


def attend_rows(q: torch.Tensor, kv: LayerKV, rows: Rows) -> torch.Tensor:
    """Compute attention of rows of different sequences over their paged contexts.

    Args:
        q: `[R, B, H, D]`, unit stride in `D`: under every rotation of a step, which are all three where any row has
            keys in earlier DCA chunks, and at least one.
        kv: one layer of the cache; the rows' own keys and values are already written.

    Returns:
        `[B, H, D]` in the type of `q`; what is not finite in a row's context makes its result not finite.
    """
    rotations, batch, heads, dim = q.shape
    kv_heads = kv.keys.shape[0]
    assert heads % kv_heads == 0
    assert q.stride(3) == 1
    assert kv.keys.stride()[1:] == kv.values.stride()[1:] == (dim, 1)
    assert rows.tables.stride(1) == 1
    assert rows.splits <= _MAX_SPLITS
    group, splits, width = heads // kv_heads, rows.splits, max(16, triton.next_power_of_2(dim))
    partial = torch.empty(batch, heads, splits, dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(batch, heads, splits, dtype=torch.float32, device=q.device)
    out = q.new_empty(batch, heads, dim)
    if not batch:
        return out
    key_scales = kv.keys if kv.key_scales is None else kv.key_scales
    value_scales = kv.values if kv.value_scales is None else kv.value_scales
    limit = LIMITS.get(kv.keys.dtype, 0)
    attend_splits_kernel[(splits, kv_heads, batch)](
        q, kv.keys, kv.values, key_scales, value_scales, rows.tables, rows.places, rows.lengths, rows.scales, partial,
        sums, *q.stride()[:3], kv.keys.stride(0), kv.values.stride(0), key_scales.stride(0), value_scales.stride(0),
        rows.tables.stride(0), rows.distance, splits, GROUP=group, ROWS=max(16, triton.next_power_of_2(group)),
        DIM=dim, WIDTH=width, PAGE=rows.page_size, BLOCK=_BLOCK, ROTATIONS=rotations if rows.distance else 1,
        LIMIT=limit, DOT=dot_type(q.dtype), num_warps=4, **launch_options(limit),
    )  # fmt: skip
    merge_splits_kernel[(batch * heads,)](
        partial, sums, out, splits, PADDED=_MAX_SPLITS, DIM=dim, WIDTH=width, MERGED=_MERGED
    )
    return out
