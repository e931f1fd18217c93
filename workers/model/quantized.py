"""Quantised matrices of a shard, filled row by row from the parts that are stored; never unpacked.

Legend: `N` outputs, `K` inputs, `Er` experts of the shard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from protos.errors import UserError
from protos.stage.messages import Span
from workers.kv.host_memory import advise_huge_pages
from workers.quant.weight import QuantizedWeight, RowStack, empty_like

_CHUNK = 1 << 18  # weights read at once; larger pieces leave 4 % of a shard in gaps of the heap


class MatrixSource(Protocol):
    """Where quantised matrices come from."""

    def has(self, name: str) -> bool:
        """Return whether the matrix of this canonical name is quantised."""
        ...

    def read(self, name: str, rows: Span, columns: Span) -> QuantizedWeight:
        """Return a region of a matrix."""
        ...


class Region(NamedTuple):
    """Rows and columns of a stored matrix, and their first row in the shard's (of `expert`, if set)."""

    name: str
    rows: Span
    columns: Span
    row: int = 0
    expert: int | None = None


def load_experts(
    source: MatrixSource, shape: Sequence[int], regions: Sequence[Region], device: torch.device,
    on_region: Callable[[Region], None],
) -> QuantizedWeight:  # fmt: skip
    """Return the experts `[Er, N, K]` of a layer.

    Raises:
        CheckpointError: some are quantised and others are not, or in another way; the shard cuts groups of weights.
    """
    target = None
    for region in regions:
        if not source.has(region.name):
            raise _error(region, "stored plain beside quantised experts of its layer: not read")
        target = _fill(source, region, target, shape, device)
        on_region(region)
    assert target is not None
    return target


def load_matrix(
    source: MatrixSource, regions: Sequence[Region], device: torch.device,
    fill: Callable[[Region], torch.Tensor], on_region: Callable[[Region], None],
) -> QuantizedWeight | RowStack:  # fmt: skip
    """Return regions below each other as one matrix `[N, K]`, or as a stack where their layouts differ.

    Args:
        fill: reads a region that is stored plain.

    Raises:
        CheckpointError: the shard cuts groups of weights.
    """
    heads = [_read(source, region, region.rows.start, 1) if source.has(region.name) else None for region in regions]
    first, depth = heads[0], regions[0].columns.size
    if first is not None and all(head is not None and _fits(first, head) for head in heads):
        target = None
        for region in regions:
            target = _fill(source, region, target, (sum(one.rows.size for one in regions), depth), device)
            on_region(region)
        assert target is not None
        return target
    parts: list[torch.Tensor | QuantizedWeight] = []
    for region in regions:
        if source.has(region.name):
            parts.append(_fill(source, region._replace(row=0), None, (region.rows.size, depth), device))
        else:
            parts.append(fill(region))
        on_region(region)
    return RowStack(tuple(parts))


def _fits(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    """Return whether two matrices can be stored below each other."""
    if one.layout != other.layout:
        return False
    return one.order is None or (other.order is not None and torch.equal(one.order, other.order))


def _fill(
    source: MatrixSource, region: Region, target: QuantizedWeight | None, shape: Sequence[int], device: torch.device
) -> QuantizedWeight:  # fmt: skip
    """Copy a region into its place in `target`, which is made of `shape` for the first one; returns it."""
    step = max(1, _CHUNK // region.columns.size)
    for start in range(region.rows.start, region.rows.stop, step):
        count = min(step, region.rows.stop - start)
        chunk = _read(source, region, start, count)
        if target is None:
            target = empty_like(chunk, shape, device)
            advise_huge_pages(target.codes)
        if chunk.layout != target.layout:
            raise _error(region, "quantised in another way than its neighbours: not read")
        place = target if region.expert is None else target[region.expert]
        row = region.row + start - region.rows.start
        for name, part in chunk.parts.items():
            own = place.parts[name]
            if name != "order":
                own[row : row + count].copy_(part)
            elif row == 0:
                own.copy_(part)
            elif not torch.equal(own.cpu(), part):
                raise _error(region, "inputs in another order than those of its neighbours: not read")
    assert target is not None, "a region without rows"
    return target


def _read(source: MatrixSource, region: Region, start: int, count: int) -> QuantizedWeight:
    try:
        return source.read(region.name, Span(start, start + count), region.columns)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise _error(region, f"{error}: lower expert_parallel_size, or use stages instead") from error


def _error(region: Region, problem: str) -> Exception:
    from protos.model.checkpoint import CheckpointError  # here: it needs safetensors

    return CheckpointError(f"{region.name}: {problem}")
