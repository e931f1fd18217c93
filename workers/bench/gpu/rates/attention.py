"""Stage `kernels`, attention: staging, dense and vertical-slash attention, selection, and attention of decoding rows.

Legend: `T` rows, `S` keys, `H` query heads, `K` KV heads, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from protos.model.spec import HeadBudget, SparseSpec
from workers.attention import cards, cuda, flash
from workers.attention.plan import AttentionPlan, Queries
from workers.bench.gpu.context import Case, Context
from workers.bench.gpu.journal import Line
from workers.bench.gpu.parts import LISTS, STEP, Recorder
from workers.bench.gpu.patterns import Pattern, StatedKept, patterns
from workers.kernels.device import processors
from workers.kernels.triton.lists import TILES
from workers.kernels.triton.sparse.cells import CellSpan, CellTables, TileShape
from workers.kv.paged import LayerKV, PagedKV, PageTable
from workers.sparse.cuda import HeadBudgets, SparseCell, StepSelection

FP8 = torch.float8_e4m3fn
_DECODED_BYTES = 256 << 20  # of KV that a timed call reads, so that the L2 cache holds little of it


def name_of(tokens: int) -> str:
    """Return a number of tokens as `64K` or `1M`."""
    for size, unit in ((1 << 20, "M"), (1024, "K")):
        if tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)


def cases(context: Context) -> Iterator[Case]:
    """Yield the cases."""
    sizes = context.sizes
    few = context.rehearsal  # kinds of cases that differ in sizes alone are rehearsed once
    for cache in (torch.int8, FP8, torch.bfloat16)[: 1 if few else 3]:
        name = f"staging {name_of(sizes.long)} {str(cache).removeprefix('torch.')}"
        yield Case("kernels", name, partial(_staging, cache=cache), 10, 120)
    for keys in (sizes.short, sizes.long)[: 1 if few else 2]:
        for library in cards.LIBRARIES:
            yield Case("kernels", dense_name(library, keys, sizes.dims[0]), partial(_dense, library, keys), 20, 150)
    for keys in (sizes.middle, sizes.long)[: 1 if few else 2]:
        for number, pattern in enumerate(patterns(sizes), 1):
            name = f"vertical-slash {name_of(keys)}, pattern {number}"
            yield Case("kernels", name, partial(_sparse, pattern, keys, TILES[0]), 20, 150)
    yield Case("kernels", f"estimate, selection, recall {name_of(sizes.long)}", _selection, 20, 150)
    for keys in (4096, sizes.middle, sizes.long)[: 1 if few else 3]:
        for cache in (torch.int8, torch.bfloat16, FP8)[: 1 if few else 3]:
            name = f"decode attention {name_of(keys)} {str(cache).removeprefix('torch.')}"
            keys_here = min(keys, sizes.long)
            yield Case("kernels", name, partial(_decode, keys=keys_here, cache=cache), 10, 120)


def dense_name(library: str, keys: int, dim: int) -> str:
    """Return the name of a case of dense attention."""
    return f"dense {library} {name_of(keys)} D {dim}"


def random_cache(context: Context, tokens: int, cache: torch.dtype, dim: int, layers: int = 1) -> PagedKV:
    """Return a cache of random keys and values for so many tokens, made on the device."""
    sizes = context.sizes
    made = PagedKV(layers, sizes.kv_heads, dim, -(-tokens // sizes.page), sizes.page, cache, context.device)
    fill(context, made, layers)
    return made


def fill(context: Context, kv: PagedKV, layers: int) -> None:
    """Fill a cache with random keys and values, head by head: few bytes are needed beside it."""
    generator = torch.Generator(context.device).manual_seed(5)
    for index in range(layers):
        layer = kv.layer(index)
        for side, scales in ((layer.keys, layer.key_scales), (layer.values, layer.value_scales)):
            for head in range(side.shape[0]):
                if side.dtype == torch.int8:
                    side[head].random_(-127, 128, generator=generator)
                elif side.dtype == FP8:
                    wide = torch.randn(side[head].shape, generator=generator, device=context.device)
                    side[head].copy_((wide * 64).clamp_(-448, 448).to(FP8))
                else:
                    side[head].normal_(generator=generator)
            if scales is not None:
                scales.fill_(1 / 64)


def shuffled_table(context: Context, tokens: int) -> PageTable:
    """Return a table whose pages lie in disorder."""
    table = PageTable(context.sizes.page)
    generator = torch.Generator().manual_seed(3)
    table.append(torch.randperm(-(-tokens // context.sizes.page), generator=generator).tolist())
    return table


def staged_context(context: Context, keys: int, dim: int) -> cuda.Staged:
    """Return staged random keys and values."""
    cache = torch.bfloat16 if not context.rehearsal else torch.float32
    kv = random_cache(context, keys, cache, dim).layer(0)
    return cuda.stage(kv, shuffled_table(context, keys), keys)


def random_queries(context: Context, rows: int, dim: int) -> Queries:
    """Return queries `[T, H, D]`."""
    return Queries(context.random(rows, context.sizes.heads, dim, seed=9))


def _staging(context: Context, cache: torch.dtype) -> Line:
    sizes, dim = context.sizes, context.sizes.dims[0]
    kv, table = random_cache(context, sizes.long, cache, dim).layer(0), shuffled_table(context, sizes.long)
    rows = 2 * sizes.long * sizes.kv_heads
    moved = rows * (dim * (cache.itemsize + 2) + (4 if cache.itemsize == 1 else 0))
    found = context.time(lambda: cuda.stage(kv, table, sizes.long), moved=moved)
    return found | {"keys": sizes.long, "bytes": moved, "pages": "in disorder"}


def runs_here(context: Context, library: str, dim: int) -> bool:
    """Return whether a library has a kernel for the device, and not another one would run in its place."""
    if context.rehearsal or library not in (cards.CUDNN, cards.FLASH_ATTN):
        return True
    check = flash.supports_flash_attn if library == cards.FLASH_ATTN else flash.has_fast_kernel
    with cards.using(library):
        return check(context.device, context.dtype, dim)


def run_dense(context: Context, library: str, keys: int, dim: int) -> Line:
    """Time dense attention of the last rows of a context, by our own kernel or through a library."""
    sizes = context.sizes
    rows = min(sizes.cell, keys)
    plan = AttentionPlan(keys - rows, rows)
    scales = cuda.RowScales.of(torch.full((rows,), dim**-0.5), context.device)
    q, staged = random_queries(context, rows, dim), staged_context(context, keys, dim)
    with cards.using(library):
        if not runs_here(context, library, dim):
            return {"ok": False, "why": f"{library} does not run here"}
        found = context.time(
            lambda: cuda.attend_dense(q, staged, plan, scales, library=library != cards.OWN),
            4.0 * plan.causal_pairs * sizes.heads * dim,
        )
    return found | {"ok": True, "rows": rows, "keys": keys, "dim": dim, "library": library}


def _dense(library: str, keys: int, context: Context) -> Line:
    return run_dense(context, library, keys, context.sizes.dims[0])


def run_sparse(context: Context, pattern: Pattern, keys: int, tile: int, dim: int) -> Line:
    """Time vertical-slash attention of the last cell of a context, with its lists already made.

    `share` is that of the pairs that tiles visit in all causal pairs; rates count visited pairs.
    """
    from workers.kernels.triton.sparse.device_lists import make_lists

    sizes = context.sizes
    rows = min(sizes.cell, keys)
    plan = AttentionPlan(keys - rows, rows)
    tables = CellTables.make([CellSpan(plan.start, keys, ((0, keys, 0),))], sizes.last_q, TileShape(), context.device)
    kept = StatedKept(pattern, tables, sizes.heads)
    dense = torch.zeros(1, sizes.heads, dtype=torch.int32, device=context.device)
    lists = [make_lists(kept.offsets_as(), kept.columns_as(), dense, tables, tile)[0]]
    q, staged = random_queries(context, rows, dim), staged_context(context, keys, dim)
    scales = cuda.RowScales.of(torch.full((rows,), dim**-0.5), context.device)
    _, visited = cuda.attend_lists(q, staged, plan, scales, lists)
    pairs = int(visited.sum())
    found = context.time(lambda: cuda.attend_lists(q, staged, plan, scales, lists), 4.0 * pairs * dim)
    recorder = Recorder(context.device)
    with recorder.recording(LISTS):
        cuda.attend_lists(q, staged, plan, scales, lists)
    spent = recorder.seconds()
    parts = {name: None if context.rehearsal else seconds * 1e3 for name, seconds in spent.items()}
    kernel = kernel_rate(context, spent.get("kernel"), visited, plan, dim)
    total = plan.causal_pairs * sizes.heads
    return found | {
        "pattern": pattern.name, "tile": tile, "rows": rows, "keys": keys, "dim": dim, "share": pairs / total,
        "dense_heads": int((visited == plan.causal_pairs).sum()), "parts_ms": parts,
        "kernel_tflops": kernel.get("tflops"), "kernel_of_matmul": kernel.get("of_matmul"),
    }  # fmt: skip


def kernel_rate(
    context: Context, seconds: float | None, visited: torch.Tensor, plan: AttentionPlan, dim: int
) -> Line:  # fmt: skip
    """Return the rates of the sparse kernel alone, by the pairs `visited` `[H]` of heads that are not dense."""
    pairs = int(visited[visited != plan.causal_pairs].sum())
    return context.rates([seconds] if seconds and pairs else [], 4.0 * pairs * dim)


def _sparse(pattern: Pattern, keys: int, tile: int, context: Context) -> Line:
    return run_sparse(context, pattern, keys, tile, context.sizes.dims[0])


def _selection(context: Context) -> Line:
    """Time what sparse prefill needs beside attention for one layer and cell: everything, and its parts."""
    sizes, dim = context.sizes, context.sizes.dims[0]
    rows = min(sizes.cell, sizes.long)
    spec = SparseSpec(last_q=sizes.last_q, uniform=HeadBudget(sizes.columns, sizes.offsets))
    budgets = HeadBudgets(spec, range(1), range(sizes.heads), context.device)
    plan = AttentionPlan(sizes.long - rows, rows)
    cell = SparseCell(plan, torch.full((rows,), dim**-0.5), 0)
    step = StepSelection(spec, [cell], budgets, sizes.kv_heads, context.device)
    q, staged = random_queries(context, rows, dim), staged_context(context, sizes.long, dim)
    keys = staged.by_head()[0]
    estimate, held_out = step.estimate.take(q), step.held_out.take(q)
    found = context.time(lambda: step.select(0, estimate, held_out, keys))
    recorder = Recorder(context.device)
    with recorder.recording(STEP):
        step.select(0, estimate, held_out, keys)
    parts = {name: None if context.rehearsal else seconds * 1e3 for name, seconds in recorder.seconds().items()}
    return found | {
        "what": f"one layer, one cell of {rows} rows, {sizes.heads} heads, {sizes.long} keys", "parts_ms": parts,
        "columns": sizes.columns, "offsets": sizes.offsets, "missing": recorder.missing,
    }  # fmt: skip


def _decode(context: Context, keys: int, cache: torch.dtype) -> Line:
    """Time attention of one row, over as many layers as it takes to leave the caches of the card; a layer's share."""
    from workers.kernels.triton.layer.decode import Rows, attend_rows, count_splits

    sizes, dim = context.sizes, context.sizes.dims[0]
    keys = min(keys, sizes.long)
    per_token = 2 * sizes.kv_heads * (dim * cache.itemsize + (4 if cache.itemsize == 1 else 0))
    layers = 1 if context.rehearsal else max(1, min(64, _DECODED_BYTES // (keys * per_token)))
    kv = random_cache(context, keys, cache, dim, layers)
    held: list[LayerKV] = [kv.layer(index) for index in range(layers)]
    rows = Rows(
        shuffled_table(context, keys).slots_on(context.device)[None],
        torch.zeros(1, dtype=torch.int32, device=context.device),
        torch.tensor([keys], dtype=torch.int32, device=context.device),
        torch.full((1,), dim**-0.5, device=context.device), sizes.page, 0,
        count_splits(1, sizes.kv_heads, processors(context.device), keys),
    )  # fmt: skip
    q = context.random(1, 1, sizes.heads, dim)
    moved = float(keys * per_token)
    found = context.time(lambda: [attend_rows(q, layer, rows) for layer in held], moved=moved * layers, captured=True)
    each = {name: found[name] / layers for name in ("ms", "low", "high") if found[name] is not None}
    return found | each | {"keys": keys, "layers": layers, "bytes": moved, "what": "one row, of a captured graph"}
