"""Stage `checks`: every kernel on the device against its definition in float64.

The error of a kernel, as the norm of the difference over the norm of the result, may be 1.5 times that of a PyTorch
twin which rounds where the kernel does. What must be equal is compared for equality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from protos.stage.messages import Span
from workers.attention import cards, cuda
from workers.attention.plan import AttentionPlan, Queries
from workers.bench.cases.attention import attend_reference, attend_rounded
from workers.bench.cases.experts import run_experts_reference
from workers.bench.cases.paged_cells import CELLS, PagedCell, paged_cell, selections
from workers.bench.gpu.context import Case, Context
from workers.bench.gpu.journal import Line
from workers.bench.gpu.rates.attention import FP8, runs_here
from workers.kernels.triton.layer import calls
from workers.kernels.triton.lists import TILES
from workers.kv.paged import LayerKV, PagedKV, SlotRun
from workers.model.moe import run_experts as run_experts_twin
from workers.model.rope import CosSin, norm_and_rotate_

ALLOWED = 1.5
_NOISE = 1e-6  # below, an error says nothing
_LONG = ((8192 - 193, 193, 0), (16_384, 300, 4096))  # of one type of cache
_CELL = tuple[int, int, int]


def cases(context: Context) -> Iterator[Case]:
    """Yield the cases of single kernels."""
    caches = (torch.int8,) if context.rehearsal else (torch.bfloat16, torch.int8, FP8)
    for dim in (16,) if context.rehearsal else (64, 128):
        for cache in caches:
            yield Case("checks", f"staging {_name(cache)}, D {dim}", partial(_staging, cache, dim))
            yield Case("checks", f"dense own {_name(cache)}, D {dim}", partial(_dense, cache, dim, cards.OWN))
        for library in () if context.rehearsal else (cards.CUDNN, cards.FLASH, cards.FLASH_ATTN):
            yield Case("checks", f"dense {library}, D {dim}", partial(_dense, torch.bfloat16, dim, library))
        for cache in caches:
            for tile in TILES[:1] if context.rehearsal else TILES:
                yield Case(
                    "checks", f"vertical-slash {_name(cache)}, {tile} rows, D {dim}", partial(_sparse, cache, dim, tile)
                )
    for cache in caches:
        yield Case("checks", f"decode {_name(cache)}", partial(_decode, cache))
        yield Case("checks", f"heads {_name(cache)}", partial(_heads, cache))
    yield Case("checks", "joined parts", _joined)
    yield Case("checks", "experts", _experts)
    yield Case("checks", "routing and sorting", _routing)
    yield Case("checks", "rows", _rows)
    yield Case("checks", "greedy choice", _greedy)


def error_of(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the norm of the difference over that of `wanted`; what is not finite makes it infinite."""
    got, wanted = got.double().cpu(), wanted.double().cpu()
    value = float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))
    return value if value == value else float("inf")


class Worst:
    """Collects the errors of kernel and twin over cells; what counts is the largest ratio."""

    def __init__(self) -> None:
        self._found: list[tuple[float, float, float, str]] = []
        self._unequal: list[str] = []

    def compare(self, what: object, got: torch.Tensor, twin: torch.Tensor, wanted: torch.Tensor) -> None:
        """Note the errors of one cell."""
        own, other = error_of(got, wanted), error_of(twin, wanted)
        ratio = own / max(other, _NOISE / ALLOWED)
        # of two infinite errors it is NaN, which is no larger than others
        self._found.append((ratio if ratio == ratio else float("inf"), own, other, str(what)))

    def equal(self, what: object, got: torch.Tensor, wanted: torch.Tensor) -> None:
        """Note whether all values are equal."""
        if not torch.equal(got.cpu(), wanted.cpu()):
            self._unequal.append(str(what))

    def line(self) -> Line:
        """Return the figures. Raises AssertionError with them: a bound does not hold."""
        ratio, own, other, where = max(self._found, default=(0.0, 0.0, 0.0, ""))
        found: Line = {
            "ok": ratio <= ALLOWED and not self._unequal, "ratio": float(f"{ratio:.4g}"), "error_own": own,
            "error_twin": other, "cells": len(self._found), "worst": where, "allowed": ALLOWED,
        }  # fmt: skip
        if not found["ok"]:
            raise AssertionError(f"{found}, not equal: {self._unequal}")
        return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cells(context: Context, cache: torch.dtype) -> tuple[_CELL, ...]:
    if context.rehearsal:
        return (CELLS[5],)
    return CELLS + _LONG if cache == torch.int8 else CELLS


def _cell(
    context: Context, at: _CELL, cache: torch.dtype, dim: int, heads: int, sparse: bool = False, one_scale: bool = False
) -> tuple[PagedCell, PagedCell]:
    """Return a cell in host memory, with queries as the device has them, and the same one on the device."""
    start, rows, distance = at
    chosen = tuple(selections(start + rows, rows).values())[:heads] if sparse else None
    made = paged_cell(
        start, rows, distance, cache=cache, dim=dim, heads=heads, kv_heads=2, page_size=64, selections=chosen
    )
    scales = torch.full((rows,), dim**-0.5) if one_scale else made.scales * 4 / dim**0.5
    made = PagedCell(made.plan, made.q.map(context_rounds(context)), made.k, made.v, made.kv, made.table, scales)
    return made, made.on(context.device, context.dtype)


def context_rounds(context: Context) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what rounds to the type of activations and back."""
    return lambda rows: rows.to(context.dtype).float()


def _staging(cache: torch.dtype, dim: int, context: Context) -> Line:
    worst = Worst()
    for at in _cells(context, cache):
        cell, there = _cell(context, at, cache, dim, 4)
        stop = at[0] + at[1]
        staged = cuda.stage(there.kv, there.table, stop)
        for side, got, wanted in zip("kv", staged.by_head(), (cell.k, cell.v), strict=True):
            worst.equal((at, side), got, wanted.transpose(0, 1).to(context.dtype))
    return worst.line()


def _dense(cache: torch.dtype, dim: int, library: str, context: Context) -> Line:
    if not runs_here(context, library, dim):
        return {"ok": None, "why": f"{library} does not run here"}
    worst = Worst()
    for at in _cells(context, cache):
        cell, there = _cell(context, at, cache, dim, 8, one_scale=library != cards.OWN)
        staged = cuda.stage(there.kv, there.table, at[0] + at[1])
        with cards.using(library):
            scales = cuda.RowScales.of(cell.scales, context.device)
            got = cuda.attend_dense(there.q, staged, cell.plan, scales, library=library != cards.OWN)
        worst.compare(at, got, *_both(context, cell, cell.plan))
    return worst.line()


def _both(context: Context, cell: PagedCell, plan: AttentionPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the twin's result and that in float64, both computed on the device."""
    q = cell.q.map(lambda rows: rows.to(context.device))
    k, v = (side.to(context.device) for side in (cell.k, cell.v))
    twin = attend_rounded(q, k, v, plan, cell.scales, context.dtype)
    return twin, attend_reference(q.map(torch.Tensor.double), k.double(), v.double(), plan, cell.scales)


def _sparse(cache: torch.dtype, dim: int, tile: int, context: Context) -> Line:
    """Compare heads of every kind of selection over the pairs of the plan's twin, and the numbers of those pairs."""
    worst = Worst()
    for at in _cells(context, cache):
        cell, there = _cell(context, at, cache, dim, 6, sparse=True)
        lists, scales = (
            [cuda.plan_lists(cell.plan, tile, context.device)],
            cuda.RowScales.of(cell.scales, context.device),
        )
        staged = cuda.stage(there.kv, there.table, at[0] + at[1])
        got, visited = cuda.attend_lists(there.q, staged, cell.plan, scales, lists)
        twin = cuda.executed_plan(cell.plan, (tile,))
        worst.equal((at, "pairs"), visited, torch.tensor([twin.visited_pairs(head) for head in range(6)]))
        worst.compare(at, got, *_both(context, cell, twin))
    return worst.line()


def _decode(cache: torch.dtype, context: Context) -> Line:
    from workers.kernels.triton.layer.decode import Rows, attend_rows, count_splits

    worst = Worst()
    heads, kv_heads, dim, page = (4, 2, 16, 64) if context.rehearsal else (32, 4, 128, 64)
    for distance in (0, 1024):
        torch.manual_seed(distance)
        lengths = [1, 64, 1100] if context.rehearsal else [1, 64, 1025, 5000]
        pages = [-(-length // page) for length in lengths]
        firsts = (torch.randperm(sum(pages)).int() * page).split(pages)
        tables = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
        for table, first in zip(tables, firsts, strict=True):
            table[: len(first)] = first
        kv = PagedKV(1, kv_heads, dim, sum(pages), page, cache)
        kv.write(0, [SlotRun(0, sum(pages) * page)], *torch.randn(2, sum(pages) * page, kv_heads, dim))
        layer = kv.layer(0)
        sides = (layer.keys, layer.values, layer.key_scales, layer.value_scales)
        moved = LayerKV(*(None if side is None else side.to(context.device) for side in sides))  # type: ignore[arg-type]
        q = torch.randn(3 if distance else 1, len(lengths), heads, dim).to(context.dtype)
        scales = torch.rand(len(lengths)) / 8
        splits = count_splits(len(lengths), kv_heads, 100, max(lengths))
        rows = Rows(
            tables.to(context.device), torch.arange(len(lengths), dtype=torch.int32, device=context.device),
            torch.tensor(lengths).int().to(context.device), scales.to(context.device), page, distance, splits,
        )  # fmt: skip
        got = attend_rows(q.to(context.device), moved, rows)
        for row, length in enumerate(lengths):
            slots = (tables[row][:, None] + torch.arange(page)).flatten()[:length].long()
            k, v = (
                (side[:, slots].double() * (1.0 if steps is None else steps[:, slots, None].double())).transpose(0, 1)
                for side, steps in ((layer.keys, layer.key_scales), (layer.values, layer.value_scales))
            )
            queries, plan = (
                Queries(*(side[row : row + 1].float() for side in q)),
                AttentionPlan(length - 1, 1, distance),
            )
            one = scales[row : row + 1]
            twin = attend_rounded(queries, k, v, plan, one, context.dtype)
            wanted = attend_reference(queries.map(torch.Tensor.double), k, v, plan, one)
            worst.compare((distance, length), got[row : row + 1], twin, wanted)
    return worst.line()


def _heads(cache: torch.dtype, context: Context) -> Line:
    """Compare rotated queries, and keys and values as the cache holds them."""
    from workers.kernels.triton.layer.heads import store_heads

    worst = Worst()
    heads, kv_heads, dim, page = (4, 2, 16, 64) if context.rehearsal else (32, 4, 128, 64)
    for rows in (17,) if context.rehearsal else (1, 17, 193):
        torch.manual_seed(rows)
        qkv = torch.randn(rows, heads + 2 * kv_heads, dim).to(context.dtype)
        norms = torch.rand(heads + kv_heads, dim) + 0.5
        turns = [CosSin(angles.cos(), angles.sin()) for angles in torch.rand(3, rows, 1, dim // 2) * 6]
        mine = PagedKV(1, kv_heads, dim, 4, page, cache, context.device)
        moved = [(cos.to(context.device), sin.to(context.device)) for cos, sin in turns]
        slots = torch.arange(3, 3 + rows, device=context.device)
        got = store_heads(qkv.to(context.device), norms.to(context.device), 1e-6, moved, slots, mine.layer(0))
        rotated = torch.stack(
            [norm_and_rotate_(qkv[:, :-kv_heads].float().clone(), turn, norms, 1e-6) for turn in turns]
        )
        wanted = rotated[:, :, :heads]
        worst.compare((rows, "queries"), got, wanted.to(context.dtype), wanted)
        twin = PagedKV(1, kv_heads, dim, 4, page, cache)
        twin.write(0, [SlotRun(3, rows)], rotated[0][:, heads:], qkv[:, -kv_heads:].float())
        sides = zip(_stored(mine.layer(0), rows), _stored(twin.layer(0), rows), strict=True)
        exact = rotated[0][:, heads:], qkv[:, -kv_heads:].float()
        for name, (own, other), wide in zip(("keys", "values"), sides, exact, strict=True):
            worst.compare((rows, name), own, other, wide)
    return worst.line()


def _stored(layer: LayerKV, rows: int) -> list[torch.Tensor]:
    """Return keys and values `[rows, K, D]` as the cache holds them from slot 3 on."""
    found = []
    for side, scales in ((layer.keys, layer.key_scales), (layer.values, layer.value_scales)):
        part = side[:, 3 : 3 + rows].cpu().float()
        found.append((part if scales is None else part * scales[:, 3 : 3 + rows, None].cpu()).transpose(0, 1))
    return found


def _joined(context: Context) -> Line:
    """Compare two to four parts of attention, joined, with the mean of these parts in float64."""
    from workers.kernels.triton.merge import MOST_PARTS, merge_parts

    worst, heads = Worst(), 3
    for rows, dim in ((17, 48),) if context.rehearsal else ((1, 64), (67, 128), (1000, 128)):
        for count in range(2, MOST_PARTS + 1):
            make = torch.Generator().manual_seed(rows * count)
            outs = torch.randn(count, heads, rows, dim, generator=make).to(context.dtype).transpose(1, 2)
            sums = (4 * torch.randn(count, heads, rows, generator=make)).transpose(1, 2)
            sums[0, 0] = -torch.inf  # a row that sees no key of the first part
            shares = sums.double().softmax(0)[..., None]
            wanted = (outs.double() * shares).sum(0)
            got = merge_parts(
                [(out.to(context.device), lse.to(context.device)) for out, lse in zip(outs, sums, strict=True)]
            )
            worst.compare((rows, count), got, wanted.to(context.dtype), wanted)
    return worst.line()


def _experts(context: Context) -> Line:
    worst, count = Worst(), 4 if context.rehearsal else 32
    for tokens in (17,) if context.rehearsal else (1, 17, 193, 2048):
        torch.manual_seed(tokens)
        gate_up = (torch.randn(count, 256, 64) / 8).to(context.dtype)
        down = (torch.randn(count, 64, 128) / 11).to(context.dtype)
        x, logits = torch.randn(tokens, 64).to(context.dtype), torch.randn(tokens, count)
        moved = [one.to(context.device) for one in (x, gate_up, down, logits)]
        chosen, weights = calls.route(moved[3], 4, True)
        got = calls.run_experts(moved[0], chosen, weights, moved[1], moved[2], 0)[:200].cpu()
        few, ids, shares = x[:200], chosen[:200].cpu(), weights[:200].cpu()
        local = Span(0, count)
        twin = run_experts_twin(few, ids, shares, gate_up, down, local)
        wanted = run_experts_reference(few.float(), ids, shares, gate_up.float(), down.float(), local)
        worst.compare(tokens, got, twin, wanted)
    return worst.line()


def _routing(context: Context) -> Line:
    from workers.kernels.triton.layer.routing import sort_entries

    worst = Worst()
    for tokens in (17,) if context.rehearsal else (1, 67, 4096):
        logits = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(tokens)) * 3
        chosen, weights = calls.route(logits.to(context.device), 8, True)
        kept, ids = torch.softmax(logits.double(), -1).topk(8)
        worst.equal((tokens, "experts"), chosen, ids)
        wanted = kept / kept.sum(-1, keepdim=True)
        worst.compare((tokens, "weights"), weights, wanted.float(), wanted)
        found, flat = sort_entries(chosen, 0, 128), ids.flatten()
        worst.equal((tokens, "order"), found.order, flat.argsort(stable=True).int())
        worst.equal((tokens, "totals"), found.totals, torch.bincount(flat, minlength=128).int())
    return worst.line()


def _rows(context: Context) -> Line:
    worst = Worst()
    x, delta = (
        torch.randn(193, 2048, generator=torch.Generator().manual_seed(one)).to(context.dtype) for one in (1, 2)
    )
    weight = torch.rand(2048, generator=torch.Generator().manual_seed(3)).to(context.dtype)
    there = delta.clone().to(context.device)
    total, normed = calls.add_rms_norm(x.to(context.device), there, weight.to(context.device), 1e-6)
    worst.equal("sum", total, x + delta)
    wanted = F.rms_norm((x + delta).double(), (2048,), weight.double(), 1e-6)
    worst.compare("norm", normed, wanted.to(context.dtype), wanted)
    gate, up = x.double().chunk(2, dim=1)
    wanted = F.silu(gate) * up
    worst.compare("SwiGLU", calls.swiglu(x.to(context.device)), wanted.to(context.dtype), wanted)
    return worst.line()


def _greedy(context: Context) -> Line:
    logits = torch.randn(3, 9000 if context.rehearsal else 151_936, generator=torch.Generator().manual_seed(1))
    logits[1, [9, 7000]] = 100.0
    logits[2, 5] = torch.inf
    tokens, finite = calls.choose_greedily(logits.to(context.device))
    worst = Worst()
    worst.equal("tokens", torch.tensor(tokens[:2]), torch.tensor([int(logits[0].argmax()), 9]))
    worst.equal("finite", torch.tensor(finite), torch.tensor([True, True, False]))
    return worst.line()
