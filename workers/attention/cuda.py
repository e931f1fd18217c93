"""Attention on CUDA devices: keys and values are staged as contiguous rows, then kernels of Triton execute the plan.

Dense plans run through a library's fused kernel over the staged rows where one works, else through a kernel of our own,
which also takes rows of different logit factors. Plans with selections run through lists that all tiles of the rows
share (workers/kernels/triton/lists). `executed_plan` is the slow twin of those: the same pairs as an ordinary plan.

Triton is imported when one of these kernels is called for the first time.

Legend: `T` rows, `H` query heads, `K` KV heads, `D` head dim, `S` context length, `C` columns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from workers.attention import flash, torch_backend
from workers.attention.plan import AttentionPlan, Queries, Rotation, Selection
from workers.kernels.device import moved, runs_triton
from workers.kernels.triton.lists import BLOCK, TILES, CellLists, Rows, cell_lists, dense_heads
from workers.kv.paged import LayerKV, PageTable

if TYPE_CHECKING:
    from workers.kernels.triton.staging import Staged

MIN_ROWS = 64  # staging moves about three times the bytes of the context: fewer rows read it in place
_DIMS = (64, 128)
_CACHES = (torch.bfloat16, torch.int8, torch.float8_e4m3fn)
_COLUMN_BYTES = 1 << 30  # for the gathered columns of the heads that run together, and for their entries
_ENTRY_BYTES = 256 << 20


def supports(q: torch.Tensor, kv: LayerKV, plan: AttentionPlan) -> bool:
    """Return whether these kernels take queries `[T, H, D]` over this cache, and are worth their staging."""
    is_worth = plan.length >= MIN_ROWS or plan.heads is not None
    return is_worth and supports_lists(q.device, q.dtype, q.shape[-1], kv.keys.dtype)


def supports_lists(device: torch.device, dtype: torch.dtype, dim: int, cache: torch.dtype) -> bool:
    """Return whether the kernels take queries of this type and dim over a cache of type `cache`."""
    return _takes(device, dtype, dim) and cache in _CACHES


def compute_family(device: torch.device, dtype: torch.dtype, dim: int) -> str:
    """Return the `flash.compute_family` of a device, with `-triton` where these kernels compute for this type and dim.

    Results of other kernels on the same device differ in their last bits.
    """
    family = flash.compute_family(device, dtype, dim)
    return f"{family}-triton" if _takes(device, dtype, dim) else family


def attend(
    q: Queries, kv: LayerKV, table: PageTable, plan: AttentionPlan, scales: torch.Tensor,
    visited: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Compute attention of the rows of one plan; the contract is that of `attend.attend`.

    `visited` may be in device memory; else the call waits for the device.
    """
    heads = q.intra.shape[1]
    if plan.heads is None:
        if visited is not None:
            visited.fill_(plan.causal_pairs)
        return attend_dense(q, stage(kv, table, plan.start + plan.length), plan, scales)
    lists = plan_lists(plan, device=q.intra.device)
    staged = stage(kv, table, plan.start + plan.length, column_rows(lists.columns.shape[1], heads, q.intra.shape[2]))
    out, pairs = attend_lists(q, staged, plan, scales, lists)
    if visited is not None:
        visited.copy_(pairs)
    return out


def stage(kv: LayerKV, table: PageTable, stop: int, column_rows: int = 0) -> Staged:
    """Stage the keys and values of positions before `stop` of one layer, with room for gathered columns.

    The rows serve all pieces of a step that lie before `stop`.
    """
    from workers.kernels.triton import staging
    from workers.kernels.triton.blocks import Target

    return staging.stage(
        kv.keys, kv.values, kv.key_scales, kv.value_scales, table.slots_on(kv.keys.device), table.page_size, stop,
        column_rows=column_rows, dtype=Target.of(kv.keys.device).rows_dtype,
    )  # fmt: skip


def column_rows(capacity: int, heads: int, dim: int) -> int:
    """Return the rows to reserve for columns of at most `capacity` a head: those of all heads, or of as many as fit."""
    room = -(-capacity // BLOCK) * BLOCK
    return room * min(heads, max(1, _COLUMN_BYTES // (4 * dim * room)))


def attend_dense(
    q: Queries, staged: Staged, plan: AttentionPlan, scales: torch.Tensor, *, library: bool | None = None
) -> torch.Tensor:
    """Compute attention of rows over all keys up to their own; returns `[T, H, D]`.

    Args:
        scales: `[T]` float32 in host memory.
        library: whether a library's kernel is used; by default where one works and all rows share a factor.
    """
    device, dim = q.intra.device, q.intra.shape[2]
    if library is None:
        library = bool((scales == scales[0]).all()) and flash.has_fast_kernel(device, q.intra.dtype, dim)
    if library:
        table = PageTable(staged.stop)
        table.append([0])
        whole = LayerKV(*staged.by_head(0, staged.stop))
        return torch_backend.attend(q, whole, table, plan, scales)
    from workers.kernels.triton.blocks import QuerySides
    from workers.kernels.triton.dense_attention import dense_attention

    out = torch.empty(q.intra.shape, dtype=q.intra.dtype, device=device)
    dense_attention(QuerySides(q.intra, q.succ, q.inter), plan_rows(plan), staged, moved(scales, device), out)
    return out


def attend_lists(
    q: Queries, staged: Staged, plan: AttentionPlan, scales: torch.Tensor, lists: CellLists
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention of the rows of one cell over what its lists visit. Nothing returns to the host.

    Heads run together as far as their columns and entries fit into scratch memory, those with most entries first.

    Args:
        staged: the context, with room for the columns of at least one head.
        plan: the rows; its own selections are not read.
        scales: `[T]` float32, in host or device memory.

    Returns:
        `[T, H, D]` in the type of `q`, and the number of pairs that every head visits, `[H]` int64 on the device.

    Raises:
        ValueError: no room for the columns of one head.
    """
    from workers.kernels.triton.blocks import QuerySides
    from workers.kernels.triton.dense_attention import dense_attention
    from workers.kernels.triton.entries import entry_bytes, fill_entries
    from workers.kernels.triton.sparse_attention import sparse_attention
    from workers.kernels.triton.staging import column_room, gather_columns

    rows, heads, device = plan_rows(plan), q.intra.shape[1], q.intra.device
    group, room = heads // staged.kv_heads, column_room(lists.columns.shape[1])
    if staged.column_rows < room:
        raise ValueError(f"sparse attention: staged with {staged.column_rows} rows for columns: need at least {room}")
    together = max(1, min(heads, staged.column_rows // room, _ENTRY_BYTES // entry_bytes(lists, rows)))
    sides, scales = QuerySides(q.intra, q.succ, q.inter), moved(scales, device)
    dense = dense_heads(lists, rows)
    weight = lists.num_blocks + (lists.num_columns + BLOCK - 1) // BLOCK
    order = torch.argsort(torch.where(dense, -1, weight), descending=True, stable=True).int()
    out = torch.empty(q.intra.shape, dtype=q.intra.dtype, device=device)
    visited = torch.empty(heads, rows.tiles(lists.tile), dtype=torch.int64, device=device)
    dense_attention(sides, rows, staged, scales, out, dense)
    for some in order.split(together):
        entries = fill_entries(lists, rows, staged, some, dense, visited, group)
        gather_columns(staged, lists.columns, lists.num_columns, some, group)
        sparse_attention(sides, rows, staged, scales, some, dense, entries, lists.tile, out)
    return out, visited.sum(dim=1)


def plan_rows(plan: AttentionPlan) -> Rows:
    """Return the rows of a plan, and where the regions of their keys begin."""
    first = {rotation: start for start, _, rotation in plan.regions}
    intra = first[Rotation.INTRA]
    return Rows(plan.start, plan.length, first.get(Rotation.SUCC, intra), intra)


def plan_lists(plan: AttentionPlan, tile: int = TILES[0], device: torch.device | str = "cpu") -> CellLists:
    """Return the lists of a plan's selections, made on the host: the slow twin of a selection on the device."""
    assert plan.heads is not None
    offsets, columns = [head.offsets for head in plan.heads], [head.columns for head in plan.heads]
    return cell_lists(offsets, columns, plan.start + plan.length, tile, device)


def executed_plan(plan: AttentionPlan, tile: int = TILES[0]) -> AttentionPlan:
    """Return a plan of the pairs that these kernels visit: whole tiles, and heads with most keys in blocks dense."""
    if plan.heads is None:
        return plan
    dense = dense_heads(plan_lists(plan, tile), plan_rows(plan)).tolist()
    everything = Selection.everything(plan.start + plan.length)
    heads = (everything if is_dense else head for head, is_dense in zip(plan.heads, dense, strict=True))
    return replace(plan, heads=tuple(heads), tile=tile, whole_tiles=True)


def _takes(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    return runs_triton(device) and dtype == torch.bfloat16 and dim in _DIMS
