"""Stage `kernels`, the rest of a layer: experts, heads with the write to pages, and operations on rows.

Legend: `T` rows, `M` hidden size, `I` expert intermediate, `k` experts per token, `H`, `K`, `D` heads and their dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from unittest import mock

import torch

from workers.bench.gpu.context import Case, Context
from workers.bench.gpu.journal import Line
from workers.kernels.triton.layer import calls
from workers.kv.paged import PagedKV


def cases(context: Context) -> Iterator[Case]:
    """Yield the cases."""
    sizes = context.sizes
    for tokens in (sizes.step,) if context.rehearsal else (sizes.step, 64, 1):
        for kernel in ("as shipped", "own", "library"):
            if kernel == "library" and tokens < sizes.step:
                continue
            name = f"experts {kernel}, {tokens} tokens"
            yield Case("kernels", name, partial(_experts, tokens=tokens, kernel=kernel), 15, 150)
    yield Case("kernels", f"route and sort, {sizes.step} tokens", _route, 10, 120)
    for rotations in (3,) if context.rehearsal else (1, 3):
        for cache in (torch.bfloat16, torch.int8):
            name = f"heads, {rotations} rotations, {str(cache).removeprefix('torch.')}"
            yield Case("kernels", name, partial(_heads, rotations=rotations, cache=cache), 10, 120)
    yield Case("kernels", "residual and norm", _norm, 10, 120)
    yield Case("kernels", "SwiGLU", _swiglu, 10, 120)
    yield Case("kernels", "projections of attention", _projections, 10, 120)


def _experts(context: Context, tokens: int, kernel: str) -> Line:
    """Time the weighted sum of experts of rows that are spread evenly by random logits."""
    from workers.kernels.triton.blocks import Target
    from workers.kernels.triton.layer import experts as module

    sizes = context.sizes
    shape = sizes.experts, 2 * sizes.inter, sizes.hidden
    gate_up = context.random(*shape).mul_(0.02)
    down = context.random(sizes.experts, sizes.hidden, sizes.inter, seed=2).mul_(0.02)
    x, logits = context.random(tokens, sizes.hidden, seed=3), context.random(tokens, sizes.experts, seed=4)
    chosen, weights = calls.route(logits, sizes.top_k, True)
    shipped = module.prefers_library
    answer = {"own": lambda *_: False, "library": lambda *_: True}.get(kernel, shipped)
    used = float(len(chosen.unique())) * 3 * sizes.inter * sizes.hidden * x.itemsize
    flop = 6.0 * tokens * sizes.top_k * sizes.hidden * sizes.inter
    with mock.patch.object(module, "prefers_library", answer):
        found = context.time(
            lambda: calls.run_experts(x, chosen, weights, gate_up, down, 0),
            flop if tokens > 64 else 0.0, 0.0 if tokens > 64 else used, captured=tokens <= 64,
        )  # fmt: skip
    entries = tokens * sizes.top_k
    capability = Target.of(context.device).capability
    is_library = kernel == "library" or (
        kernel != "own" and shipped(entries, sizes.experts, x.dtype, capability)
    )  # fmt: skip
    return found | {"tokens": tokens, "kernel": "grouped_mm" if is_library else "own", "routing": "even, random"}


def _route(context: Context) -> Line:
    from workers.kernels.triton.layer.routing import sort_entries

    sizes = context.sizes
    logits = context.random(sizes.step, sizes.experts)

    def call() -> None:
        chosen, _ = calls.route(logits, sizes.top_k, True)
        sort_entries(chosen, 0, sizes.experts)

    return context.time(call) | {"tokens": sizes.step}


def _heads(context: Context, rotations: int, cache: torch.dtype) -> Line:
    """Time norm, rotations, 8-bit codes and the write to pages of a step's heads."""
    from workers.kernels.triton.layer.heads import store_heads

    sizes, dim = context.sizes, context.sizes.dims[0]
    tokens, all_heads = sizes.step, sizes.heads + 2 * sizes.kv_heads
    qkv, norms = context.random(tokens, all_heads, dim), context.random(sizes.heads + sizes.kv_heads, dim).float()
    angles = context.random(rotations, tokens, 1, dim // 2, dtype=torch.float32)
    tables = [(one.cos(), one.sin()) for one in angles]
    kv = PagedKV(1, sizes.kv_heads, dim, -(-tokens // sizes.page), sizes.page, cache, context.device).layer(0)
    slots = torch.arange(tokens, device=context.device)
    written = rotations * sizes.heads * dim * qkv.itemsize + 2 * sizes.kv_heads * (
        dim * cache.itemsize + (4 if cache.itemsize == 1 else 0)
    )
    moved = float(tokens * (all_heads * dim * qkv.itemsize + written + rotations * dim * 4))
    found = context.time(lambda: store_heads(qkv, norms, 1e-6, tables, slots, kv), moved=moved)
    return found | {"tokens": tokens, "bytes": moved}


def _norm(context: Context) -> Line:
    sizes = context.sizes
    x, delta = context.random(sizes.step, sizes.hidden), context.random(sizes.step, sizes.hidden, seed=2).mul_(1e-3)
    weight = context.random(sizes.hidden, seed=3)
    moved = 4.0 * x.nbytes
    return context.time(lambda: calls.add_rms_norm(x, delta, weight, 1e-6), moved=moved) | {"tokens": sizes.step}


def _swiglu(context: Context) -> Line:
    sizes = context.sizes
    gate_up = context.random(sizes.step * sizes.top_k, 2 * sizes.inter)
    found = context.time(lambda: calls.swiglu(gate_up), moved=1.5 * gate_up.nbytes)
    return found | {"rows": len(gate_up)}


def _projections(context: Context) -> Line:
    """Time the two products before and after attention, by PyTorch."""
    sizes, dim = context.sizes, context.sizes.dims[0]
    wide, own = (sizes.heads + 2 * sizes.kv_heads) * dim, sizes.heads * dim
    x, out = context.random(sizes.step, sizes.hidden), context.random(sizes.step, own, seed=2)
    into, back = context.random(wide, sizes.hidden, seed=3), context.random(sizes.hidden, own, seed=4)
    flop = 2.0 * sizes.step * sizes.hidden * (wide + own)
    return context.time(lambda: (x @ into.T, out @ back.T), flop) | {"tokens": sizes.step}
