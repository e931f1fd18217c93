"""Executes attention plans over paged KV with PyTorch's kernels: the CUDA path, and the twin of the compiled kernel.

Dense plans run through the fused flash kernels. Each key range is read where it lies: a run of neighbouring pages is a
view, and only shorter fragments are gathered into a scratch buffer of at most `FRAGMENT_TOKENS` keys; a cache of
another type than the queries is converted in such buffers too. Scores never leave the kernel; partial results of a row
over several runs are joined by their log-sum-exp in float32. Heads that select their keys gather them, tile by tile.

Legend: `T` rows, `H` query heads, `K` KV heads, `G = H // K`, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from workers.attention.flash import flash
from workers.attention.plan import AttentionPlan, IntArray, Rotation, TileKeys
from workers.attention.queries import Queries
from workers.kernels.blocking import row_blocks
from workers.kv.paged import LayerKV, PageTable, SlotRun

FRAGMENT_TOKENS = 4096  # most keys gathered or converted at once
MIN_VIEW_TOKENS = 1024  # runs at least this long are read in place; below, a copy costs less than a kernel call
DENSE_ROWS = 4096  # most rows of one kernel call; bounds its scratch memory


def attend(q: Queries, kv: LayerKV, table: PageTable, plan: AttentionPlan, scales: torch.Tensor) -> torch.Tensor:
    """Attention of the rows of one plan over their paged context; the contract is that of `attend.attend`."""
    q, scale = _one_scale(q, scales)
    return _dense(q, kv, table, plan, scale) if plan.heads is None else _sparse(q, kv, table, plan, scale)


def _one_scale(q: Queries, scales: torch.Tensor) -> tuple[Queries, float]:
    """Queries that share one factor: rows of another one (generated tokens computed in bulk) are stretched."""
    first = float(scales[0])
    if bool((scales == first).all()):
        return q, first
    ratio = (scales / first).to(q.intra.device)[:, None, None]

    def stretch(rows: torch.Tensor | None) -> torch.Tensor | None:
        return None if rows is None else (rows.float() * ratio).to(rows.dtype)

    return Queries((q.intra.float() * ratio).to(q.intra.dtype), stretch(q.succ), stretch(q.inter)), first


def _dense(q: Queries, kv: LayerKV, table: PageTable, plan: AttentionPlan, scale: float) -> torch.Tensor:
    dtype = q.intra.dtype
    tiles = []  # they cover the rows in order
    for row in range(0, plan.length, DENSE_ROWS):
        stop = min(row + DENSE_ROWS, plan.length)
        first = plan.start + row
        plain = first if stop - row > 1 else first + 1  # keys that every row of the tile may see
        partial = _Merger()
        for low, high, rotation in plan.regions:
            rows = q.of(rotation)[row:stop]
            for k, v in _pieces(kv, table.runs(low, min(high, plain)), dtype):
                partial.add(*flash(rows, k, v, False, scale))
        if stop - row > 1:
            k, v = _whole(kv, table.runs(first, plan.start + stop), dtype)
            partial.add(*flash(q.intra[row:stop], k, v, True, scale))
        tiles.append(partial.result(dtype))
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles)


def _sparse(q: Queries, kv: LayerKV, table: PageTable, plan: AttentionPlan, scale: float) -> torch.Tensor:
    """Head by head and tile by tile: gather the keys of a tile, then one masked softmax in float32."""
    out = torch.empty(q.intra.shape, dtype=q.intra.dtype, device=q.intra.device)
    heads, kv_heads = out.shape[1], kv.keys.shape[0]
    for head in range(heads):
        for tile in plan.tile_keys(head):
            out[tile.start : tile.stop, head] = _tile(q, kv, table, plan, scale, tile, (head, head * kv_heads // heads))
    return out


def _tile(
    q: Queries, kv: LayerKV, table: PageTable, plan: AttentionPlan, scale: float, tile: TileKeys,
    heads: tuple[int, int],
) -> torch.Tensor:  # fmt: skip
    head, kv_head = heads
    device = q.intra.device
    logits, visited = [], []
    for low, high, rotation in plan.regions:
        positions = _positions(tile, rotation, low, high)
        if not len(positions):
            continue
        slots = torch.from_numpy(table.slots(positions)).to(device)
        k = _float(kv.keys[kv_head, slots], None if kv.key_scales is None else kv.key_scales[kv_head, slots])
        logits.append(q.of(rotation)[tile.start : tile.stop, head].float() @ k.T)
        visited.append((torch.from_numpy(positions).to(device), slots))
    keys, slots = (torch.cat(parts) for parts in zip(*visited, strict=True))
    own = torch.arange(plan.start + tile.start, plan.start + tile.stop, device=device)
    scores = torch.cat(logits, dim=1).mul_(scale).masked_fill_(keys > own[:, None], -torch.inf)
    v = _float(kv.values[kv_head, slots], None if kv.value_scales is None else kv.value_scales[kv_head, slots])
    return torch.softmax(scores, dim=1) @ v


def _positions(tile: TileKeys, rotation: Rotation, low: int, high: int) -> IntArray:
    """Keys of a tile in one region `low .. high - 1`: ranges first, then columns."""
    spans = [np.arange(keys.start, keys.stop, dtype=np.int32) for keys in tile.ranges if keys.rotation == rotation]
    columns = tile.columns[(tile.columns >= low) & (tile.columns < high)]
    return np.concatenate([*spans, columns])


def _float(cache: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    return cache.float() if scales is None else cache.float() * scales[..., None]


def _pieces(kv: LayerKV, runs: list[SlotRun], dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut runs of slots into `[K, n, D]` pieces of keys and values: views of long runs, gathered fragments."""
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
    """Keys and values `[K, n, D]` of all runs in `dtype`: a view when there is one run of that type, else a copy."""
    return _rows(kv.keys, kv.key_scales, runs, dtype), _rows(kv.values, kv.value_scales, runs, dtype)


def _rows(cache: torch.Tensor, scales: torch.Tensor | None, runs: list[SlotRun], dtype: torch.dtype) -> torch.Tensor:
    rows = _gather(cache, runs)
    return rows.to(dtype) if scales is None else (rows.float() * _gather(scales, runs)[..., None]).to(dtype)


def _gather(cache: torch.Tensor, runs: list[SlotRun]) -> torch.Tensor:
    if len(runs) == 1:
        first, length = runs[0]
        return cache[:, first : first + length]
    return torch.cat([cache[:, first : first + length] for first, length in runs], dim=1)


class _Merger:
    """Joins partial attention results of the same rows over disjoint keys; only the last join rounds."""

    def __init__(self) -> None:
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] = []  # at most two: output and log-sum-exp

    def add(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        if len(self._parts) == 2:
            self._parts = [_join(self._parts[0], self._parts[1], torch.float32)]
        self._parts.append((out, lse))

    def result(self, dtype: torch.dtype) -> torch.Tensor:
        assert self._parts, "a query tile without keys"
        out = self._parts[0][0] if len(self._parts) == 1 else _join(self._parts[0], self._parts[1], dtype)[0]
        return out.to(dtype)


def _join(
    old: tuple[torch.Tensor, torch.Tensor], new: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weigh two results by their sums of exponentials, in float32 and in blocks of rows; may overwrite the old one."""
    out, lse = old
    share = torch.sigmoid(new[1] - lse)[..., None]  # of the new keys in the whole sum
    joined = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
    for rows in row_blocks(out):
        joined[rows] = torch.lerp(out[rows].float(), new[0][rows].float(), share[rows])
    return joined, torch.logaddexp(lse, new[1])
