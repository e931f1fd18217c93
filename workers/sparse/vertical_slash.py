"""Vertical-slash selection (arXiv 2407.02490): which keys each query head keeps in one sparse cell of one layer.

The last rows of a cell stand for all of it: their attention over every visible key, summed along columns and diagonals,
ranks key positions and distances. Other rows, held out, tell how much of the attention the selection keeps. The result
depends on the prompt and the cell only: not on steps, stages, threads or (see `choose`) shards.

Legend: `R` sampled rows, `H` query heads of the shard, `K` its KV heads, `G = H // K`, `S` keys the cell sees, `D` head
dim.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from protos.model.spec import HeadBudget, SparseSpec
from workers.attention.plan import AttentionPlan, Selection
from workers.kv.paged import LayerKV, PageTable
from workers.sparse import estimate, estimate_compiled, selection
from workers.sparse.adaptive import AdaptiveSearch, Changed, NewMass
from workers.sparse.estimate import CellKeys, SampledRows, Sums
from workers.sparse.selection import Top

HELD_OUT_ROWS = 32
_SEARCHES = 4  # adaptive searches side by side

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CellQueries:
    """The sampled rows of one cell of one layer.

    `estimate` are the rows of `estimate_rows`, whose `succ` and `inter` queries have the continuous rotations (`p % L +
    L` without the clamp, and `p % L + chunk_size`); `held_out` are those of `held_out_rows`, with the true rotations.
    `layer` counts in the model, `first_head` is the model's number of the shard's first query head.
    """

    estimate: SampledRows
    held_out: SampledRows
    layer: int
    first_head: int = 0


@dataclass(frozen=True, slots=True)
class CellChoice:
    """What every query head of the shard keeps in a cell; all sequences have an entry a head.

    Recalls are shares of the attention of the sampled rows, measured before a head turns dense; 1.0 for heads that are
    dense by their budget. `dense` tells which heads turned dense because of `held_out_recall`; `capped` counts those
    whose recall was below the floor too, but the cap was met.
    """

    selections: tuple[Selection, ...]
    estimated_recall: tuple[float, ...]
    held_out_recall: tuple[float, ...]
    dense: tuple[bool, ...]
    capped: int = 0


def estimate_rows(length: int, last_q: int) -> tuple[int, ...]:
    """The rows of a cell of `length` rows that the estimate looks at: its last `last_q`, ascending from row 0."""
    return tuple(range(max(0, length - last_q), length))


def held_out_rows(length: int, last_q: int) -> tuple[int, ...]:
    """At most 32 rows spread evenly over a cell, ascending; none of the estimate's when 32 others are left."""
    others = length - last_q if length - last_q >= HELD_OUT_ROWS else length
    count = min(HELD_OUT_ROWS, others)
    return tuple((2 * row + 1) * others // (2 * count) for row in range(count))


class Backend(Protocol):
    """The sums of an estimate and the masses of selections; `estimate` has the contract."""

    def sums(self, sample: SampledRows, keys: CellKeys, kv_head: int) -> Sums: ...

    def kept(
        self, sample: SampledRows, keys: CellKeys, kv_head: int, selections: Sequence[Selection]
    ) -> npt.NDArray[np.float64]: ...

    def mass(
        self, sample: SampledRows, keys: CellKeys, kv_head: int, found: Sums, selections: Sequence[Selection | None]
    ) -> npt.NDArray[np.float64]: ...


def choose(cell: CellQueries, kv: LayerKV, table: PageTable, plan: AttentionPlan, spec: SparseSpec) -> CellChoice:
    """Estimate, select, measure the recall, and turn heads dense whose recall is too low.

    Recall floor: of the query heads of one KV head, those below `spec.recall_floor` turn dense, the lowest held-out
    recall first (then the lower head). The cap is kept for every such group on its own, and it grows cell by cell: up
    to cell `c` (from 0) a group has room for `floor(max_dense_share * G * (c + 1))` dense heads, of which cell `c` may
    use what it adds. So the share holds for every prompt, and no history and no other shard is needed. (Shards that
    split the query heads of one KV head count the heads they have.)

    With `spec.synthetic` the selection is `selection.synthetic` and no head turns dense.

    Args:
        cell: the sampled rows, `[R, H, D]`.
        kv: the layer's cache; the keys of the cell are already written.
        table: where the sequence's positions lie.
        plan: the dense plan of the cell.
        spec: budgets; `patterns[layer][head]` None means a dense head.
    """
    keys = CellKeys(kv, table, plan)
    backend, top = _backend(cell, kv)
    kv_heads = kv.keys.shape[0]
    group = cell.estimate.queries.intra.shape[1] // kv_heads
    choices = [
        _Group(cell, keys, spec, backend, top, range(head * group, (head + 1) * group)).choose(head)
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
    """How many cells of `cell` tokens, also cut every `distance` tokens (0: not), begin before position `start`."""
    before = -(-start // cell)
    if distance:  # cuts that lie on the grid are no cells of their own
        before += (start - 1) // distance - (start - 1) // math.lcm(distance, cell) if start else 0
    return before


@dataclass(frozen=True, slots=True)
class _Group:
    """The query heads `heads` of the shard, which share a KV head."""

    cell: CellQueries
    keys: CellKeys
    spec: SparseSpec
    backend: Backend
    top: Top
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
            selections = [selection.synthetic(self.keys.stop, seed) for seed in seeds]
        elif self.spec.is_adaptive:
            selections = self._adaptive(sums, kv_head)
        else:
            picked = selection.fixed(sums.columns, sums.offsets, budgets, self.top)
            selections = [everything if one is None else one for one in picked]
        selections = [everything if _covers(one, self.keys.stop) else one for one in selections]
        whole = [one is everything for one in selections]
        estimated = self._estimated(sums, kv_head, selections)
        held_out = np.ones(len(whole))
        if not all(whole):
            held_out = self.backend.kept(self.cell.held_out, self.keys, kv_head, selections)
            held_out[whole] = 1.0
        dense, capped = self._fallback(held_out)
        return CellChoice(
            tuple(everything if turned else one for one, turned in zip(selections, dense, strict=True)),
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
        whole = [_covers(one, self.keys.stop) for one in selections]
        partial = [None if all_of_it else one for one, all_of_it in zip(selections, whole, strict=True)]
        mass = self.backend.mass(self.cell.estimate, self.keys, kv_head, sums, partial)
        share = np.minimum(mass / sums.lse.shape[1], 1.0)  # sums are rounded
        share[whole] = 1.0
        return share

    def _adaptive(self, sums: Sums, kv_head: int) -> list[Selection]:
        stop, rows = self.keys.stop, sums.lse.shape[1]
        start = selection.forced(stop)
        base = self.backend.mass(self.cell.estimate, self.keys, kv_head, sums, [start] * len(self.heads))
        columns, offsets = self._beside_forced(sums, kv_head, start)
        new = [NewMass(*one) for one in zip(base.tolist(), columns, offsets, strict=True)]
        found: list[Selection] = []
        while len(found) < len(new):  # some heads at a time: each search keeps an order of all its candidates
            searches = [AdaptiveSearch(one, self.spec.target_recall * rows) for one in new[len(found) :][:_SEARCHES]]
            first, rest = [None] * len(found), [None] * (len(new) - len(found) - len(searches))
            while not all(search.done for search in searches):
                proposed = [*first, *(None if search.done else search.selection for search in searches), *rest]
                kept = self.backend.mass(self.cell.estimate, self.keys, kv_head, sums, proposed)[len(found) :]
                for search, mass in zip(searches, kept.tolist(), strict=False):
                    if not search.done:
                        search.measured(mass)
            found += [search.selection for search in searches]
        return found

    def _beside_forced(self, sums: Sums, kv_head: int, start: Selection) -> tuple[list[Changed], list[Changed]]:
        """Sums of columns and offsets of each head without the pairs that the forced selection keeps."""
        stop, near = self.keys.stop, int(start.offsets[0, 1])
        positions = self.keys.plan.start + np.array(self.cell.estimate.rows)
        recent = np.arange(max(0, int(positions[0]) - near), stop, dtype=np.int32)
        sample = (self.cell.estimate, self.keys, kv_head, sums.lse)
        at = np.union1d(start.columns, recent).astype(np.int32)
        columns = sums.columns[:, at]
        mass = estimate.probabilities(*sample, recent).cpu().numpy()
        columns[:, np.searchsorted(at, recent)] -= (mass * (positions[:, None] - recent <= near)).sum(axis=1)
        columns[:, np.searchsorted(at, start.columns)] = 0
        seen = [start.columns[start.columns <= position] for position in positions.tolist()]
        distances = [position - each for position, each in zip(positions, seen, strict=True)]
        far = np.unique(np.concatenate([np.arange(near + 1), *distances])).astype(np.int32)
        offsets = sums.offsets[:, far]
        mass = estimate.probabilities(*sample, start.columns).cpu().numpy()
        for row, each in enumerate(distances):
            offsets[:, np.searchsorted(far, each)] -= mass[:, row, : len(each)]
        offsets[:, : near + 1] = 0
        return (
            [Changed(*head) for head in zip(sums.columns, [at] * len(columns), columns, strict=True)],
            [Changed(*head) for head in zip(sums.offsets, [far] * len(offsets), offsets, strict=True)],
        )

    def _fallback(self, held_out: npt.NDArray[np.float64]) -> tuple[list[bool], int]:
        """Which heads turn dense, and how many more would."""
        below = [] if self.spec.synthetic else [at for at, kept in enumerate(held_out) if kept < self.spec.recall_floor]
        number = cell_number(self.keys.plan.start, self.spec.cell, self.keys.plan.distance)
        share = self.spec.max_dense_share * len(self.heads)
        room = math.floor(share * (number + 1) + 1e-9) - math.floor(share * number + 1e-9)
        turned = sorted(below, key=lambda at: (held_out[at], at))[:room]
        if len(turned) < len(below):
            _warn_cap(self.spec.max_dense_share, self.spec.recall_floor)
        return [at in turned for at in range(len(self.heads))], len(below) - len(turned)


def _covers(one: Selection, stop: int) -> bool:
    return len(one.offsets) == 1 and one.offsets[0, 0] == 0 and one.offsets[0, 1] >= stop - 1


def _backend(cell: CellQueries, kv: LayerKV) -> tuple[Backend, Top]:
    if estimate_compiled.available(cell.estimate, kv):
        return estimate_compiled, estimate_compiled.top
    return estimate, selection.top


@functools.cache  # once a process
def _warn_dense(layer: int, head: int) -> None:
    _log.warning("sparse_attention_config has no pattern for layer %d, head %d: this head is dense", layer, head)


@functools.cache
def _warn_cap(share: float, floor: float) -> None:
    _log.warning(
        "sparse prefill: more heads than max_dense_share %g keep less than recall_floor %g of their attention; "
        "they stay sparse (raise max_dense_share, or the budgets)", share, floor,
    )  # fmt: skip
