"""Execute attention plans over paged KV with PyTorch: the fallback of the compiled kernel and of the CUDA kernels.

Dense plans run through fused kernels (`flash`). Long runs of slots are read in place, as views; shorter ones are
gathered into buffers of at most `FRAGMENT_TOKENS` keys, where a cache of another type than the queries is converted
too. The partial results of a row over several runs are merged by their log-sum-exps in float32. Heads with a selection
gather their keys tile by tile.

Legend: `T` rows, `H` query heads, `K` KV heads, `G = H // K`, `D` head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch

from workers.attention.flash import flash
from workers.attention.plan import AttentionPlan, Queries, TileKeys
from workers.kernels.blocking import row_blocks
from workers.kernels.device import runs_triton
from workers.kv.paged import LayerKV, PageTable, SlotRun

FRAGMENT_TOKENS = 4096  # upper bound on the keys gathered or converted at once
MIN_VIEW_TOKENS = 1024  # runs of this length and more are read in place; below, a copy costs less than a kernel call
DENSE_ROWS = 4096  # upper bound on the rows of one kernel call on a CPU, and so on its scratch memory


def attend(q: Queries, kv: LayerKV, table: PageTable, plan: AttentionPlan, scales: torch.Tensor) -> torch.Tensor:
    """Compute attention of the rows of one plan; the contract is that of `attend.attend`."""
    q, scale = _with_one_scale(q, scales)
    return attend_dense(q, kv, table, plan, scale) if plan.heads is None else _sparse(q, kv, table, plan, scale)


def _with_one_scale(q: Queries, scales: torch.Tensor) -> tuple[Queries, float]:
    """Return queries that share one logit factor: rows of another one (generated tokens in bulk) are multiplied."""
    first = float(scales[0])
    if bool((scales == first).all()):
        return q, first
    ratio = (scales / first).to(q.intra.device)[:, None, None]
    return q.map(lambda rows: (rows.float() * ratio).to(rows.dtype)), first


def attend_dense(q: Queries, kv: LayerKV, table: PageTable, plan: AttentionPlan, scale: float) -> torch.Tensor:
    """Compute attention `[T, H, D]` of rows over all keys up to their own; `scale` is the factor on their logits."""
    if runs_triton(q.intra.device):
        whole = list(_partial_results(q, kv, table, plan, scale, 0, plan.length))
        return merge_on_device(whole).to(q.intra.dtype)
    outputs = []  # of the rows, in order
    for row in range(0, plan.length, DENSE_ROWS):
        parts = _partial_results(q, kv, table, plan, scale, row, min(row + DENSE_ROWS, plan.length))
        out, _ = functools.reduce(_merge, parts)
        outputs.append(out.to(q.intra.dtype))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _partial_results(
    q: Queries, kv: LayerKV, table: PageTable, plan: AttentionPlan, scale: float, row: int, stop: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield output and log-sum-exp of rows `row .. stop - 1` over disjoint parts of their keys."""
    dtype, first = q.intra.dtype, plan.start + row
    shared = first if stop - row > 1 else first + 1  # keys before it are visible to all of these rows
    for low, high, rotation in plan.regions:
        rows = q.of(rotation)[row:stop]
        for k, v in _key_blocks(kv, table.runs(low, min(high, shared)), dtype):
            yield flash(rows, k, v, False, scale)
    if stop - row > 1:
        k, v = _whole(kv, table.runs(first, plan.start + stop), dtype)
        yield flash(q.intra[row:stop], k, v, True, scale)


def _merge(
    old: tuple[torch.Tensor, torch.Tensor], new: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight two results by their sums of exponentials, in float32 and block by block; may overwrite the old one."""
    out, lse = old
    weight = torch.sigmoid(new[1] - lse)[..., None]  # share of the new keys in the sum
    merged = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    for rows in row_blocks(out):
        merged[rows] = torch.lerp(out[rows].float(), new[0][rows].float(), weight[rows])
    return merged, torch.logaddexp(lse, new[1])


def merge_on_device(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Weight results by their sums of exponentials, those of a context in one run of slots in one launch."""
    from workers.kernels.triton.merge import MOST_PARTS, merge_parts

    while len(parts) > MOST_PARTS:
        parts[:2] = [_merge(*parts[:2])]
    dtype = parts[0][0].dtype
    return parts[0][0] if len(parts) == 1 else merge_parts([(out.to(dtype), lse) for out, lse in parts])


def _sparse(q: Queries, kv: LayerKV, table: PageTable, plan: AttentionPlan, scale: float) -> torch.Tensor:
    """Gather the keys of each head and tile, and compute one masked softmax over them in float32."""
    out = torch.empty(q.intra.shape, dtype=q.intra.dtype, device=q.intra.device)
    for head in range(out.shape[1]):
        for tile in plan.tile_keys(head):
            out[tile.start : tile.stop, head] = _sparse_tile(q, kv, table, plan, scale, tile, head)
    return out


def _sparse_tile(
    q: Queries, kv: LayerKV, table: PageTable, plan: AttentionPlan, scale: float, tile: TileKeys, head: int
) -> torch.Tensor:
    kv_head, device = head * kv.keys.shape[0] // q.intra.shape[1], q.intra.device
    logits, slots = [], []
    for rotation, positions in tile.keys.items():
        slots.append(torch.from_numpy(table.slots(positions)).to(device))
        k = _float(kv.keys, kv.key_scales, kv_head, slots[-1])
        logits.append(q.of(rotation)[tile.start : tile.stop, head].float() @ k.T)
    keys = torch.from_numpy(np.concatenate([*tile.keys.values()])).to(device)
    own = torch.arange(plan.start + tile.start, plan.start + tile.stop, device=device)
    scores = torch.cat(logits, dim=1).mul_(scale).masked_fill_(keys > own[:, None], -torch.inf)
    return torch.softmax(scores, dim=1) @ _float(kv.values, kv.value_scales, kv_head, torch.cat(slots))


def _float(cache: torch.Tensor, scales: torch.Tensor | None, kv_head: int, slots: torch.Tensor) -> torch.Tensor:
    rows = cache[kv_head, slots].float()
    return rows if scales is None else rows * scales[kv_head, slots][..., None]


def _key_blocks(kv: LayerKV, runs: list[SlotRun], dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield keys and values `[K, n, D]` of all runs: views of the long ones, and gathered blocks of the others."""
    if kv.keys.dtype != dtype:
        runs = [
            SlotRun(first + at, min(FRAGMENT_TOKENS - MIN_VIEW_TOKENS, length - at))
            for first, length in runs
            for at in range(0, length, FRAGMENT_TOKENS - MIN_VIEW_TOKENS)
        ]
    fragments: list[SlotRun] = []
    pending = 0
    for run in runs:
        if len(runs) > 1 and run.length < MIN_VIEW_TOKENS:
            fragments.append(run)
            pending += run.length
        else:
            yield _whole(kv, [run], dtype)
        if pending >= FRAGMENT_TOKENS - MIN_VIEW_TOKENS:
            yield _whole(kv, fragments, dtype)
            fragments, pending = [], 0
    if fragments:
        yield _whole(kv, fragments, dtype)


def _whole(kv: LayerKV, runs: list[SlotRun], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values `[K, n, D]` of all runs in `dtype`: views of a single run of that type, else copies."""
    return _rows(kv.keys, kv.key_scales, runs, dtype), _rows(kv.values, kv.value_scales, runs, dtype)


def _rows(cache: torch.Tensor, scales: torch.Tensor | None, runs: list[SlotRun], dtype: torch.dtype) -> torch.Tensor:
    rows = _gather(cache, runs)
    return rows.to(dtype) if scales is None else (rows.float() * _gather(scales, runs)[..., None]).to(dtype)


def _gather(cache: torch.Tensor, runs: list[SlotRun]) -> torch.Tensor:
    if len(runs) == 1:
        first, length = runs[0]
        return cache[:, first : first + length]
    return torch.cat([cache[:, first : first + length] for first, length in runs], dim=1)
