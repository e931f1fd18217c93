"""The CUDA path as a whole, interpreted: plans over pages against their definition, and what it takes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from workers.attention import cuda, flash
from workers.attention.attend import attend
from workers.attention.plan import AttentionPlan, Selection
from workers.bench.cases.paged_cells import CELLS, paged_cell, selections
from workers.kv.paged import LayerKV

CLOSE = {"atol": 4e-6, "rtol": 4e-6}


@pytest.mark.parametrize("library", [False, True], ids=["our kernel", "a library's kernel"])
@pytest.mark.parametrize(("start", "rows", "distance"), [CELLS[0], CELLS[5], CELLS[7]])
def test_dense_plans(start: int, rows: int, distance: int, library: bool) -> None:
    cell = paged_cell(start, rows, distance, cache=torch.int8)
    if library:
        cell = replace(cell, scales=torch.full((rows,), 0.25))
    staged = cuda.stage(cell.kv, cell.table, start + rows)
    got = cuda.attend_dense(cell.q, staged, cell.plan, cell.scales, library=library)
    torch.testing.assert_close(got.double(), cell.reference(), **CLOSE)


def test_libraries_get_rows_of_one_factor_only(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, calls = paged_cell(100, 17), []
    monkeypatch.setattr(flash, "has_fast_kernel", lambda *_: True)
    monkeypatch.setattr(cuda.torch_backend, "attend", lambda *given: calls.append(given) or torch.zeros(1))
    cuda.attend(cell.q, cell.kv, cell.table, cell.plan, cell.scales)
    assert not calls
    cuda.attend(cell.q, cell.kv, cell.table, cell.plan, torch.full((17,), 0.25))
    assert len(calls) == 1


@pytest.mark.parametrize(("start", "rows", "distance"), [(0, 17, 0), (640, 67, 256), (500, 193, 250)])
def test_selections(start: int, rows: int, distance: int) -> None:
    """Some heads are dense by the share of their keys; all visit the pairs of the twin."""
    heads = tuple(selections(start + rows).values())
    cell = paged_cell(start, rows, distance, heads=len(heads), selections=heads, cache=torch.bfloat16)
    visited = torch.zeros(len(heads), dtype=torch.int64)
    got = cuda.attend(cell.q, cell.kv, cell.table, cell.plan, cell.scales, visited)
    twin = cuda.executed_plan(cell.plan)
    assert twin.whole_tiles
    assert visited.tolist() == [twin.visited_pairs(head) for head in range(len(heads))]
    assert visited[0] == twin.causal_pairs
    assert start == 0 or visited[1] < twin.causal_pairs
    torch.testing.assert_close(got.double(), cell.reference(twin), **CLOSE)


def test_heads_run_in_groups_where_scratch_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = tuple(selections(217).values())
    cell = paged_cell(200, 17, heads=len(heads), selections=heads)
    whole = cuda.attend(cell.q, cell.kv, cell.table, cell.plan, cell.scales)
    assert cuda.column_rows(217, 6, 16) == 6 * 256
    monkeypatch.setattr(cuda, "_COLUMN_BYTES", 4 * 16 * 256 * 4)
    assert cuda.column_rows(217, 6, 16) == 4 * 256
    assert torch.equal(cuda.attend(cell.q, cell.kv, cell.table, cell.plan, cell.scales), whole)
    monkeypatch.setattr(cuda, "_ENTRY_BYTES", 1)
    assert torch.equal(cuda.attend(cell.q, cell.kv, cell.table, cell.plan, cell.scales), whole)


def test_columns_need_room() -> None:
    heads = (Selection(np.array([[0, 9]], np.int32), np.arange(100, dtype=np.int32)),) * 4
    cell = paged_cell(300, 17, selections=heads)
    staged = cuda.stage(cell.kv, cell.table, 317, column_rows=127)
    with pytest.raises(ValueError, match="staged with 127 rows for columns: need at least 128"):
        cuda.attend_lists(cell.q, staged, cell.plan, cell.scales, cuda.plan_lists(cell.plan))


def test_one_staging_serves_the_cells_of_a_step() -> None:
    """The first of two cells does not see the second one's keys."""
    heads = tuple(selections(264).values())
    cell = paged_cell(200, 64, heads=len(heads), selections=heads)
    later = paged_cell(200, 130, heads=len(heads))
    k, v = (torch.cat([ours, others[264:]]) for ours, others in ((cell.k, later.k), (cell.v, later.v)))
    kv, slots = later.kv, torch.from_numpy(later.table.slots(np.arange(330)))
    kv.keys[:, slots], kv.values[:, slots] = k.transpose(0, 1), v.transpose(0, 1)
    staged = cuda.stage(kv, later.table, 330, cuda.column_rows(264, len(heads), 16))
    got, _ = cuda.attend_lists(cell.q, staged, cell.plan, cell.scales, cuda.plan_lists(cell.plan))
    torch.testing.assert_close(got.double(), cell.reference(cuda.executed_plan(cell.plan)), **CLOSE)


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
    gpu = torch.device("cuda")
    assert cuda.compute_family(gpu, torch.bfloat16, 128) == "cuda-9.0-triton"
    assert cuda.compute_family(gpu, torch.float32, 128) == "cuda-9.0"
    monkeypatch.setattr(cuda, "_has_triton", lambda: False)
    assert cuda.compute_family(gpu, torch.bfloat16, 128) == "cuda-9.0"
    cpu = torch.device("cpu")
    assert cuda.compute_family(cpu, torch.bfloat16, 128) == flash.compute_family(cpu, torch.bfloat16, 128)


def test_attend_asks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, visited = paged_cell(100, 67), torch.zeros(4, dtype=torch.int64)
    monkeypatch.setattr("workers.attention.compiled.supports", lambda *_: False)
    monkeypatch.setattr(cuda, "supports", lambda *_: True)
    got = attend(cell.q, cell.kv, cell.table, cell.plan, cell.scales, visited)
    torch.testing.assert_close(got.double(), cell.reference(), **CLOSE)
    assert visited.tolist() == [cell.plan.causal_pairs] * 4
