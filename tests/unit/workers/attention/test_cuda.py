"""The CUDA path as a whole, interpreted: plans over pages against their definition, and what it takes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from workers.attention import cards, cuda, flash
from workers.attention.attend import attend
from workers.attention.cuda import RowScales
from workers.attention.plan import AttentionPlan, Selection
from workers.bench.cases.paged_cells import CELLS, paged_cell, selections
from workers.kernels.triton import staging
from workers.kv.paged import LayerKV

CLOSE = {"atol": 4e-6, "rtol": 4e-6}
CPU = torch.device("cpu")


@pytest.mark.parametrize("library", [False, True], ids=["our kernel", "a library's kernel"])
@pytest.mark.parametrize("cache", [torch.int8, torch.float32], ids=["staged", "in place"])
@pytest.mark.parametrize(("start", "rows", "distance"), [CELLS[0], CELLS[5], CELLS[7]])
def test_dense_plans(start: int, rows: int, distance: int, cache: torch.dtype, library: bool) -> None:
    cell = paged_cell(start, rows, distance, cache=cache, in_order=True)
    if library:
        cell = replace(cell, scales=torch.full((rows,), 0.25))
    staged = cuda.stage(cell.kv, cell.table, start + rows)
    got = cuda.attend_dense(cell.q, staged, cell.plan, RowScales.of(cell.scales, CPU), library=library)
    torch.testing.assert_close(got.double(), cell.reference(), **CLOSE)


def test_libraries_get_rows_of_one_factor_only(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, calls = paged_cell(100, 17), []
    monkeypatch.setattr(flash, "has_fast_kernel", lambda *_: True)
    monkeypatch.setattr(cuda.torch_backend, "attend_dense", lambda *given: calls.append(given) or torch.zeros(1))
    cuda.attend(cell.q, cell.kv, cell.table, cell.plan, cell.scales)
    assert not calls
    cuda.attend(cell.q, cell.kv, cell.table, cell.plan, torch.full((17,), 0.25))
    assert len(calls) == 1
    assert calls[0][-1] == 0.25


@pytest.mark.parametrize(
    ("start", "rows", "distance", "in_order"),
    [(0, 17, 0, True), (640, 67, 256, True), (500, 193, 250, False), (750, 1, 250, True), (1152, 256, 384, True)],
)
def test_selections(start: int, rows: int, distance: int, in_order: bool) -> None:
    """Some heads are dense by the share of their keys, others choose tiles; all visit the pairs of the twin."""
    heads = tuple(selections(start + rows).values())
    cell = paged_cell(start, rows, distance, heads=len(heads), selections=heads, in_order=in_order)
    visited = torch.zeros(len(heads), dtype=torch.int64)
    got = cuda.attend(cell.q, cell.kv, cell.table, cell.plan, cell.scales, visited)
    twin = cuda.executed_plan(cell.plan)
    assert twin.whole_tiles
    assert twin.head_tiles is not None
    assert start < 1000 or set(twin.head_tiles[1:]) == {64, 128}
    assert visited.tolist() == [twin.visited_pairs(head) for head in range(len(heads))]
    assert visited[0] == twin.causal_pairs
    assert start == 0 or visited[1] < twin.causal_pairs
    torch.testing.assert_close(got.double(), cell.reference(twin), **CLOSE)


def test_heads_run_in_groups_where_scratch_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = tuple(selections(217).values())
    cell = paged_cell(200, 17, heads=len(heads), selections=heads)
    whole = cuda.attend(cell.q, cell.kv, cell.table, cell.plan, cell.scales)
    made, empty = [], staging.Columns.empty
    monkeypatch.setattr(
        staging.Columns, "empty", lambda heads, *sizes: made.append((heads, sizes[0])) or empty(heads, *sizes)
    )
    monkeypatch.setattr(cuda, "_COLUMN_BYTES", 4 * 16 * 256 * 4)
    assert torch.equal(cuda.attend(cell.q, cell.kv, cell.table, cell.plan, cell.scales), whole)
    monkeypatch.setattr(cuda, "_ENTRY_BYTES", 1)
    assert torch.equal(cuda.attend(cell.q, cell.kv, cell.table, cell.plan, cell.scales), whole)
    assert made == [(4, 217)] * 2 + [(1, 217)] * 2


def test_one_staging_serves_the_cells_of_a_step() -> None:
    """The first of two cells does not see the second one's keys."""
    heads = tuple(selections(264).values())
    cell = paged_cell(200, 64, heads=len(heads), selections=heads)
    later = paged_cell(200, 130, heads=len(heads))
    k, v = (torch.cat([ours, others[264:]]) for ours, others in ((cell.k, later.k), (cell.v, later.v)))
    kv, slots = later.kv, torch.from_numpy(later.table.slots(np.arange(330)))
    kv.keys[:, slots], kv.values[:, slots] = k.transpose(0, 1), v.transpose(0, 1)
    staged = cuda.stage(kv, later.table, 330)
    for tiles in ((128, 64), (128,), (64,)):
        lists = [cuda.plan_lists(cell.plan, tile) for tile in tiles]
        got, _ = cuda.attend_lists(cell.q, staged, cell.plan, RowScales.of(cell.scales, CPU), lists)
        torch.testing.assert_close(got.double(), cell.reference(cuda.executed_plan(cell.plan, tiles)), **CLOSE)


def test_what_is_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the type of staged rows, whose context is long enough and lies in one run of slots."""
    monkeypatch.setattr(staging, "stage", lambda *_, **__: "staged")
    monkeypatch.setattr(staging, "in_place", lambda *given: given[2:])
    for stop, cache, in_order, expected in (
        (128, torch.float32, True, (32, 128)),
        (127, torch.float32, True, "staged"),
        (128, torch.float32, False, "staged"),
        (128, torch.bfloat16, True, "staged"),
        (128, torch.int8, True, "staged"),
    ):
        cell = paged_cell(0, 200, cache=cache, in_order=in_order)
        assert cuda.stage(cell.kv, cell.table, stop) == expected


def test_factors_of_rows() -> None:
    assert RowScales.of(torch.full((3,), 0.25), CPU).common == 0.25
    different = torch.tensor([0.25, 0.25, 0.5])
    scales = RowScales.of(different, CPU)
    assert scales.common is None
    assert torch.equal(scales.each, different)


def test_dense_plans_have_themselves_as_twin() -> None:
    plan = AttentionPlan(3, 5)
    assert cuda.executed_plan(plan) is plan


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


class Like:
    """A tensor of another device, as far as it is asked about."""

    def __init__(self, device: str, dtype: torch.dtype, dim: int = 128) -> None:
        self.device, self.dtype, self.shape = torch.device(device), dtype, (100, 4, dim)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("q", "cache", "plan", "expected"),
    [
        (Like("cuda", torch.bfloat16), torch.bfloat16, AttentionPlan(0, 64), True),
        (Like("cuda", torch.bfloat16, 64), torch.int8, AttentionPlan(0, 64), True),
        (Like("cuda", torch.bfloat16), torch.float8_e4m3fn, AttentionPlan(0, 64), True),
        (Like("cuda", torch.bfloat16), torch.bfloat16, AttentionPlan(9000, 63), False),
        (Like("cuda", torch.bfloat16), torch.bfloat16, AttentionPlan(9, 1, heads=(Selection.everything(10),)), True),
        (Like("cuda", torch.float32), torch.float32, AttentionPlan(0, 64), False),
        (Like("cuda", torch.bfloat16, 80), torch.bfloat16, AttentionPlan(0, 64), False),
        (Like("cpu", torch.bfloat16), torch.bfloat16, AttentionPlan(0, 64), False),
    ],
)
def test_what_is_taken(q: Like, cache: torch.dtype, plan: AttentionPlan, expected: bool) -> None:
    rows = torch.empty(0, dtype=cache)
    assert cuda.supports(q, LayerKV(rows, rows), plan) is expected  # type: ignore[arg-type]


@pytest.mark.usefixtures("on_hopper")
def test_kv_of_these_kernels_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "supports_flash_attn", lambda *_: False)
    monkeypatch.setattr(flash, "_cudnn_works", lambda *_: True)
    gpu = torch.device("cuda")
    assert cuda.compute_family(gpu, torch.bfloat16, 128) == "cuda-9.0-cudnn-triton-10-7"
    assert cuda.compute_family(gpu, torch.float32, 128) == "cuda-9.0"
    monkeypatch.setattr(cards, "tile_rates", lambda *_: {128: 3.1, 64: 2.0})
    assert cuda.compute_family(gpu, torch.bfloat16, 128) == "cuda-9.0-cudnn-triton-3-2", "other tiles, other pairs"
    monkeypatch.setattr("workers.kernels.device.has_triton", lambda: False)
    assert cuda.compute_family(gpu, torch.bfloat16, 128) == "cuda-9.0-cudnn"
    assert cuda.compute_family(CPU, torch.bfloat16, 128) == flash.compute_family(CPU, torch.bfloat16, 128)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("named", "works", "expected"),
    [
        (None, True, "cudnn"), (None, False, "flash-own"), ("own", True, "cudnn-own"), ("own", False, "flash-own"),
        ("flash", True, "flash"), ("flash", False, "flash"), ("cudnn", True, "cudnn"), ("cudnn", False, "flash-own"),
    ],
)  # fmt: skip
def test_kv_of_another_dense_kernel_is_told_apart(
    named: str | None, works: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card is measured, or a library stops working: that is another family."""
    monkeypatch.setattr(flash, "_flash_attn_func", lambda: None)
    monkeypatch.setattr(flash, "_cudnn_works", lambda *_: works)
    monkeypatch.setattr(cards, "dense_library", lambda *_: named)
    family = cuda.compute_family(torch.device("cuda"), torch.bfloat16, 128)
    assert family == f"cuda-9.0-{expected}-triton-10-7"


def test_attend_asks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, visited = paged_cell(100, 67), torch.zeros(4, dtype=torch.int64)
    monkeypatch.setattr("workers.attention.compiled.supports", lambda *_: False)
    monkeypatch.setattr(cuda, "supports", lambda *_: True)
    got = attend(cell.q, cell.kv, cell.table, cell.plan, cell.scales, visited)
    torch.testing.assert_close(got.double(), cell.reference(), **CLOSE)
    assert visited.tolist() == [cell.plan.causal_pairs] * 4
