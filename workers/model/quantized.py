"""Quantised matrices of a shard, filled row by row from the parts that are stored; packed, never unpacked.

Legend: `N` outputs, `K` inputs, `Er` experts of the shard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from protos.errors import UserError
from protos.stage.messages import Span
from workers.kernels.upload import Uploads
from workers.kv.host_memory import advise_huge_pages
from workers.model import compiled
from workers.quant.packed import PackedWeight, empty_packed
from workers.quant.weight import QuantizedWeight, RowStack, empty_like

_CHUNK = 1 << 18  # weights read at once; larger pieces leave 4 % of a shard in gaps of the heap


class Region(NamedTuple):
    """Rows and columns of a stored matrix, and their first row in the shard's (of `expert`, if set)."""

    name: str
    rows: Span
    columns: Span
    row: int = 0
    expert: int | None = None


class MatrixSource(Protocol):
    """Where quantised matrices come from."""

    def has(self, name: str) -> bool:
        """Return whether the matrix of this canonical name is quantised."""
        ...

    def keeps(self, regions: Sequence[Region], shape: Sequence[int], pairs: bool) -> bool:
        """Return whether a weight of `shape` of these regions stays quantised, in part at least: if any of them is."""
        return any(self.has(region.name) for region in regions)

    def read(self, name: str, rows: Span, columns: Span) -> QuantizedWeight:
        """Return a region of a matrix."""
        ...


class Into(NamedTuple):
    """Where matrices go: to a device, in a packed order where the compiled products take them."""

    device: torch.device
    pack: bool = False
    pairs: bool = False  # gate, then up
    uploads: Uploads = Uploads(0)  # which copies plainly


def load_experts(
    source: MatrixSource, shape: Sequence[int], regions: Sequence[Region], into: Into,
    on_region: Callable[[Region], None],
) -> QuantizedWeight | PackedWeight:  # fmt: skip
    """Return the experts `[Er, N, K]` of a layer.

    Raises:
        CheckpointError: some are quantised and others are not, or in another way; the shard cuts groups of weights.
    """
    target = _Target(source, shape, into)
    for region in regions:
        if not source.has(region.name):
            raise _error(region, "stored plain beside quantised experts of its layer: not read")
        target.fill(region)
        on_region(region)
    return target.weight


def load_matrix(
    source: MatrixSource, regions: Sequence[Region], into: Into,
    fill: Callable[[Region], torch.Tensor], on_region: Callable[[Region], None],
) -> QuantizedWeight | PackedWeight | RowStack:  # fmt: skip
    """Return regions below each other as one matrix `[N, K]`, or as a stack where their layouts differ.

    Args:
        fill: reads a region that is stored plain.

    Raises:
        CheckpointError: the shard cuts groups of weights.
    """
    heads = [_read(source, region, region.rows.start, 1) if source.has(region.name) else None for region in regions]
    first, depth = heads[0], regions[0].columns.size
    if first is not None and all(head is not None and _fits(first, head) for head in heads):
        target = _Target(source, (sum(region.rows.size for region in regions), depth), into)
        for region in regions:
            target.fill(region)
            on_region(region)
        return target.weight
    parts: list[torch.Tensor | QuantizedWeight | PackedWeight] = []
    for region in regions:
        if source.has(region.name):
            target = _Target(source, (region.rows.size, depth), into._replace(pairs=False))
            target.fill(region._replace(row=0))
            parts.append(target.weight)
        else:
            parts.append(fill(region))
        on_region(region)
    return RowStack(tuple(parts))


def _fits(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    """Return whether two matrices can be stored below each other."""
    if one.layout != other.layout:
        return False
    return one.order is None or (other.order is not None and torch.equal(one.order, other.order))


class _Target:
    """A weight of `shape` that is filled region by region; it is made for the first one."""

    def __init__(self, source: MatrixSource, shape: Sequence[int], into: Into) -> None:
        self._source, self._shape, self._into = source, shape, into
        self._first: QuantizedWeight | None = None  # whose layout all others must have

    def fill(self, region: Region) -> None:
        """Copy a region into its place. Raises CheckpointError."""
        step = max(1, _CHUNK // region.columns.size)
        for start in range(region.rows.start, region.rows.stop, step):
            count = min(step, region.rows.stop - start)
            chunk = _read(self._source, region, start, count)
            if self._first is None:
                self._first, self.weight = chunk, self._make(chunk)
                advise_huge_pages(self.weight.codes)
            if chunk.layout != self._first.layout:
                raise _error(region, "quantised in another way than its neighbours: not read")
            place = self.weight if region.expert is None else self.weight[region.expert]
            row = region.row + start - region.rows.start
            if isinstance(place, PackedWeight):
                place.put(row, chunk)
            else:
                _copy(place, row, chunk, region, self._into.uploads)

    def _make(self, like: QuantizedWeight) -> QuantizedWeight | PackedWeight:
        device, pack, pairs, _ = self._into
        if pack and compiled.can_pack_codes(like, self._shape, device, pairs):
            return empty_packed(like, self._shape, pairs)
        return empty_like(like, self._shape, device)


def _copy(place: QuantizedWeight, row: int, chunk: QuantizedWeight, region: Region, uploads: Uploads) -> None:
    """Copy rows of a region into a matrix, from row `row` on. Raises CheckpointError."""
    for name, part in chunk.parts.items():
        own = place.parts[name]
        if name != "order":
            uploads.copy(own[row : row + chunk.shape[0]], part)
        elif row == 0:
            uploads.copy(own, part)
        elif not torch.equal(own.cpu(), part):
            raise _error(region, "inputs in another order than those of its neighbours: not read")


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
