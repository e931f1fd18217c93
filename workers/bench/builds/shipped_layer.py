"""Launches of a layer outside of prefill attention: heads, row operations, decode, experts, greedy tokens.

Legend: as in `shipped`; `V` vocabulary, `k` experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from workers.bench.builds.limits import Limits, Shipped
from workers.bench.builds.shipped import CACHES, DIM, E4M3, HEADS, KV_HEADS, PAGE, START, paged

HIDDEN, INTER, EXPERTS, TOP_K, VOCAB = 2048, 768, 128, 8, 151936
_ROWS = Limits(registers=128)
_DECODE = Limits(units="some", together=3, copies=16)  # keys are on their way while others are multiplied
# Where keys are codes 8 bytes may spill: for sm_90 ptxas of Triton 3.7 keeps to 128 registers, of the 168 that three
# programs leave to each. Told to use 168, it spills for sm_100 and sm_120, and that of Triton 3.6 for sm_90.
_CODES = replace(_DECODE, stack=8)
DECODE = {"bf16": _DECODE, "int8": _CODES, "fp8": _CODES}  # by cache
_FEW = {"grouped_kernel": Limits(units="some", copies=16)}  # rows of an expert, below the tiles of newer units
_MANY = {"grouped_kernel": Limits(units="own", copies=16)}


def shipped_layer() -> Iterator[Shipped]:
    """Yield the launches of a layer."""
    for name, cache in CACHES.items():
        limits = {
            "attend_splits_kernel": DECODE[name],
            "merge_splits_kernel": _ROWS,
            "store_heads_kernel": _ROWS,
        }
        yield Shipped(f"decode and heads, {name} KV", partial(_decode, cache), limits, E4M3 if name == "fp8" else 80)
    limits = dict.fromkeys(("add_rms_norm_kernel", "store_heads_kernel"), _ROWS)
    yield Shipped("rows", _row_operations, limits | {"swiglu_kernel": Limits(registers=64)})
    for tokens, limits in ((1, _FEW), (1024, _MANY), (32768, _MANY)):
        yield Shipped(f"experts, {tokens} tokens", partial(_experts, tokens), limits)


def _decode(cache: torch.dtype, capability: int) -> None:
    """Launch what stores heads of few and of many rows, decode attention with and without DCA, and its merge."""
    from workers.kernels.triton.layer.decode import Rows, attend_rows
    from workers.kernels.triton.layer.heads import store_heads

    kv, table = paged(DIM, cache)
    del table
    norms = torch.ones(HEADS + KV_HEADS, DIM)
    for rows in (8, 64):
        qkv = torch.zeros(rows, HEADS + 2 * KV_HEADS, DIM, dtype=torch.bfloat16)
        side = torch.ones(rows, 1, DIM // 2), torch.ones(rows, 1, DIM // 2)
        for rotations in (1, 3):
            slots = torch.arange(rows, dtype=torch.int32)
            q = store_heads(qkv, norms, 1e-6, [side] * rotations, slots, kv)
            lengths = torch.ones(rows, dtype=torch.int32)
            tables = torch.zeros(rows, START // PAGE + 1, dtype=torch.int32)
            splits, distance = (64 if rows == 8 else 16), 0 if rotations == 1 else 4096
            attend_rows(q, kv, Rows(tables, slots, lengths, torch.ones(rows), PAGE, distance, splits))


def _row_operations(capability: int) -> None:
    """Launch residual and norm, SwiGLU of dense models, rotations of the estimate's rows, and the choice of tokens."""
    from workers.kernels.triton.layer.greedy import choose_greedily
    from workers.kernels.triton.layer.rows import add_rms_norm, swiglu
    from workers.model.device.step import rotate_heads

    for width in (HIDDEN, 8192):
        x, weight = torch.zeros(64, width, dtype=torch.bfloat16), torch.ones(width, dtype=torch.bfloat16)
        add_rms_norm(x, torch.zeros_like(x), weight, 1e-6)
        add_rms_norm(x, None, weight, 1e-6)
        swiglu(torch.zeros(64, 2 * width, dtype=torch.bfloat16))
    side = torch.ones(64, 1, DIM // 2), torch.ones(64, 1, DIM // 2)
    rotate_heads(torch.zeros(64, HEADS, DIM, dtype=torch.bfloat16), torch.ones(HEADS, DIM), 1e-6, [side] * 3)
    choose_greedily(torch.zeros(2, VOCAB))


def _experts(tokens: int, capability: int) -> None:
    """Launch routing, sorting, both products in the tiles of this many tokens, and the weighted sum."""
    from workers.kernels.triton.layer.experts import Tiling, run_experts
    from workers.kernels.triton.layer.routing import route

    major_minor = (capability // 10, capability % 10)
    x, gate_up, down = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for shape in ((tokens, HIDDEN), (EXPERTS, 2 * INTER, HIDDEN), (EXPERTS, HIDDEN, INTER))
    )
    chosen, weights = route(torch.empty(tokens, EXPERTS, dtype=torch.bfloat16, device="meta"), TOP_K, True)
    sizes = tokens * TOP_K, EXPERTS, torch.bfloat16
    up, back = (Tiling.of(*sizes, gated, major_minor) for gated in (True, False))
    # below 9.0, so that the products are our own for any number of rows
    run_experts(x, chosen, weights, gate_up, down, 0, (8, 0), (up, back))
