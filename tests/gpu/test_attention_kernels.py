"""The kernels of Triton on a GPU, in bfloat16, against attention in float64 of the same values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from workers.attention import cuda, flash
from workers.attention.cuda import RowScales
from workers.attention.plan import AttentionPlan
from workers.bench.cases.paged_cells import CELLS, PagedCell, paged_cell, selections
from workers.kv.paged import LayerKV

CACHES = (torch.bfloat16, torch.int8, torch.float8_e4m3fn)
LONG = ((8192 - 193, 193, 0), (16384, 1024, 4096))
BOUND = 2e-2  # of the largest value


def on_gpu(cell: PagedCell) -> PagedCell:
    """The same cell with its queries and cache in device memory; queries as the kernels read them."""
    kv = cell.kv
    moved = [None if side is None else side.cuda() for side in (kv.keys, kv.values, kv.key_scales, kv.value_scales)]
    return replace(cell, q=cell.q.map(lambda rows: rows.bfloat16().cuda()), kv=LayerKV(*moved))


def make(start: int, rows: int, distance: int, cache: torch.dtype, dim: int, heads: int, sparse: bool) -> PagedCell:
    chosen = tuple(selections(start + rows, rows).values())[:heads] if sparse else None
    made = paged_cell(
        start,
        rows,
        distance,
        cache=cache,
        dim=dim,
        heads=heads,
        kv_heads=2,
        page_size=64,
        selections=chosen,
        in_order=cache == torch.bfloat16,
    )
    return replace(made, q=made.q.map(lambda side: side.bfloat16().float()), scales=made.scales * 4 / dim**0.5)


def check(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.dtype == torch.bfloat16
    assert (got.double().cpu() - wanted).abs().max() <= BOUND * wanted.abs().max()


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize(("start", "rows", "distance"), CELLS + LONG)
def test_staged_rows(start: int, rows: int, distance: int, cache: torch.dtype, dim: int) -> None:
    if cache == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 needs sm_89")
    cell = make(start, rows, distance, cache, dim, 4, False)
    there = on_gpu(cell)
    staged = cuda.stage(there.kv, there.table, start + rows)
    for got, wanted in zip(staged.by_head(), (cell.k, cell.v), strict=True):
        assert torch.equal(got.cpu(), wanted.transpose(0, 1).bfloat16())


@pytest.mark.parametrize("library", [False, True], ids=["our kernel", "a library's kernel"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("start", "rows", "distance"), CELLS + LONG)
def test_dense(start: int, rows: int, distance: int, dim: int, library: bool) -> None:
    cell = make(start, rows, distance, torch.bfloat16, dim, 8, False)
    if library:
        cell = replace(cell, scales=torch.full((rows,), dim**-0.5))
    there = on_gpu(cell)
    staged = cuda.stage(there.kv, there.table, start + rows)
    scales = RowScales.of(cell.scales, torch.device("cuda"))
    check(cuda.attend_dense(there.q, staged, cell.plan, scales, library=library), cell.reference())


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("tiles", [(64,), (128,), (128, 64)])
@pytest.mark.parametrize(("start", "rows", "distance"), CELLS + LONG)
def test_selections(start: int, rows: int, distance: int, tiles: tuple[int, ...], dim: int) -> None:
    """Staged with one size of tiles, in place where heads choose theirs."""
    cell = make(start, rows, distance, torch.int8 if len(tiles) == 1 else torch.bfloat16, dim, 6, True)
    there, device = on_gpu(cell), torch.device("cuda")
    lists = [cuda.plan_lists(cell.plan, tile, device) for tile in tiles]
    staged = cuda.stage(there.kv, there.table, start + rows)
    got, visited = cuda.attend_lists(there.q, staged, cell.plan, RowScales.of(cell.scales, device), lists)
    twin = cuda.executed_plan(cell.plan, tiles, cuda.tile_rates(device, dim))
    assert visited.tolist() == [twin.visited_pairs(head) for head in range(6)]
    check(got, cell.reference(twin))


def test_selections_do_not_wait_for_the_device() -> None:
    cell = make(8192 - 193, 193, 0, torch.int8, 128, 6, True)
    there, device = on_gpu(cell), torch.device("cuda")
    lists, scales = [cuda.plan_lists(cell.plan, 128, device)], RowScales.of(cell.scales, device)
    for mode in ("default", "error"):  # the first call builds the kernels, and copies the page table
        torch.cuda.set_sync_debug_mode(mode)
        try:
            cuda.attend_lists(there.q, cuda.stage(there.kv, there.table, 8192), cell.plan, scales, lists)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_path_is_taken() -> None:
    cell = on_gpu(make(500, 193, 250, torch.int8, 128, 6, True))
    assert cuda.supports(cell.q.intra, cell.kv, cell.plan)
    assert cuda.supports(cell.q.intra, cell.kv, AttentionPlan(0, 64))
    assert not cuda.supports(cell.q.intra, cell.kv, AttentionPlan(0, 63))


@pytest.mark.parametrize("dim", [64, 128])
def test_hopper_has_cudnns_attention(dim: int) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("a GPU of another kind")
    assert flash.has_fast_kernel(torch.device("cuda", 0), torch.bfloat16, dim)
