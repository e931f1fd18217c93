"""Vertical-slash selection (arXiv 2407.02490): which keys each query head keeps in one sparse cell of one layer.

The last rows of a cell represent all of its rows: their attention over every visible key, summed along columns and
diagonals, ranks key positions and distances. The recall of the selection is measured on other, held-out rows. The
result depends on the prompt and the cell only: not on steps, stages, threads or (see `choose`) shards.

Legend: `R` sampled rows, `H` query heads of the shard, `K` its KV heads, `G = H // K`, `S` keys the cell sees, `D` head
dim.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from protos.model.spec import HeadBudget, SparseSpec
from workers.attention.plan import AttentionPlan, Selection
from workers.kv.paged import LayerKV, PageTable
from workers.sparse import estimate_compiled, estimate_torch
from workers.sparse.adaptive import AdaptiveSearch, NewMass, PatchedArray
from workers.sparse.estimate import CellKeys, EstimateBackend, SampledRows, Sums
from workers.sparse.selection import forced_selection, select_by_budget, synthetic_selection

HELD_OUT_ROWS = 32
_SEARCHES = 4  # adaptive searches at a time: each keeps an order of all its candidates

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CellQueries:
    """The sampled rows of one cell of one layer.

    `estimate` has the rows of `estimate_rows`, whose `succ` and `inter` queries have the continuous rotations (`p % L +
    L` without the clamp, and `p % L + chunk_size`); `held_out` has those of `held_out_rows`, with the true rotations.
    `layer` and `first_head` (the first query head of the shard) count in the model.
    """

    estimate: SampledRows
    held_out: SampledRows
    layer: int
    first_head: int = 0


@dataclass(frozen=True, slots=True)
class CellChoice:
    """The selections of the query heads of the shard in one cell; every tuple has an entry per head.

    Recalls are shares of the attention of the sampled rows, measured before the dense fallback; 1.0 for heads that are
    dense by their budget. `dense` marks the heads that fell back to dense because of `held_out_recall`; `capped` counts
    the heads that should have, but for the cap.
    """

    selections: tuple[Selection, ...]
    estimated_recall: tuple[float, ...]
    held_out_recall: tuple[float, ...]
    dense: tuple[bool, ...]
    capped: int = 0


def estimate_rows(length: int, last_q: int) -> tuple[int, ...]:
    """Return the rows that the estimate samples in a cell of `length` rows: the last `last_q`, ascending."""
    return tuple(range(max(0, length - last_q), length))


def held_out_rows(length: int, last_q: int) -> tuple[int, ...]:
    """Return at most 32 rows spread evenly over a cell, ascending, without the estimate's if 32 others are left."""
    others = length - last_q if length - last_q >= HELD_OUT_ROWS else length
    count = min(HELD_OUT_ROWS, others)
    return tuple((2 * row + 1) * others // (2 * count) for row in range(count))


def choose(cell: CellQueries, kv: LayerKV, table: PageTable, plan: AttentionPlan, spec: SparseSpec) -> CellChoice:
    """Estimate, select, measure the recall, and make heads dense whose recall is too low.

    Recall floor: of the query heads of one KV head, those below `spec.recall_floor` become dense, the lowest held-out
    recall first (then the lower head). The cap is applied to every such group separately, and it grows cell by cell: up
    to cell `c` (from 0) a group may have `floor(max_dense_share * G * (c + 1))` dense heads, of which cell `c` may use
    what it adds. So the share holds for every prompt without any history or communication between shards. (Shards that
    split the query heads of one KV head count the heads they have.)

    With `spec.synthetic` the selections are `synthetic_selection` and no head becomes dense.

    Args:
        cell: the sampled rows, `[R, H, D]`.
        kv: the layer's cache; the keys of the cell are already written.
        table: the pages of the sequence.
        plan: the dense plan of the cell.
        spec: budgets; `patterns[layer][head]` None means a dense head.
    """
    keys = CellKeys(kv, table, plan)
    backend = _backend(cell, kv)
    kv_heads = kv.keys.shape[0]
    group = cell.estimate.queries.intra.shape[1] // kv_heads
    choices = [
        _Group(cell, keys, spec, backend, range(head * group, (head + 1) * group)).choose(head)
        for head in range(kv_heads)
    ]
    return CellChoice(
        tuple(one for choice in choices for one in choice.selections),
        tuple(one for choice in choices for one in choice.estimated_recall),
        tuple(one for choice in choices for one in choice.held_out_recall),
        tuple(one for choice in choices for one in choice.dense),
        sum(choice.capped for choice in choices),
    )


def cell_number(start: int, cell: int, distance: int) -> int:
    """Return how many cells of `cell` tokens, also cut every `distance` tokens (0: not), begin before `start`."""
    before = -(-start // cell)
    if distance:  # cuts on the grid begin no further cell
        before += (start - 1) // distance - (start - 1) // math.lcm(distance, cell) if start else 0
    return before


@dataclass(frozen=True, slots=True)
class _Group:
    """The query heads `heads` of the shard, which share a KV head."""

    cell: CellQueries
    keys: CellKeys
    spec: SparseSpec
    backend: EstimateBackend
    heads: range

    def choose(self, kv_head: int) -> CellChoice:
        budgets = [self._budget(head) for head in self.heads]
        everything = Selection.everything(self.keys.stop)
        if all(budget is None for budget in budgets) and not self.spec.is_adaptive and not self.spec.synthetic:
            ones = (1.0,) * len(budgets)
            return CellChoice((everything,) * len(budgets), ones, ones, (False,) * len(budgets))
        sums = self.backend.sums(self.cell.estimate, self.keys, kv_head)
        if self.spec.synthetic:
            seeds = [(self.keys.plan.start, self.cell.layer, self.cell.first_head + head) for head in self.heads]
            selections = [synthetic_selection(self.keys.stop, seed) for seed in seeds]
        elif self.spec.is_adaptive:
            selections = self._adaptive(sums, kv_head)
        else:
            chosen = select_by_budget(sums.columns, sums.offsets, budgets, self.backend.top_indices)
            selections = [everything if one is None else one for one in chosen]
        selections = [everything if _keeps_everything(one, self.keys.stop) else one for one in selections]
        dense_by_budget = [one is everything for one in selections]
        estimated = self._estimated(sums, kv_head, selections)
        held_out = np.ones(len(selections))
        if not all(dense_by_budget):
            held_out = self.backend.kept_share(self.cell.held_out, self.keys, kv_head, selections)
            held_out[dense_by_budget] = 1.0
        dense, capped = self._dense_fallback(held_out)
        return CellChoice(
            tuple(everything if is_dense else one for one, is_dense in zip(selections, dense, strict=True)),
            tuple(estimated.tolist()), tuple(held_out.tolist()), tuple(dense), capped,
        )  # fmt: skip

    def _budget(self, head: int) -> HeadBudget | None:
        if self.spec.patterns is None:
            return self.spec.uniform
        layer, head = self.cell.layer, self.cell.first_head + head
        budget = self.spec.patterns[layer][head]
        if budget is None:
            _warn_dense(layer, head)
        return budget

    def _estimated(self, sums: Sums, kv_head: int, selections: Sequence[Selection]) -> npt.NDArray[np.float64]:
        whole = [_keeps_everything(one, self.keys.stop) for one in selections]
        partial = [None if is_whole else one for one, is_whole in zip(selections, whole, strict=True)]
        mass = self.backend.kept_mass(self.cell.estimate, self.keys, kv_head, sums, partial)
        share = np.minimum(mass / sums.lse.shape[1], 1.0)  # rounding may exceed 1
        share[whole] = 1.0
        return share

    def _adaptive(self, sums: Sums, kv_head: int) -> list[Selection]:
        stop, rows = self.keys.stop, sums.lse.shape[1]
        start = forced_selection(stop)
        base = self.backend.kept_mass(self.cell.estimate, self.keys, kv_head, sums, [start] * len(self.heads))
        columns, offsets = self._without_forced(sums, kv_head, start)
        new = [NewMass(*one) for one in zip(base.tolist(), columns, offsets, strict=True)]
        chosen: list[Selection] = []
        while len(chosen) < len(new):
            searches = [AdaptiveSearch(one, self.spec.target_recall * rows) for one in new[len(chosen) :][:_SEARCHES]]
            before, after = [None] * len(chosen), [None] * (len(new) - len(chosen) - len(searches))
            while not all(search.done for search in searches):
                proposed = [*before, *(None if search.done else search.selection for search in searches), *after]
                kept = self.backend.kept_mass(self.cell.estimate, self.keys, kv_head, sums, proposed)[len(chosen) :]
                for search, mass in zip(searches, kept.tolist(), strict=False):
                    if not search.done:
                        search.update(mass)
            chosen += [search.selection for search in searches]
        return chosen

    def _without_forced(
        self, sums: Sums, kv_head: int, start: Selection
    ) -> tuple[list[PatchedArray], list[PatchedArray]]:
        """Return each head's sums of columns and offsets without the pairs that the forced selection `start` keeps."""
        stop, last_forced = self.keys.stop, int(start.offsets[0, 1])
        positions = self.keys.plan.start + np.array(self.cell.estimate.rows)
        recent = np.arange(max(0, int(positions[0]) - last_forced), stop, dtype=np.int32)
        sample = (self.cell.estimate, self.keys, kv_head, sums.lse)
        at = np.union1d(start.columns, recent).astype(np.int32)
        columns = sums.columns[:, at]
        mass = estimate_torch.probabilities(*sample, recent).cpu().numpy()
        columns[:, np.searchsorted(at, recent)] -= (mass * (positions[:, None] - recent <= last_forced)).sum(axis=1)
        columns[:, np.searchsorted(at, start.columns)] = 0
        seen = [start.columns[start.columns <= position] for position in positions.tolist()]
        distances = [position - each for position, each in zip(positions, seen, strict=True)]
        patched = np.unique(np.concatenate([np.arange(last_forced + 1), *distances])).astype(np.int32)
        offsets = sums.offsets[:, patched]
        mass = estimate_torch.probabilities(*sample, start.columns).cpu().numpy()
        for row, each in enumerate(distances):
            offsets[:, np.searchsorted(patched, each)] -= mass[:, row, : len(each)]
        offsets[:, : last_forced + 1] = 0
        return (
            [PatchedArray(*head) for head in zip(sums.columns, [at] * len(columns), columns, strict=True)],
            [PatchedArray(*head) for head in zip(sums.offsets, [patched] * len(offsets), offsets, strict=True)],
        )

    def _dense_fallback(self, held_out: npt.NDArray[np.float64]) -> tuple[list[bool], int]:
        """Return which heads become dense, and how many more would but for the cap."""
        below = [] if self.spec.synthetic else [at for at, kept in enumerate(held_out) if kept < self.spec.recall_floor]
        number = cell_number(self.keys.plan.start, self.spec.cell, self.keys.plan.distance)
        share = self.spec.max_dense_share * len(self.heads)
        room = math.floor(share * (number + 1) + 1e-9) - math.floor(share * number + 1e-9)
        dense = sorted(below, key=lambda at: (held_out[at], at))[:room]
        if len(dense) < len(below):
            _warn_cap(self.spec.max_dense_share, self.spec.recall_floor)
        return [at in dense for at in range(len(self.heads))], len(below) - len(dense)


def _keeps_everything(one: Selection, stop: int) -> bool:
    return len(one.offsets) == 1 and one.offsets[0, 0] == 0 and one.offsets[0, 1] >= stop - 1


def _backend(cell: CellQueries, kv: LayerKV) -> EstimateBackend:
    return estimate_compiled if estimate_compiled.supports(cell.estimate, kv) else estimate_torch


@functools.cache  # once a process
def _warn_dense(layer: int, head: int) -> None:
    _log.warning("sparse_attention_config has no pattern for layer %d, head %d: this head is dense", layer, head)


@functools.cache
def _warn_cap(share: float, floor: float) -> None:
    _log.warning(
        "sparse prefill: more heads than max_dense_share %g keep less than recall_floor %g of their attention; "
        "they stay sparse (raise max_dense_share, or the budgets)", share, floor,
    )  # fmt: skip
