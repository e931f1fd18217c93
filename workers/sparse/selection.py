"""What a head keeps in a cell, picked from the sums of an estimate. Arrays only; keys are read elsewhere.

Columns are key positions, offsets are distances from query to key; both run over the `S` keys that the cell sees. Ties
go to the lower index, so every machine picks the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from protos.model.spec import HeadBudget
from workers.attention.plan import IntArray, Selection

FORCED_COLUMNS = 30  # the first keys of a sequence are always kept
FORCED_OFFSETS = 100  # and so are the nearest keys of every row
GROUP = 64  # adaptive budgets add this many neighbouring offsets at a time

SYNTHETIC_OFFSETS = 1536
SYNTHETIC_RUNS = 8
SYNTHETIC_RUN = 64
SYNTHETIC_COLUMNS = 1024

FloatArray = npt.NDArray[np.float32]
Top = Callable[[FloatArray, Sequence[int], int], list[IntArray]]


def top(scores: FloatArray, counts: Sequence[int], forced: int) -> list[IntArray]:
    """For each row of `scores` `[G, S]`, the indices of its first `forced` and of its largest other scores, ascending.

    Together they are as many as `counts` `[G]` says, but at least `forced` and at most `S`. Scores are not negative;
    NaN counts as infinity.
    """
    return [_top(row, count, forced) for row, count in zip(scores, counts, strict=True)]


def _top(scores: FloatArray, count: int, forced: int) -> IntArray:
    count = min(max(count, forced), len(scores))
    forced = min(forced, count)
    rest = scores[forced:]
    wanted = count - forced
    if wanted == 0:
        return np.arange(forced, dtype=np.int32)
    keys = np.nan_to_num(rest, nan=np.inf)
    least = np.partition(keys, len(keys) - wanted)[len(keys) - wanted]
    above = np.flatnonzero(keys > least)
    equal = np.flatnonzero(keys == least)[: wanted - len(above)]
    picked = np.sort(np.concatenate([above, equal])) + forced
    return np.concatenate([np.arange(forced), picked]).astype(np.int32)


def intervals(indices: IntArray) -> IntArray:
    """Ascending `indices` `[n]` as closed intervals `[m, 2]`, neither overlapping nor adjacent."""
    if not len(indices):
        return np.empty((0, 2), np.int32)
    breaks = np.flatnonzero(np.diff(indices) > 1)
    first, last = np.concatenate([[0], breaks + 1]), np.concatenate([breaks, [len(indices) - 1]])
    return np.stack([indices[first], indices[last]], axis=1).astype(np.int32)


def offset_map(selection: Selection, stop: int) -> npt.NDArray[np.bool_]:
    """Which offsets below `stop` are kept, `[stop]`."""
    steps = np.zeros(stop + 1, np.int8)
    steps[selection.offsets[:, 0]] = 1
    steps[np.minimum(selection.offsets[:, 1] + 1, stop)] = -1
    return np.cumsum(steps[:stop], dtype=np.int8).view(np.bool_)


def fixed(
    columns: FloatArray, offsets: FloatArray, budgets: Sequence[HeadBudget | None], top: Top = top
) -> list[Selection | None]:
    """The largest sums `[G, S]` within published budgets; forced columns and offsets count inside the two numbers."""
    verticals = top(columns, [0 if one is None else one.n_vertical for one in budgets], FORCED_COLUMNS)
    slashes = top(offsets, [0 if one is None else one.n_slash for one in budgets], FORCED_OFFSETS)
    return [
        None if budget is None else Selection(intervals(slash), vertical)
        for budget, slash, vertical in zip(budgets, slashes, verticals, strict=True)
    ]


def synthetic(stop: int, seed: tuple[int, int, int]) -> Selection:
    """A fixed load for benchmarks on random weights: near offsets, random runs of offsets and random columns.

    The nearest 1,536 offsets, 8 runs of 64 offsets (they may overlap) and 1,024 columns, from numpy's default generator
    seeded with (start of the cell, layer, query head of the model).
    """
    random = np.random.default_rng(seed)
    kept = np.zeros(stop, np.bool_)
    kept[:SYNTHETIC_OFFSETS] = True
    for start in random.integers(0, max(1, stop - SYNTHETIC_RUN + 1), SYNTHETIC_RUNS).tolist():
        kept[start : start + SYNTHETIC_RUN] = True
    columns = random.choice(stop, min(SYNTHETIC_COLUMNS, stop), replace=False)
    return Selection(intervals(np.flatnonzero(kept).astype(np.int32)), np.sort(columns).astype(np.int32))


def forced(stop: int) -> Selection:
    """What adaptive budgets start from: the forced columns, and the forced offsets filled up to whole groups."""
    near = min(stop, -(-FORCED_OFFSETS // GROUP) * GROUP)
    return Selection(np.array([[0, near - 1]], np.int32), np.arange(min(FORCED_COLUMNS, stop), dtype=np.int32))
