"""Stage `checks`, selection: sums, thresholds, lists and recall on the device against the functions of CPUs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from protos.model.spec import HeadBudget, SparseSpec
from workers.bench.cases.device_cells import LAYER, DeviceCells, device_cells
from workers.bench.cases.sparse_cells import Shape, attention, column_and_offset_sums
from workers.bench.gpu.context import Case, Context
from workers.bench.gpu.journal import Line
from workers.kernels.triton.sparse.cells import CellSpan, CellTables, TileShape
from workers.sparse.selection import top_indices
from workers.sparse.vertical_slash import choose

_SUMS = 2e-3  # of a sum: probabilities on their way to a diagonal have 11 bits
_RECALL = 2e-3
_SHARED = 0.99  # of the selected columns: sums that differ in their last bits end a list elsewhere


def cases() -> Iterator[Case]:
    """Yield the cases."""
    yield Case("checks", "estimate", _estimate)
    yield Case("checks", "thresholds and compaction", _thresholds)
    yield Case("checks", "selection and recall", _selection)
    yield Case("checks", "adaptive budgets", _adaptive)


def _given(context: Context, spec: SparseSpec) -> DeviceCells:
    """Return cells whose keys and queries have the type of the device."""
    if context.rehearsal:
        shapes = [Shape(192, 67, distance=96, last_q=17, heads=2, kv_heads=1, dim=16)]
        return device_cells(shapes, spec, device=context.device)
    shapes = [
        Shape(start, length, distance, 64, 64, 16, 4, 128, torch.bfloat16)
        for start, length, distance in ((8192, 1000, 0), (4096, 193, 1024), (0, 600, 0), (3000, 17, 1000))
    ]
    return device_cells(shapes, spec, block=64, shared=4, tile=128, device=context.device)


def _spec(context: Context, **fields: object) -> SparseSpec:
    return SparseSpec(last_q=17 if context.rehearsal else 64, **fields)  # type: ignore[arg-type]


def _within(what: str, got: torch.Tensor, wanted: np.ndarray, bound: float) -> float:
    """Return the largest error over the largest value. Raises AssertionError above the bound."""
    error = np.abs(got.double().cpu().numpy() - wanted).max() / max(1e-30, np.abs(wanted).max())
    if not error <= bound:
        raise AssertionError(f"{what}: error {error:.3g} of the largest value: at most {bound} is right")
    return float(error)


def _estimate(context: Context) -> Line:
    """Compare sums by column and by offset with whole matrices in float64."""
    from workers.kernels.triton.sparse.estimate import estimate

    given = _given(context, _spec(context))
    found = estimate(given.estimate, given.keys, given.step.tables, given.shape, 3 if context.rehearsal else 264)
    errors = []
    for at, cell in enumerate(given.cells):
        stop = cell.keys.stop
        columns, offsets = column_and_offset_sums(cell, attention(cell, cell.queries.estimate))
        errors.append(_within(f"columns of cell {at}", found.columns[at, :, :stop], columns, _SUMS))
        errors.append(_within(f"offsets of cell {at}", found.offsets[at, :, :stop], offsets, _SUMS))
        if found.columns[at, :, stop:].any() or found.offsets[at, :, stop:].any():
            raise AssertionError(f"cell {at}: sums behind its end")
    return {"ok": True, "error_own": max(errors), "bound": _SUMS}


def _thresholds(context: Context) -> Line:
    """Compare what is selected with NumPy: the same indices, with ties, zeros and NaN."""
    from workers.kernels.triton.sparse.selection import compact, thresholds

    random = np.random.default_rng(7)
    stops = (17, 193) if context.rehearsal else (17, 600, 131_072)
    counts = (0, 41, 117, 10**6)
    tables = CellTables.make([CellSpan(0, stop, ((0, stop, 0),)) for stop in stops], 16, TileShape(), context.device)
    compared = 0
    for kind in ("NaN",) if context.rehearsal else ("exponential", "ties", "NaN"):
        scores = torch.zeros(len(stops), len(counts), tables.width)
        for at, stop in enumerate(stops):
            size = len(counts), stop
            values = random.exponential(size=size) ** 9 if kind != "ties" else random.integers(0, 3, size).astype(float)
            if kind == "NaN":
                values = np.where(random.random(size) < 0.1, np.nan, values)
            scores[at, :, :stop] = torch.from_numpy(values.astype(np.float32))
        moved = scores.to(context.device)
        wanted = torch.tensor([counts] * len(stops), dtype=torch.int32, device=context.device)
        found = thresholds(moved, wanted, 30, tables)
        kept = compact(moved, found, 30, tables, room=tables.width)
        assert kept.indices is not None
        for at, stop in enumerate(stops):
            for row, expected in enumerate(top_indices(scores[at, :, :stop].numpy(), counts, 30)):
                if kept.indices[at, row, : int(kept.totals[at, row])].tolist() != expected.tolist():
                    raise AssertionError(f"{kind}, {stop} scores, {counts[row]} of them: other indices")
                compared += 1
    return {"ok": True, "rows": compared}


def _selection(context: Context) -> Line:
    budget = HeadBudget(41, 117) if context.rehearsal else HeadBudget(300, 900)
    return _chosen(context, {"uniform": budget})


def _adaptive(context: Context) -> Line:
    return _chosen(context, {"target_recall": 0.9})


def _chosen(context: Context, fields: dict[str, object]) -> Line:
    """Compare columns and recalls with those that `choose` finds on the CPU."""
    given = _given(context, _spec(context, **fields))
    lists = given.step.select(LAYER, given.estimate, given.held_out, given.keys)
    heads = given.estimate.queries.shape[2]
    given.step.note_visited([torch.ones(heads, dtype=torch.int64, device=context.device) for _ in given.cells])
    worst, shared = 0.0, 1.0
    for at, figures in enumerate(given.step.figures()):
        choice = choose(*given.cells[at].args(last_q=17 if context.rehearsal else 64, **fields))
        for name in ("estimated_recall", "held_out_recall"):
            difference = np.abs(np.array(getattr(figures, name)) - np.array(getattr(choice, name))).max()
            worst = max(worst, float(difference))
        for head, one in enumerate(choice.selections):
            found = set(lists[at][0].columns[head, : int(lists[at][0].num_columns[head])].tolist())
            union = found | set(one.columns.tolist())
            if union and len(found) > 0:
                shared = min(shared, 1 - len(found ^ set(one.columns.tolist())) / max(100, len(union)))
    bound = 5e-3 if "target_recall" in fields else _RECALL
    if worst > bound or shared < (0.9 if "target_recall" in fields else _SHARED):
        raise AssertionError(f"recalls differ by {worst:.3g} (at most {bound}), heads share {shared:.4f} of columns")
    return {"ok": True, "recall_difference": worst, "shared_columns": shared, "bound": bound}
