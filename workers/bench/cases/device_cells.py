"""Random sparse cells as the selection kernels for GPUs take them: staged keys, sampled rows of all cells, tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from protos.model.spec import SparseSpec
from workers.attention.plan import Queries
from workers.bench.cases.sparse_cells import Cell, Shape, random_cell
from workers.kernels.triton.sparse.cells import TileShape
from workers.sparse.cuda import HeadBudgets, Sampled, SparseCell, StepSelection
from workers.sparse.estimate import SampledRows

if TYPE_CHECKING:
    from workers.kernels.triton.sparse.estimate import SampledQueries

LAYER = 3  # of `random_cell`


@dataclass(frozen=True)
class DeviceCells:
    """Cells of one step, each of a sequence of its own; `keys` `[K, rows, D]` are theirs, one after the other."""

    cells: list[Cell]
    keys: torch.Tensor
    step: StepSelection
    estimate: SampledQueries
    held_out: SampledQueries
    shape: TileShape


def device_cells(
    shapes: Sequence[Shape], spec: SparseSpec, block: int = 32, shared: int = 2, tile: int = 64,
    device: torch.device | str = "cpu",
) -> DeviceCells:  # fmt: skip
    """Make cells of the given shapes, which have the same heads, dim and `last_q`; `cells` stay in host memory.

    Args:
        block, shared: keys of a tile, and heads that share it, in the kernels of the selection.
        tile: rows of a tile of the attention kernel.
        device: of the keys, the sampled rows and the tables.
    """
    cells = [_with_one_scale_a_row(random_cell(shape)) for shape in shapes]
    heads, kv_heads = shapes[0].heads, shapes[0].kv_heads
    keys = [cell.kv.keys[:, torch.from_numpy(cell.table.slots(np.arange(cell.keys.stop)))] for cell in cells]
    placed, row, first_key = [], 0, 0
    for cell, own in zip(cells, keys, strict=True):
        placed.append(SparseCell(cell.plan, _row_scales(cell), row, first_key))
        row, first_key = row + cell.plan.length, first_key + own.shape[1]
    tiles = TileShape(block=block, chunk=2 * block, shared=shared, shared_sums=shared)
    budgets = HeadBudgets(spec, range(LAYER, LAYER + 1), range(heads), device)
    step = StepSelection(spec, placed, budgets, kv_heads, device, (tile,), tiles)
    estimate = _packed(step.estimate, [cell.queries.estimate for cell in cells], at_end=True)
    held_out = _packed(step.held_out, [cell.queries.held_out for cell in cells])
    return DeviceCells(cells, torch.cat(keys, dim=1).to(device), step, estimate, held_out, tiles)


def _with_one_scale_a_row(cell: Cell) -> Cell:
    scales = _row_scales(cell)

    def changed(sample: SampledRows) -> SampledRows:
        return replace(sample, scales=scales[list(sample.rows)])

    queries = cell.queries
    return replace(
        cell, queries=replace(queries, estimate=changed(queries.estimate), held_out=changed(queries.held_out))
    )


def _row_scales(cell: Cell) -> torch.Tensor:
    dim = cell.queries.estimate.queries.intra.shape[2]
    return dim**-0.5 * (1.5 + torch.rand(cell.plan.length, generator=torch.Generator().manual_seed(cell.plan.start)))


def _packed(sampled: Sampled, samples: Sequence[SampledRows], at_end: bool = False) -> SampledQueries:
    places = sampled.rows.shape[1]

    def padded(part: str) -> torch.Tensor:
        found = []
        for sample in samples:
            rows = getattr(sample.queries, part)
            missing = rows.new_ones((places - len(rows), *rows.shape[1:]))
            found.append(torch.cat([missing, rows] if at_end else [rows, missing]))
        return torch.cat(found).to(sampled.rows.device)

    return sampled.pack(Queries(padded("intra"), padded("succ"), padded("inter")))
