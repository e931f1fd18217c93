"""Attention on CUDA devices: keys and values are staged as contiguous rows, then kernels of Triton execute the plan.

A cache in bfloat16 whose context lies in one run of slots is read where it is. Dense plans run through a library's
fused kernel over the staged rows where one works, else through a kernel of our own, which also takes rows of different
logit factors. Plans with selections run through lists that all tiles of the rows share (workers/kernels/triton/lists),
with tiles that each head chooses on the device. `executed_plan` is the slow twin of those: the same pairs as an
ordinary plan.

Triton is imported when one of these kernels is called for the first time.

Legend: `T` rows, `H` query heads, `K` KV heads, `D` head dim, `S` context length, `C` columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from workers.attention import cards, flash, torch_backend
from workers.attention.plan import AttentionPlan, Queries, Rotation, Selection
from workers.kernels.device import moved, runs_triton
from workers.kernels.triton.lists import TILES, CellLists, Rows, cell_lists, choose_tiles, most_blocks
from workers.kv.paged import LayerKV, PageTable

if TYPE_CHECKING:
    from workers.kernels.triton.staging import Staged

MIN_ROWS = 64  # staging moves about three times the bytes of the context: fewer rows read it in place
_DIMS = (64, 128)
_CACHES = (torch.bfloat16, torch.int8, torch.float8_e4m3fn)
_COLUMN_BYTES = 1 << 30  # for the gathered columns of the heads that run together, and for their entries
_ENTRY_BYTES = 512 << 20
_TILE_RATES = dict(zip(TILES, (10, 7), strict=True))  # pairs in the same time by rows of a tile; assumed, not measured


@dataclass(frozen=True, slots=True, eq=False)
class RowScales:
    """The factors on the logits of rows: `each` `[T]` float32 on the device, and `common` where all have the same."""

    each: torch.Tensor
    common: float | None

    @staticmethod
    def of(scales: torch.Tensor, device: torch.device) -> RowScales:
        """Copy factors `[T]` float32 in host memory to the device, without waiting for it."""
        first = float(scales[0])
        return RowScales(moved(scales, device), first if bool((scales == first).all()) else None)


def supports(q: torch.Tensor, kv: LayerKV, plan: AttentionPlan) -> bool:
    """Return whether these kernels take queries `[T, H, D]` over this cache, and are worth their staging."""
    is_worth = plan.length >= MIN_ROWS or plan.heads is not None
    return is_worth and supports_lists(q.device, q.dtype, q.shape[-1], kv.keys.dtype)


def supports_lists(device: torch.device, dtype: torch.dtype, dim: int, cache: torch.dtype) -> bool:
    """Return whether the kernels take queries of this type and dim over a cache of type `cache`."""
    return _takes(device, dtype, dim) and cache in _CACHES


def compute_family(device: torch.device, dtype: torch.dtype, dim: int) -> str:
    """Return the `flash.compute_family` of a device, with `-triton` where these kernels compute for this type and dim.

    Results of other kernels on the same device differ in their last bits, and those of sparse prefill in the pairs that
    are visited: they depend on the tiles, and so on their rates, which are named too. `-own` says that dense plans run
    through our kernel; few rows still go through the library before it (`cuda-9.0-cudnn-own-triton-10-7`).
    """
    family = flash.compute_family(device, dtype, dim)
    if not _takes(device, dtype, dim):
        return family
    own = [] if flash.has_fast_kernel(device, dtype, dim) else [cards.OWN]
    rates = tile_rates(device, dim)
    return "-".join([family, *own, "triton", *(str(rates[tile]) for tile in TILES)])


def tile_rates(device: torch.device, dim: int) -> dict[int, int]:
    """Return how many pairs of heads of `dim` a device computes in a time with tiles of so many rows, for all `TILES`.

    Those that were measured on the card (`cards.json`), else the ones that are assumed.
    """
    measured = {tile: round(rate) for tile, rate in cards.tile_rates(device, dim).items()}
    return measured if all(measured.get(tile) for tile in TILES) else _TILE_RATES


def attend(
    q: Queries, kv: LayerKV, table: PageTable, plan: AttentionPlan, scales: torch.Tensor,
    visited: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Compute attention of the rows of one plan; the contract is that of `attend.attend`.

    `visited` may be in device memory; else the call waits for the device.
    """
    device = q.intra.device
    staged, row_scales = stage(kv, table, plan.start + plan.length), RowScales.of(scales, device)
    if plan.heads is None:
        if visited is not None:
            visited.fill_(plan.causal_pairs)
        return attend_dense(q, staged, plan, row_scales)
    lists = [plan_lists(plan, tile, device) for tile in TILES]
    out, pairs = attend_lists(q, staged, plan, row_scales, lists)
    if visited is not None:
        visited.copy_(pairs)
    return out


def stage(kv: LayerKV, table: PageTable, stop: int) -> Staged:
    """Return the keys and values of positions before `stop` of one layer as contiguous rows: in place, or staged.

    The rows serve all pieces of a step that lie before `stop`, of all sequences whose pages they are.
    """
    from workers.kernels.triton import staging
    from workers.kernels.triton.blocks import Target

    dtype, runs = Target.of(kv.keys.device).rows_dtype, table.runs(0, stop)
    if kv.keys.dtype == dtype and kv.key_scales is None and len(runs) == 1 and stop >= staging.MOST_KEYS:
        return staging.in_place(kv.keys, kv.values, runs[0].first, stop)
    return staging.stage(
        kv.keys, kv.values, kv.key_scales, kv.value_scales, table.slots_on(kv.keys.device), table.page_size, stop,
        dtype=dtype,
    )  # fmt: skip


def attend_dense(
    q: Queries, staged: Staged, plan: AttentionPlan, scales: RowScales, *, library: bool | None = None
) -> torch.Tensor:
    """Compute attention of rows over all keys up to their own; returns `[T, H, D]`.

    Args:
        library: whether a library's kernel is used; by default where one works and all rows share a factor.
    """
    device, dim = q.intra.device, q.intra.shape[2]
    if library is None:
        library = scales.common is not None and flash.has_fast_kernel(device, q.intra.dtype, dim)
    if library:
        assert scales.common is not None
        table = PageTable(staged.stop)
        table.append([0])
        return torch_backend.attend_dense(q, LayerKV(*staged.by_head()), table, plan, scales.common)
    from workers.kernels.triton.blocks import QuerySides
    from workers.kernels.triton.dense_attention import dense_attention

    out = torch.empty(q.intra.shape, dtype=q.intra.dtype, device=device)
    dense_attention(QuerySides(q.intra, q.succ, q.inter), plan_rows(plan), staged, scales.each, out)
    return out


def attend_lists(
    q: Queries, staged: Staged, plan: AttentionPlan, scales: RowScales, lists: Sequence[CellLists],
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Compute attention of the rows of one cell over what its lists visit. Nothing returns to the host.

    Heads run together as far as their columns and entries fit into scratch memory, those with most work first.

    Args:
        plan: the rows; its own selections are not read.
        lists: of one or two sizes of tiles, of which each head takes one.
        out: `[T, H, D]`, contiguous, to write to.

    Returns:
        `out`, or a new `[T, H, D]` in the type of `q`, and the number of pairs that every head visits, `[H]` int64 on
        the device.
    """
    from workers.kernels.triton.blocks import QuerySides
    from workers.kernels.triton.dense_attention import dense_attention
    from workers.kernels.triton.entries import entry_bytes, fill_entries
    from workers.kernels.triton.sparse_attention import sparse_attention
    from workers.kernels.triton.staging import Columns, column_bytes, gather_columns
    from workers.kernels.triton.tiles import choose_tiles as choose_on_device

    rows, heads, device = plan_rows(plan), q.intra.shape[1], q.intra.device
    group, rates = heads // staged.kv_heads, tile_rates(device, q.intra.shape[2])
    sides = QuerySides(q.intra, q.succ, q.inter)
    head_tiles, order, visited = choose_on_device(lists, rows, [rates[one.tile] for one in lists])
    out = torch.empty(q.intra.shape, dtype=q.intra.dtype, device=device) if out is None else out
    assert out.is_contiguous()
    dense_attention(sides, rows, staged, scales.each, out, head_tiles)
    for one in lists:
        capacity = one.columns.shape[1]
        columns_fit = _COLUMN_BYTES // column_bytes(capacity, q.intra.shape[2])
        most = most_blocks(rows, one.tile)
        together = max(1, min(heads, columns_fit, _ENTRY_BYTES // entry_bytes(one, rows, most)))
        columns = Columns.empty(together, capacity, staged.keys)
        for some in order.split(together):
            entries = fill_entries(one, rows, staged, some, head_tiles, visited, group, most)
            gather_columns(columns, one, staged, some, head_tiles, group)
            sparse_attention(sides, rows, staged, columns, scales.each, some, head_tiles, entries, one.tile, out)
    return out, visited


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


def executed_plan(
    plan: AttentionPlan, tiles: Sequence[int] = TILES, rates: Mapping[int, int] = _TILE_RATES
) -> AttentionPlan:
    """Return a plan of the pairs that these kernels visit, by default on a card that was not measured.

    Tiles are whole ones, of one of the given sizes for each head, and heads with most keys in blocks are dense.

    Args:
        rates: the `tile_rates` of the card.
    """
    if plan.heads is None:
        return plan
    lists = [plan_lists(plan, tile) for tile in tiles]
    head_tiles = choose_tiles(lists, plan_rows(plan), [rates[tile] for tile in tiles]).head_tiles.tolist()
    everything = Selection.everything(plan.start + plan.length)
    heads = (head if tile else everything for head, tile in zip(plan.heads, head_tiles, strict=True))
    return replace(
        plan, heads=tuple(heads), whole_tiles=True, head_tiles=tuple(tile or plan.tile for tile in head_tiles)
    )


def _takes(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    return runs_triton(device) and dtype == torch.bfloat16 and dim in _DIMS
