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
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from protos.model.spec import HeadBudget, SparseSpec
from workers.attention import compiled
from workers.attention.plan import Selection
from workers.sparse.adaptive import AdaptiveSearch, PatchedArray
from workers.sparse.estimate import CellKeys, Estimate, SampledRows, Sums
from workers.sparse.estimate_compiled import CompiledEstimate
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


class CellChoice(NamedTuple):
    """The selections of the query heads of the shard in one cell; every tuple has an entry per head.

    Recalls are shares of the attention of the sampled rows, measured before the dense fallback; 1.0 for heads that are
    dense by their budget. `dense` marks the heads that fell back to dense because of `held_out_recall`.
    """

    selections: tuple[Selection, ...]
    estimated_recall: tuple[float, ...]
    held_out_recall: tuple[float, ...]
    dense: tuple[bool, ...]


def estimate_rows(length: int, last_q: int) -> range:
    """Return the rows that the estimate samples in a cell of `length` rows: the last `last_q`."""
    return range(max(0, length - last_q), length)


def held_out_rows(length: int, last_q: int) -> tuple[int, ...]:
    """Return at most 32 rows spread evenly over a cell, ascending, without the estimate's if 32 others are left."""
    others = length - last_q if length - last_q >= HELD_OUT_ROWS else length
    count = min(HELD_OUT_ROWS, others)
    return tuple((2 * row + 1) * others // (2 * count) for row in range(count))


def choose(cell: CellQueries, keys: CellKeys, spec: SparseSpec) -> CellChoice:
    """Estimate, select, measure the recall, and make heads dense whose recall is too low.

    Recall floor: of the query heads of one KV head, those below `spec.recall_floor` become dense, the lowest held-out
    recall first (then the lower head). The cap is applied to every such group separately, and it grows cell by cell: up
    to cell `c` (from 0) a group may have `floor(max_dense_share * G * (c + 1))` dense heads, of which cell `c` may use
    what it adds. So the share holds for every prompt without any history or communication between shards. (Shards that
    split the query heads of one KV head count the heads they have.)

    With `spec.synthetic` the selections are `synthetic_selection` and no head becomes dense.

    Args:
        cell: the sampled rows, `[R, H, D]`.
        keys: what the cell sees; its own keys are already written.
        spec: budgets; `patterns[layer][head]` None means a dense head.
    """
    backend = _backend(cell, keys)
    kv_heads = keys.kv.keys.shape[0]
    estimates = (backend(cell.estimate, keys, kv_head) for kv_head in range(kv_heads))
    groups = [_Group(cell, spec, estimate, backend(cell.held_out, keys, estimate.kv_head)) for estimate in estimates]
    choices = [group.choose() for group in groups]
    return CellChoice(*(tuple(chain.from_iterable(parts)) for parts in zip(*choices, strict=True)))


def cell_number(start: int, cell: int, distance: int) -> int:
    """Return how many cells of `cell` tokens, also cut every `distance` tokens (0: not), begin before `start`."""
    before = -(-start // cell)
    if distance:  # cuts on the grid begin no further cell
        before += (start - 1) // distance - (start - 1) // math.lcm(distance, cell) if start else 0
    return before


@dataclass(frozen=True, slots=True)
class _Group:
    """The query heads of the shard that share a KV head: the estimate of their attention, and that of held-out rows."""

    cell: CellQueries
    spec: SparseSpec
    estimate: Estimate
    held_out: Estimate

    def choose(self) -> CellChoice:
        keys, first = self.estimate.keys, self.estimate.kv_head * self.estimate.group
        heads = [self.cell.first_head + head for head in range(first, first + self.estimate.group)]  # of the model
        budgets = [self._budget(head) for head in heads]
        everything = Selection.everything(keys.stop)
        if all(budget is None for budget in budgets) and not self.spec.is_adaptive and not self.spec.synthetic:
            ones = (1.0,) * len(heads)
            return CellChoice((everything,) * len(heads), ones, ones, (False,) * len(heads))
        sums = self.estimate.sums()
        if self.spec.synthetic:
            selections = [synthetic_selection(keys.stop, (keys.plan.start, self.cell.layer, head)) for head in heads]
        elif self.spec.is_adaptive:
            selections = self._adaptive(sums)
        else:
            chosen = select_by_budget(sums.columns, sums.offsets, budgets, self.estimate.top_indices)
            selections = [everything if one is None else one for one in chosen]
        whole = [_keeps_everything(one, keys.stop) for one in selections]
        selections = [everything if is_whole else one for one, is_whole in zip(selections, whole, strict=True)]
        partial = [None if is_whole else one for one, is_whole in zip(selections, whole, strict=True)]
        mass = self.estimate.kept_mass(sums, partial)
        estimated = np.minimum(mass / sums.lse.shape[1], 1.0)  # rounding may exceed 1
        held_out = np.ones(len(heads)) if all(whole) else self.held_out.kept_share(selections)
        estimated[whole] = held_out[whole] = 1.0
        dense = self._dense_fallback(held_out)
        selections = [everything if is_dense else one for one, is_dense in zip(selections, dense, strict=True)]
        return CellChoice(tuple(selections), tuple(estimated.tolist()), tuple(held_out.tolist()), tuple(dense))

    def _budget(self, head: int) -> HeadBudget | None:
        if self.spec.patterns is None:
            return self.spec.uniform
        budget = self.spec.patterns[self.cell.layer][head]
        if budget is None:
            warn_dense(self.cell.layer, head)
        return budget

    def _adaptive(self, sums: Sums) -> list[Selection]:
        start, goal = forced_selection(self.estimate.keys.stop), self.spec.target_recall * sums.lse.shape[1]
        base = self.estimate.kept_mass(sums, [start] * self.estimate.group)
        new = list(zip(base.tolist(), *self._without_forced(sums, start), strict=True))  # a head each
        chosen: list[Selection] = []
        for first in range(0, len(new), _SEARCHES):
            searches = [AdaptiveSearch(*head, goal) for head in new[first : first + _SEARCHES]]
            while not all(search.done for search in searches):
                proposed: list[Selection | None] = [None] * len(new)
                proposed[first : first + len(searches)] = [None if one.done else one.selection for one in searches]
                kept = self.estimate.kept_mass(sums, proposed)[first:]
                for search, mass in zip(searches, kept.tolist(), strict=False):
                    if not search.done:
                        search.update(mass)
            chosen += [search.selection for search in searches]
        return chosen

    def _without_forced(self, sums: Sums, start: Selection) -> tuple[list[PatchedArray], list[PatchedArray]]:
        """Return each head's sums of columns and offsets without the pairs that the forced selection `start` keeps."""
        keys, last_forced = self.estimate.keys, int(start.offsets[0, 1])
        positions = keys.plan.start + np.array(self.cell.estimate.rows)
        recent = np.arange(max(0, int(positions[0]) - last_forced), keys.stop, dtype=np.int32)
        at = np.union1d(start.columns, recent).astype(np.int32)
        columns = sums.columns[:, at]
        mass = self.estimate.probabilities(sums.lse, recent).cpu().numpy()
        columns[:, np.searchsorted(at, recent)] -= (mass * (positions[:, None] - recent <= last_forced)).sum(axis=1)
        columns[:, np.searchsorted(at, start.columns)] = 0
        seen = [start.columns[start.columns <= position] for position in positions.tolist()]
        distances = [position - each for position, each in zip(positions, seen, strict=True)]
        patched = np.unique(np.concatenate([np.arange(last_forced + 1), *distances])).astype(np.int32)
        offsets = sums.offsets[:, patched]
        mass = self.estimate.probabilities(sums.lse, start.columns).cpu().numpy()
        for row, each in enumerate(distances):
            offsets[:, np.searchsorted(patched, each)] -= mass[:, row, : len(each)]
        offsets[:, : last_forced + 1] = 0
        return (
            [PatchedArray(*head) for head in zip(sums.columns, [at] * len(columns), columns, strict=True)],
            [PatchedArray(*head) for head in zip(sums.offsets, [patched] * len(offsets), offsets, strict=True)],
        )

    def _dense_fallback(self, held_out: npt.NDArray[np.float64]) -> list[bool]:
        """Return which heads become dense."""
        below = [] if self.spec.synthetic else [at for at, kept in enumerate(held_out) if kept < self.spec.recall_floor]
        plan = self.estimate.keys.plan
        number = cell_number(plan.start, self.spec.cell, plan.distance)
        share = self.spec.max_dense_share * len(held_out)
        room = math.floor(share * (number + 1) + 1e-9) - math.floor(share * number + 1e-9)
        dense = sorted(below, key=lambda at: (held_out[at], at))[:room]
        if len(dense) < len(below):
            warn_cap(self.spec.max_dense_share, self.spec.recall_floor)
        return [at in dense for at in range(len(held_out))]


def _keeps_everything(one: Selection, stop: int) -> bool:
    return len(one.offsets) == 1 and one.offsets[0, 0] == 0 and one.offsets[0, 1] >= stop - 1


def _backend(cell: CellQueries, keys: CellKeys) -> type[Estimate]:
    return CompiledEstimate if compiled.supports(cell.estimate.queries.intra, keys.kv) else Estimate


@functools.cache  # once a process
def warn_dense(layer: int, head: int) -> None:
    """Log that the model has no pattern for a head."""
    _log.warning("sparse_attention_config has no pattern for layer %d, head %d: this head is dense", layer, head)


@functools.cache
def warn_cap(share: float, floor: float) -> None:
    """Log that heads stay sparse although they keep too little."""
    _log.warning(
        "sparse prefill: more heads than max_dense_share %g keep less than recall_floor %g of their attention; "
        "they stay sparse (raise max_dense_share, or the budgets)", share, floor,
    )  # fmt: skip
