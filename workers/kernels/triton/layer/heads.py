"""Query, key and value heads: norm, rotations, 8-bit codes and the write to pages, all in one kernel.

Legend: `T` tokens, `H` and `K` query and KV heads, `D` head dim, `R` rotations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from workers.kv.paged import LayerKV

LIMITS = {torch.int8: 127, torch.float8_e4m3fn: 448}  # the largest value of an 8-bit cache
_FEW_ROWS = 16  # up to which a program has one row of one head, and above which it has as many rows as this


@triton.jit
def rounded(x, LIMIT: tl.constexpr):
    """Round half to even: to whole numbers for int8, to the values of e4m3 for fp8. The cast after it is exact.

    Adding 1.5 * 2 ** 23 steps and taking them away leaves whole steps, as float32 has no bits below.
    """
    if LIMIT == 127:
        step = 12582912.0
    else:
        power = x.to(tl.int32, bitcast=True) & 0x7F800000
        power = tl.maximum(power, 0x3C800000)  # 2 ** -6: below, e4m3 is subnormal and its steps stay the same
        step = power.to(tl.float32, bitcast=True) * 1572864.0  # three bits of mantissa
    return (x + step) - step


@triton.jit
def _store_rows(cache, scale_of, low, high, at, slot, inside, mask, DIM: tl.constexpr, LIMIT: tl.constexpr):
    """Write rows `[ROWS, D]`, in two halves, to elements `at` of a cache, and the scales of 8-bit rows to `slot`."""
    if LIMIT > 0:
        # a row that is not finite gets a scale that is not: 0 * inf is NaN
        damage = tl.sum(low * 0.0 + high * 0.0, 1)
        largest = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1)) + damage
        scale = tl.math.div_rn(largest, LIMIT * 1.0)  # as on a CPU: `/` is off by a last bit or two on a GPU
        tl.store(scale_of + slot, scale, mask=inside)
        divisor = tl.where(scale == scale, tl.maximum(scale, 1.1754943508222875e-38), 1.0)[:, None]
        low = rounded(tl.where(low == low, tl.math.div_rn(low, divisor), 0.0), LIMIT)
        high = rounded(tl.where(high == high, tl.math.div_rn(high, divisor), 0.0), LIMIT)
        low = tl.clamp(low, -LIMIT * 1.0, LIMIT * 1.0)
        high = tl.clamp(high, -LIMIT * 1.0, LIMIT * 1.0)
    tl.store(cache + at, low.to(cache.dtype.element_ty), mask=mask)
    tl.store(cache + at + DIM // 2, high.to(cache.dtype.element_ty), mask=mask)


@triton.jit
def _rotate(low, high, cos, sin, row, stride, d, mask, DIM: tl.constexpr):
    at = row[:, None].to(tl.int64) * stride + d[None, :]
    c = tl.load(cos + at, mask=mask, other=0.0)
    s = tl.load(sin + at, mask=mask, other=0.0)
    return low * c - high * s, high * c + low * s


@triton.jit(do_not_specialize=["tokens"])
def store_heads_kernel(
    qkv, norms, cos, sin, cos_succ, sin_succ, cos_inter, sin_inter, q_out, keys, values, key_scales, value_scales,
    slots, tokens, row_stride, copy_stride, intra_stride, succ_stride, inter_stride, key_stride, value_stride,
    key_scale_stride, value_scale_stride, eps, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    HALF: tl.constexpr, ROWS: tl.constexpr, ROTATIONS: tl.constexpr, NORM: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """One program: `ROWS` rows of one head of `[queries, keys, values]`."""
    head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, HALF)
    inside = row < tokens
    mask = inside[:, None] & (d < DIM // 2)[None, :]
    at = row[:, None].to(tl.int64) * row_stride + head * DIM + d[None, :]
    low = tl.load(qkv + at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(qkv + at + DIM // 2, mask=mask, other=0.0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        if NORM:
            square = tl.sum(low * low, 1) + tl.sum(high * high, 1)
            inverse = tl.rsqrt(square / DIM + eps)[:, None]
            weight = norms + head * DIM + d
            low = low * inverse * tl.load(weight, mask=d < DIM // 2, other=0.0)[None, :]
            high = high * inverse * tl.load(weight + DIM // 2, mask=d < DIM // 2, other=0.0)[None, :]
        first, second = _rotate(low, high, cos, sin, row, intra_stride, d, mask, DIM)
        if head < HEADS:
            to = q_out + (row[:, None].to(tl.int64) * HEADS + head) * DIM + d[None, :]
            tl.store(to, first.to(q_out.dtype.element_ty), mask=mask)
            tl.store(to + DIM // 2, second.to(q_out.dtype.element_ty), mask=mask)
            if ROTATIONS > 1:
                first, second = _rotate(low, high, cos_succ, sin_succ, row, succ_stride, d, mask, DIM)
                to += copy_stride
                tl.store(to, first.to(q_out.dtype.element_ty), mask=mask)
                tl.store(to + DIM // 2, second.to(q_out.dtype.element_ty), mask=mask)
            if ROTATIONS > 2:
                first, second = _rotate(low, high, cos_inter, sin_inter, row, inter_stride, d, mask, DIM)
                to += copy_stride
                tl.store(to, first.to(q_out.dtype.element_ty), mask=mask)
                tl.store(to + DIM // 2, second.to(q_out.dtype.element_ty), mask=mask)
        else:
            slot = tl.load(slots + row, mask=inside, other=-1).to(tl.int64)
            stored = mask & (slot >= 0)[:, None]
            kv_head = (head - HEADS).to(tl.int64)
            place = kv_head * key_stride + slot[:, None] * DIM + d[None, :]
            scale_at = kv_head * key_scale_stride + slot
            _store_rows(keys, key_scales, first, second, place, scale_at, slot >= 0, stored, DIM, LIMIT)
    else:
        slot = tl.load(slots + row, mask=inside, other=-1).to(tl.int64)
        stored = mask & (slot >= 0)[:, None]
        kv_head = (head - HEADS - KV_HEADS).to(tl.int64)
        place = kv_head * value_stride + slot[:, None] * DIM + d[None, :]
        scale_at = kv_head * value_scale_stride + slot
        _store_rows(values, value_scales, low, high, place, scale_at, slot >= 0, stored, DIM, LIMIT)


def store_heads(
    qkv: torch.Tensor, norms: torch.Tensor | None, eps: float,
    rotations: Sequence[tuple[torch.Tensor, torch.Tensor]], slots: torch.Tensor, kv: LayerKV,
) -> torch.Tensor:  # fmt: skip
    """Normalise queries and keys, rotate them, and write keys and values to their slots, 8-bit caches with scales.

    Args:
        qkv: `[T, H + 2 K, D]`, rows of any stride, not changed.
        norms: `[H + K, D]` float32, or None for models without query and key norms.
        rotations: cos and sin `[T, 1, D / 2]` float32 for INTRA, and where the step needs them SUCC and INTER; the
            stride of rows may be 0.
        slots: `[T]` int32, inside the cache: they are not checked. Keys and values of rows with -1 are not written.
        kv: one layer of the cache; a head's slots are contiguous.

    Returns:
        The queries under every rotation, `[R, T, H, D]`.
    """
    tokens, all_heads, dim = qkv.shape
    kv_heads = kv.keys.shape[0]
    heads = all_heads - 2 * kv_heads
    assert qkv.stride()[1:] == (dim, 1)
    assert kv.keys.stride()[1:] == kv.values.stride()[1:] == (dim, 1)
    out = qkv.new_empty(len(rotations), tokens, heads, dim)
    if not tokens:
        return out
    tables = [rotations[min(index, len(rotations) - 1)] for index in range(3)]
    key_scales = kv.keys if kv.key_scales is None else kv.key_scales
    value_scales = kv.values if kv.value_scales is None else kv.value_scales
    rows = 1 if tokens <= _FEW_ROWS else _FEW_ROWS
    store_heads_kernel[(triton.cdiv(tokens, rows), all_heads)](
        qkv, out if norms is None else norms, *(side for table in tables for side in table), out, kv.keys, kv.values,
        key_scales, value_scales, slots, tokens, qkv.stride(0), out.stride(0), *(cos.stride(0) for cos, _ in tables),
        kv.keys.stride(0), kv.values.stride(0), key_scales.stride(0), value_scales.stride(0), eps, HEADS=heads,
        KV_HEADS=kv_heads, DIM=dim, HALF=triton.next_power_of_2(dim // 2), ROWS=rows, ROTATIONS=len(rotations),
        NORM=norms is not None, LIMIT=LIMITS.get(kv.keys.dtype, 0), num_warps=1 if rows == 1 else 4,
    )  # fmt: skip
    return out
