"""Vertical-slash selection of all sparse cells of a step on a CUDA device, in kernels of Triton.

It selects what `vertical_slash.choose` does, for all cells and heads at once, and leaves the result on the device: the
lists that the attention kernel reads, and the figures of the reports, which are read once, after the step. Nothing here
waits for the device but `StepSelection.figures`.

Legend: `C` cells of the step, `H` query heads of the shard, `K` KV heads, `G = H // K`, `R` sampled rows of a cell
(with unused places), `D` head dim, `T` rows of the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from protos.model.spec import SparseSpec
from workers.attention.plan import AttentionPlan, Queries
from workers.kernels.device import moved, processors
from workers.kernels.triton.lists import TILES, CellLists
from workers.kernels.triton.sparse.cells import CellSpan, CellTables, TileShape, to_device
from workers.sparse.selection import (
    FORCED_COLUMNS,
    FORCED_OFFSETS,
    SYNTHETIC_COLUMNS,
    SYNTHETIC_RUNS,
    synthetic_selection,
)
from workers.sparse.vertical_slash import cell_number, estimate_rows, held_out_rows, warn_cap, warn_dense

if TYPE_CHECKING:  # they need Triton
    from workers.kernels.triton.sparse.estimate import DeviceSums, SampledQueries
    from workers.kernels.triton.sparse.selection import Kept

_LOG2_E = math.log2(math.e)
_EVERYTHING = 1 << 30  # a budget that no context reaches
PROPOSALS = 12  # of adaptive budgets; the host does not know when the search is over
_MIN_ROWS = 16  # of a matrix product
MAX_LAST_Q = 128  # sampled rows of a head: the kernels hold all of them at once, in shared memory of this size
_MAX_LAST_Q_BYTES = 163 << 10


@dataclass(frozen=True, slots=True)
class SparseCell:
    """One cell of a step: its dense plan, factors of its rows' logits `[length]` in host memory, and where it is.

    `row` is its first row in the step, `first_key` the row of the staged keys at which its sequence begins.
    """

    plan: AttentionPlan
    scales: torch.Tensor
    row: int
    first_key: int = 0


@dataclass(frozen=True, slots=True)
class Sampled:
    """Rows that are sampled of every cell: `rows` `[C, R]` int64 of the step, and `positions` `[C, R]` int32.

    Places without a row have some row of the cell, and position -1. `scales` `[C, R]` are for powers of two.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    scales: torch.Tensor

    def take(self, queries: Queries) -> SampledQueries:
        """Return the sampled rows of queries `[T, H, D]` of the step."""
        return self.pack(queries.map(lambda each: each[self.rows.flatten()]))

    def pack(self, queries: Queries) -> SampledQueries:
        """Return queries of the sampled rows `[C * R, H, D]`, in the order of `rows`, as the kernels read them."""
        from workers.kernels.triton.sparse.estimate import SampledQueries

        intra = queries.intra
        shape = (*self.rows.shape, *intra.shape[1:])
        parts = [intra if one is None else one for one in (intra, queries.succ, queries.inter)]
        packed = torch.stack([part.view(shape).transpose(1, 2) for part in parts])
        return SampledQueries(packed.contiguous(), self.scales)


class HeadBudgets:
    """The budgets of the heads of a shard, on the device: made once, for all steps."""

    def __init__(self, spec: SparseSpec, layers: range, heads: range, device: torch.device | str) -> None:
        """Copy the budgets of `layers` and query `heads` of the model; warns of heads without one.

        Raises:
            ValueError: more rows of a cell are to be sampled than the kernels take.
        """
        if spec.last_q > (most := max_last_q(device)):
            raise ValueError(f"sparse.last_q: {spec.last_q}: must be at most {most} on this GPU")
        self.heads, self._first_layer = heads, layers.start
        columns, offsets = [], []
        for layer in layers:
            row = spec.patterns[layer] if spec.patterns is not None else ()
            budgets = [row[head] if spec.patterns is not None else spec.uniform for head in heads]
            for head, budget in zip(heads, budgets, strict=True):
                if spec.patterns is not None and budget is None:
                    warn_dense(layer, head)
            columns.append([0 if budget is None else min(budget.n_vertical, _EVERYTHING) for budget in budgets])
            offsets.append([_EVERYTHING if budget is None else min(budget.n_slash, _EVERYTHING) for budget in budgets])
        self.max_columns = max((max(row) for row in columns), default=0)
        self._columns, self._offsets = to_device(columns, device), to_device(offsets, device)

    def of(self, layer: int, num_cells: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the numbers of columns and of offsets `[C, H]` int32 of one layer."""
        index = layer - self._first_layer
        columns, offsets = (one[index].expand(num_cells, -1).contiguous() for one in (self._columns, self._offsets))
        return columns, offsets


@dataclass(frozen=True, slots=True)
class CellFigures:
    """What a `CellReport` says of one layer and one cell (counted within the step); lists have an entry a head."""

    layer: int
    cell: int
    density: list[float]
    estimated_recall: list[float]
    held_out_recall: list[float]
    dense: list[bool]


class StepSelection:
    """The selection of the sparse cells of one step: made before the step, then called in every layer."""

    def __init__(
        self, spec: SparseSpec, cells: Sequence[SparseCell], budgets: HeadBudgets, kv_heads: int,
        device: torch.device | str, tiles: tuple[int, ...] = TILES, shape: TileShape | None = None,
    ) -> None:  # fmt: skip
        """Make tables and copy them to the device, without waiting for it.

        Args:
            kv_heads: of the shard.
            tiles: sizes of tiles that heads may have in the attention kernel, in rows; multiples of 32.
            shape: how the kernels cut their work; made for `spec.last_q` where None.
        """
        num_rows = max(_MIN_ROWS, 1 << (spec.last_q - 1).bit_length())
        self._shape = shape or tile_shape(num_rows)
        self._spec, self._budgets, self._tiles = spec, budgets, tiles
        self._kv_heads, self._device = kv_heads, device
        self._starts = [cell.plan.start for cell in cells]
        spans = [
            CellSpan(
                cell.plan.start,
                cell.plan.start + cell.plan.length,
                tuple((start, stop, int(rotation)) for start, stop, rotation in cell.plan.regions),
                cell.first_key,
            )
            for cell in cells
        ]
        self.tables = CellTables.make(spans, spec.last_q, self._shape, device)
        sampled = [estimate_rows(cell.plan.length, spec.last_q) for cell in cells]
        others = [held_out_rows(cell.plan.length, spec.last_q) for cell in cells]
        self.estimate = _sample(cells, sampled, num_rows, device, at_end=True)
        self.held_out = _sample(cells, others, 32, device)
        group = len(budgets.heads) // kv_heads
        host = [
            [len(rows), _room(spec, cell.plan, group), -1.0 if spec.synthetic else spec.recall_floor]
            for rows, cell in zip(sampled, cells, strict=True)
        ]
        self._rules = moved(torch.tensor(host, dtype=torch.float64), device)
        self._causal = np.array([[cell.plan.causal_pairs] for cell in cells], np.float64)
        self._figures: list[tuple[int, torch.Tensor]] = []  # by layer: recalls and fallbacks [3, C, H]
        self._visited: list[torch.Tensor] = []  # [H], by layer and cell

    @property
    def column_capacity(self) -> int:
        """The most columns that the list of a head has room for."""
        if self._spec.synthetic:
            return SYNTHETIC_COLUMNS
        if self._spec.is_adaptive:
            return self.tables.width
        return min(max(self._budgets.max_columns, FORCED_COLUMNS), self.tables.width)

    def select(
        self, layer: int, estimate: SampledQueries, held_out: SampledQueries, keys: torch.Tensor
    ) -> list[tuple[CellLists, ...]]:
        """Select the keys of every head in every cell; return the lists of each cell, and note what they keep.

        A cell has lists for every size of tiles.

        Attention over the lists follows, and then `note_visited`.

        Args:
            layer: counted in the model.
            estimate: rows of `self.estimate`, with continuous rotations for `succ` and `inter`.
            held_out: rows of `self.held_out`, with true rotations.
            keys: `[K, rows, D]`, those of every sequence contiguous and in order of position.

        Scratch memory: 8 bytes a cell, head and key, and 4 more with adaptive budgets.
        """
        from workers.kernels.triton.sparse.decide import decide
        from workers.kernels.triton.sparse.device_lists import make_lists
        from workers.kernels.triton.sparse.recall import held_out_shares

        columns, offsets, kept = self._kept(layer, estimate, keys)
        shares = held_out_shares(held_out, self.held_out.positions, offsets, columns, keys, self.tables, self._shape)
        figures, dense = decide(shares, offsets, columns, kept, self._rules, self.tables, self._kv_heads)
        self._figures.append((layer, figures))
        by_tile = [make_lists(offsets, columns, dense, self.tables, tile) for tile in self._tiles]
        return list(zip(*by_tile, strict=True))

    def note_visited(self, pairs: Sequence[torch.Tensor]) -> None:
        """Note the pairs that attention visited in the layer selected last, `[H]` for every cell."""
        self._visited += pairs

    def figures(self) -> list[CellFigures]:
        """Wait for the device and return the figures of every layer and cell, in the order of layers.

        Warns if heads stay sparse because of `max_dense_share`.
        """
        if not self._figures:
            return []
        layers, cells = len(self._figures), len(self._starts)
        assert len(self._visited) == layers * cells
        pairs = torch.stack(self._visited).view(layers, 1, cells, -1)
        values = torch.cat([pairs, torch.stack([one for _, one in self._figures])], dim=1).cpu().numpy()
        values[:, 0] /= self._causal
        held_out, dense = values[:, 2], values[:, 3]
        if not self._spec.synthetic and bool(((held_out < self._spec.recall_floor) & (dense == 0)).any()):
            warn_cap(self._spec.max_dense_share, self._spec.recall_floor)
        found = []
        for at, (layer, _) in enumerate(self._figures):
            for cell in range(values.shape[2]):
                visited, recall, share, is_dense = values[at, :, cell].tolist()
                found.append(CellFigures(layer, cell, visited, recall, share, [one != 0 for one in is_dense]))
        return found

    def _kept(self, layer: int, sample: SampledQueries, keys: torch.Tensor) -> tuple[Kept, Kept, torch.Tensor]:
        """Return kept columns and offsets, and `decide`'s `kept`: what they keep of the estimate."""
        from workers.kernels.triton.sparse.estimate import estimate
        from workers.kernels.triton.sparse.recall import overlap
        from workers.kernels.triton.sparse.selection import compact, thresholds

        if self._spec.is_adaptive and not self._spec.synthetic:
            return self._adaptive(sample, keys)
        sums = estimate(sample, keys, self.tables, self._shape, _programs(self._device))
        if self._spec.synthetic:
            columns, offsets = self._synthetic(layer, sums)
        else:
            num_columns, num_offsets = self._budgets.of(layer, len(self._starts))
            found = thresholds(sums.columns, num_columns, FORCED_COLUMNS, self.tables)
            columns = compact(sums.columns, found, FORCED_COLUMNS, self.tables, self.column_capacity)
            found = thresholds(sums.offsets, num_offsets, FORCED_OFFSETS, self.tables)
            offsets = compact(sums.offsets, found, FORCED_OFFSETS, self.tables)
        return columns, offsets, overlap(sample, sums.lse, offsets, columns, None, keys, self.tables, self._shape)

    def _adaptive(self, sample: SampledQueries, keys: torch.Tensor) -> tuple[Kept, Kept, torch.Tensor]:
        """Return what adaptive budgets keep, after a fixed number of proposals, the last of which is everything."""
        from workers.kernels.triton.sparse.adaptive import GROUP, Search
        from workers.kernels.triton.sparse.estimate import estimate
        from workers.kernels.triton.sparse.recall import overlap
        from workers.kernels.triton.sparse.selection import compact_proposal

        forced = FORCED_COLUMNS, -(-FORCED_OFFSETS // GROUP) * GROUP
        sums = estimate(sample, keys, self.tables, self._shape, _programs(self._device), forced)
        num_rows = self._rules[:, 0].contiguous()
        search = Search.begin(sums.columns, sums.offsets, num_rows, self._spec.target_recall * num_rows, self.tables)
        columns: Kept | None = None
        offsets: Kept | None = None
        kept = search.base
        for step in range(PROPOSALS):
            search.propose(kept, step, step == PROPOSALS - 1)
            found = search.thresholds, search.quotas
            columns = compact_proposal(columns, sums.columns, found, search.done, FORCED_COLUMNS, self.tables)
            offsets = search.kept_offsets(offsets, forced[1])
            parts = overlap(sample, sums.lse, offsets, columns, search.done, keys, self.tables, self._shape, forced)
            kept = torch.where(search.done != 0, kept, search.base + columns.masses + offsets.masses - parts.sum(-1))
        assert columns is not None
        assert offsets is not None
        return columns, offsets, kept

    def _synthetic(self, layer: int, sums: DeviceSums) -> tuple[Kept, Kept]:
        """Return `synthetic_selection` of every head, made on the host."""
        from workers.kernels.triton.sparse.selection import Kept, kept_masses

        sizes, words = (len(self._starts), len(self._budgets.heads)), self.tables.width // 32
        intervals = np.zeros((*sizes, 1 + SYNTHETIC_RUNS, 2), np.int64)  # half open
        listed = np.zeros((*sizes, SYNTHETIC_COLUMNS), np.int32)
        totals = np.zeros((2, *sizes), np.int32)
        for at, span in enumerate(self.tables.spans):
            for index, head in enumerate(self._budgets.heads):
                one = synthetic_selection(span.stop, (span.start, layer, head))
                intervals[at, index, : len(one.offsets)] = one.offsets + np.array([0, 1])
                listed[at, index, : len(one.columns)] = one.columns
                totals[:, at, index] = len(one.columns), np.diff(one.offsets, axis=1).sum() + len(one.offsets)
        device_intervals, indices, num_columns, num_offsets = (
            moved(torch.from_numpy(one), self._device) for one in (intervals, listed, *totals)
        )
        by_offset = _interval_words(device_intervals, words)
        is_set = torch.arange(SYNTHETIC_COLUMNS, device=indices.device) < num_columns[..., None]
        bits = torch.where(is_set, 1 << (indices % 32), 0).int()
        by_column = torch.zeros_like(by_offset).scatter_add_(2, (indices // 32).long(), bits)
        columns = Kept(by_column, indices, num_columns, kept_masses(by_column, sums.columns))
        return columns, Kept(by_offset, None, num_offsets, kept_masses(by_offset, sums.offsets))


def max_last_q(device: torch.device | str) -> int:
    """Return how many rows of a cell the kernels sample at most; fewer where a multiprocessor has less memory."""
    if torch.device(device).type != "cuda":
        return MAX_LAST_Q
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack the next name
    room: int = properties.shared_memory_per_block_optin
    return MAX_LAST_Q if room >= _MAX_LAST_Q_BYTES else TileShape().block


def tile_shape(num_rows: int) -> TileShape:
    """Return how the kernels cut their work for so many sampled rows of a head: a tile has as many rows in all."""
    usual = TileShape()
    block = max(usual.block, num_rows)
    shared, shared_sums = (max(1, heads * usual.block // block) for heads in (usual.shared, usual.shared_sums))
    return TileShape(block=block, shared=shared, shared_sums=shared_sums)


def _sample(
    cells: Sequence[SparseCell], sampled: Sequence[Sequence[int]], places: int, device: torch.device | str,
    at_end: bool = False,
) -> Sampled:  # fmt: skip
    """Return the tables of sampled rows, which fill the first or the last of the `places`."""
    rows, positions = np.zeros((len(cells), places), np.int64), np.full((len(cells), places), -1, np.int64)
    scales = torch.ones(len(cells), places)
    for at, (cell, own) in enumerate(zip(cells, sampled, strict=True)):
        place = slice(places - len(own), places) if at_end else slice(0, len(own))
        rows[at] = cell.row
        rows[at, place] = cell.row + np.array(own)
        positions[at, place] = cell.plan.start + np.array(own)
        scales[at, place] = cell.scales[list(own)].float() * _LOG2_E
    host = torch.from_numpy(rows), torch.from_numpy(positions.astype(np.int32)), scales
    return Sampled(*(moved(one, device) for one in host))


def _interval_words(intervals: torch.Tensor, words: int) -> torch.Tensor:
    """Return bits `[C, H, words]` int32 that are set in disjoint half-open `intervals` `[C, H, n, 2]` int64."""
    first = 32 * torch.arange(words, device=intervals.device)
    found = torch.zeros((*intervals.shape[:2], words), dtype=torch.int64, device=intervals.device)
    for low, high in (one.unbind(-1) for one in intervals.unbind(2)):
        below = [(1 << (bound[..., None] - first).clamp(0, 32)) - 1 for bound in (low, high)]
        found += below[1] - below[0]
    return found.int()


def _room(spec: SparseSpec, plan: AttentionPlan, group: int) -> int:
    """Return how many heads of a KV head may become dense in this cell."""
    number, share = cell_number(plan.start, spec.cell, plan.distance), spec.max_dense_share * group
    return math.floor(share * (number + 1) + 1e-9) - math.floor(share * number + 1e-9)


def _programs(device: torch.device | str) -> int:
    """Return how many programs of the second pass run at once."""
    return 2 * processors(torch.device(device))
