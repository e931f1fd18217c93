"""Executes attention plans over paged KV with PyTorch's fused flash kernels (CPU and CUDA).

Each key range is read where it lies: a run of neighbouring pages is a view, and only shorter fragments are gathered
into a scratch buffer of at most `FRAGMENT_TOKENS` keys. Scores never leave the kernel; partial results of a row over
several runs are joined by their log-sum-exp in float32.

Legend: `T` rows, `H` query heads, `K` KV heads, `G = H // K`, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from workers.attention.plan import AttentionPlan, KeyRange
from workers.kv_cache import BlockTable, SlotRun
from workers.model.layers import row_blocks

FRAGMENT_TOKENS = 4096  # most keys gathered at once when pages do not lie together
MIN_VIEW_TOKENS = 1024  # runs at least this long are read in place; below, a copy costs less than a kernel call


def attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: BlockTable, plan: AttentionPlan, scale: float
) -> torch.Tensor:
    """Attention of one slice over its paged context.

    Args:
        q: `[T, H, D]`, rotated.
        keys, values: `[K, slots, D]`, one layer of the cache; the slice's own rows are already written.
        table: where the sequence's positions lie.
        plan: which keys each tile of rows visits.
        scale: factor on the logits.

    Returns:
        `[T, H, D]` in the type of `q`.
    """
    tiles = []  # they cover the rows in order
    for tile in plan.tiles:
        rows = q[tile.start : tile.stop]
        partial = _Merger()
        for key_range in tile.keys:
            for k, v in _pieces(keys, values, table, key_range):
                partial.add(*_flash(rows, k, v, key_range.causal, scale))
        tiles.append(partial.result(q.dtype))
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles)


def _pieces(
    keys: torch.Tensor, values: torch.Tensor, table: BlockTable, key_range: KeyRange
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut a key range into `[K, n, D]` pieces: views of long runs, gathered fragments. A causal range is one piece."""
    runs = table.runs(key_range.start, key_range.stop)
    if key_range.causal and len(runs) > 1:  # at most a query tile of keys
        yield _gather(keys, runs), _gather(values, runs)
        return
    fragments: list[SlotRun] = []
    pending = 0
    for run in runs:
        if len(runs) > 1 and run.length < MIN_VIEW_TOKENS:
            fragments.append(run)
            pending += run.length
        else:
            yield keys[:, run.first : run.first + run.length], values[:, run.first : run.first + run.length]
        if pending >= FRAGMENT_TOKENS - MIN_VIEW_TOKENS:
            yield _gather(keys, fragments), _gather(values, fragments)
            fragments, pending = [], 0
    if fragments:
        yield _gather(keys, fragments), _gather(values, fragments)


def _gather(cache: torch.Tensor, runs: list[SlotRun]) -> torch.Tensor:
    return torch.cat([cache[:, first : first + length] for first, length in runs], dim=1)


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One kernel call: output `[T, H, D]` and log-sum-exp `[T, H]` in float32.

    Few rows (decoding) are folded so that all query heads of a KV head pass over K and V together.
    """
    rows, heads, dim = q.shape
    kv_heads = k.shape[0]
    group = heads // kv_heads
    if causal and rows > 1:
        out, lse = _kernel(q.transpose(0, 1)[None], k[None], v[None], True, scale)
        return out[0].transpose(0, 1), lse[0].transpose(0, 1)
    if rows * group <= 64 or q.device.type == "cuda":
        folded = q.view(rows, kv_heads, group, dim).permute(1, 0, 2, 3).reshape(1, kv_heads, rows * group, dim)
        out, lse = _kernel(folded, k[None], v[None], False, scale)
        out = out[0].view(kv_heads, rows, group, dim).permute(1, 0, 2, 3).reshape(rows, heads, dim)
        return out, lse[0].view(kv_heads, rows, group).permute(1, 0, 2).reshape(rows, heads)
    out, lse = _kernel(q.transpose(0, 1)[None], k[None], v[None], False, scale)
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def _kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flash attention on `[1, heads, rows, D]`; returns the output and the natural log-sum-exp `[1, heads, rows]`."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out, lse
    if q.shape[1] != k.shape[1]:  # the CUDA operators want equal head counts; views with stride 0 copy nothing
        group = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(group, dim=1)
        v = v.repeat_interleave(group, dim=1)
    if q.dtype == torch.float32:  # flash kernels on CUDA take 16-bit types only
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, causal, scale=scale
        )
        return out, lse[..., : q.shape[2]]
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    return out, lse[..., : q.shape[2]]


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
