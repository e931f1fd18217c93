"""Selections of one head in one cell, made from the sums of an estimate. Arrays only; keys are read elsewhere.

Columns are key positions, offsets are distances from query to key; both run over the `S` keys that the cell sees. Ties
go to the lower index, so that every machine selects the same keys.

Legend: `G` query heads of a KV head, `S` keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from protos.model.spec import HeadBudget
from workers.attention.plan import IntArray, Selection

FORCED_COLUMNS = 30  # the first keys of a sequence, which every head keeps
FORCED_OFFSETS = 100  # the nearest keys of every row, likewise
GROUP = 64  # neighbouring offsets that adaptive budgets add together

SYNTHETIC_OFFSETS = 1536
SYNTHETIC_RUNS = 8
SYNTHETIC_RUN = 64
SYNTHETIC_COLUMNS = 1024

FloatArray = npt.NDArray[np.float32]
TopIndices = Callable[[FloatArray, Sequence[int], int], list[IntArray]]


def top_indices(scores: FloatArray, counts: Sequence[int], forced: int) -> list[IntArray]:
    """Return for each row of `scores` `[G, S]` its first `forced` indices and those of its largest other scores.

    Scores are not negative; NaN counts as infinity.

    Returns:
        Ascending indices; row `g` has `counts[g]` of them, but at least `forced` and at most `S`.
    """
    return [_top_indices(row, count, forced) for row, count in zip(scores, counts, strict=True)]


def _top_indices(scores: FloatArray, count: int, forced: int) -> IntArray:
    count = min(max(count, forced), len(scores))
    forced = min(forced, count)
    wanted = count - forced
    if wanted == 0:
        return np.arange(forced, dtype=np.int32)
    keys = np.nan_to_num(scores[forced:], nan=np.inf)
    threshold = np.partition(keys, len(keys) - wanted)[len(keys) - wanted]
    above = np.flatnonzero(keys > threshold)
    equal = np.flatnonzero(keys == threshold)[: wanted - len(above)]
    others = np.sort(np.concatenate([above, equal])) + forced
    return np.concatenate([np.arange(forced), others]).astype(np.int32)


def to_intervals(indices: IntArray) -> IntArray:
    """Return ascending `indices` `[n]` as closed intervals `[m, 2]`, neither overlapping nor adjacent."""
    if not len(indices):
        return np.empty((0, 2), np.int32)
    breaks = np.flatnonzero(np.diff(indices) > 1)
    first, last = np.concatenate([[0], breaks + 1]), np.concatenate([breaks, [len(indices) - 1]])
    return np.stack([indices[first], indices[last]], axis=1).astype(np.int32)


def offset_mask(selection: Selection, stop: int) -> npt.NDArray[np.bool_]:
    """Return which offsets below `stop` are kept, `[stop]`."""
    steps = np.zeros(stop + 1, np.int8)
    steps[selection.offsets[:, 0]] = 1
    steps[np.minimum(selection.offsets[:, 1] + 1, stop)] = -1
    return np.cumsum(steps[:stop], dtype=np.int8).view(np.bool_)


def select_by_budget(
    columns: FloatArray, offsets: FloatArray, budgets: Sequence[HeadBudget | None], top: TopIndices = top_indices
) -> list[Selection | None]:
    """Return the largest sums `[G, S]` within published budgets, which include the forced columns and offsets.

    None for heads without a budget.
    """
    verticals = top(columns, [0 if budget is None else budget.n_vertical for budget in budgets], FORCED_COLUMNS)
    slashes = top(offsets, [0 if budget is None else budget.n_slash for budget in budgets], FORCED_OFFSETS)
    return [
        None if budget is None else Selection(to_intervals(slash), vertical)
        for budget, slash, vertical in zip(budgets, slashes, verticals, strict=True)
    ]


def synthetic_selection(stop: int, seed: tuple[int, int, int]) -> Selection:
    """Return a fixed load for benchmarks on random weights.

    It has the nearest 1,536 offsets, 8 runs of 64 offsets (they may overlap) and 1,024 columns, from numpy's default
    generator seeded with (start of the cell, layer, query head of the model).
    """
    random = np.random.default_rng(seed)
    merged = [[0, SYNTHETIC_OFFSETS]]
    for start in sorted(random.integers(0, max(1, stop - SYNTHETIC_RUN + 1), SYNTHETIC_RUNS).tolist()):
        if start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], start + SYNTHETIC_RUN)
        else:
            merged.append([start, start + SYNTHETIC_RUN])
    offsets = np.array([[start, min(end, stop) - 1] for start, end in merged], np.int32)
    columns = random.choice(stop, min(SYNTHETIC_COLUMNS, stop), replace=False)
    return Selection(offsets, np.sort(columns).astype(np.int32))


def forced_selection(stop: int) -> Selection:
    """Return where adaptive budgets start: the forced columns, and the forced offsets rounded up to whole groups."""
    num_offsets = min(stop, -(-FORCED_OFFSETS // GROUP) * GROUP)
    return Selection(np.array([[0, num_offsets - 1]], np.int32), np.arange(min(FORCED_COLUMNS, stop), dtype=np.int32))
