"""What a head keeps in a cell, picked from the sums of an estimate. Arrays only; keys are read elsewhere.

Columns are key positions, offsets are distances from query to key; both run over the `S` keys that the cell sees. Ties
go to the lower index, so every machine picks the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from protos.model_spec import HeadBudget
from workers.attention.plan import IntArray, Selection

FORCED_COLUMNS = 30  # the first keys of a sequence are always kept
FORCED_OFFSETS = 100  # and so are the nearest keys of every row
GROUP = 64  # adaptive budgets add this many neighbouring offsets at a time

SYNTHETIC_OFFSETS = 1536
SYNTHETIC_RUNS = 8
SYNTHETIC_RUN = 64
SYNTHETIC_COLUMNS = 1024

_MAX_EXACT_STEPS = 12  # of an adaptive search; later steps take at least an eighth more

FloatArray = npt.NDArray[np.float32]
Top = Callable[[FloatArray, int, int], IntArray]  # scores [S], how many, how many of the first ones in any case


def top(scores: FloatArray, count: int, forced: int) -> IntArray:
    """Indices, ascending, of the first `forced` scores and of the largest others, `count` together (`forced` at least).

    `scores` `[S]` are not negative; NaN counts as the largest. All `S` when `count` is more.
    """
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
    kept = np.zeros(stop, np.bool_)
    for low, high in selection.offsets.tolist():
        kept[low : high + 1] = True
    return kept


def fixed(columns: FloatArray, offsets: FloatArray, budget: HeadBudget, top: Top = top) -> Selection:
    """The largest sums within a published budget; forced columns and offsets count inside its two numbers."""
    return Selection(
        intervals(top(offsets, budget.n_slash, FORCED_OFFSETS)), top(columns, budget.n_vertical, FORCED_COLUMNS)
    )


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


@dataclass(frozen=True, slots=True)
class NewMass:
    """What each candidate would add to the forced selection, before candidates overlap with each other.

    `base` is the mass of the forced selection; `columns` and `offsets` are `[S]`, without the pairs that the forced
    selection keeps already.
    """

    base: float
    columns: FloatArray
    offsets: FloatArray


def forced(stop: int) -> Selection:
    """What adaptive budgets start from: the forced columns, and the forced offsets filled up to whole groups."""
    near = min(stop, -(-FORCED_OFFSETS // GROUP) * GROUP)
    return Selection(np.array([[0, near - 1]], np.int32), np.arange(min(FORCED_COLUMNS, stop), dtype=np.int32))


def adaptive(mass: NewMass, goal: float, kept: Callable[[Selection], float]) -> Selection:
    """The shortest list of candidates that keeps the mass `goal`, in the order of new mass per visited key.

    Candidates are columns, which cost each tile of 64 rows one key, and groups of 64 neighbouring offsets, which cost
    it 64 keys beside a group that is kept (127 alone, but gathering a column costs more than the key). Each is ranked
    by its own new mass over its cost; equal ones columns first, then by position. `kept` says what a selection really
    keeps, as a set. What a list adds is at most the sum of its candidates, so a shortfall tells how much longer it must
    be at least: the search never passes the shortest list.
    """
    stop = len(mass.columns)
    start = forced(stop)
    groups = np.add.reduceat(mass.offsets.astype(np.float64), np.arange(0, stop, GROUP))
    density = np.concatenate([mass.columns, (groups / GROUP).astype(np.float32)])
    density = np.nan_to_num(np.maximum(density, 0), nan=np.inf)
    density[: len(start.columns)] = -1  # they are kept already, and so are the first groups
    density[stop : stop + int(start.offsets[0, 1]) // GROUP + 1] = -1
    order = _descending(density)
    order = order[: len(density) - int((density < 0).sum())]
    added = mass.base + np.cumsum(np.where(order < stop, 1, GROUP) * density[order].astype(np.float64))
    length, aim = 0, goal
    for step in range(len(order) + 1):
        least = length if step == 0 else length + max(1, length // 8 if step > _MAX_EXACT_STEPS else 0)
        enough = 0 if aim <= mass.base else int(np.searchsorted(added, aim)) + 1
        length = min(max(least, enough), len(order))
        found = _with(start, order[:length], stop)
        shortfall = goal - kept(found)
        if shortfall <= 0 or length == len(order):
            break
        aim = (added[length - 1] if length else mass.base) + shortfall
    return found


def _with(start: Selection, picked: npt.NDArray[np.int64], stop: int) -> Selection:
    kept = offset_map(start, stop)
    for group in (picked[picked >= stop] - stop).tolist():
        kept[group * GROUP : (group + 1) * GROUP] = True
    columns = np.sort(np.concatenate([start.columns, picked[picked < stop]])).astype(np.int32)
    return Selection(intervals(np.flatnonzero(kept).astype(np.int32)), columns)


def _descending(density: FloatArray) -> npt.NDArray[np.int64]:
    """Order of falling density, lower index first among equals (a sort of plain numbers is several times faster)."""
    bits = np.maximum(density, 0).astype(np.float32).view(np.uint32).astype(np.int64) + (density >= 0)
    keys = (np.int64(0xFFFFFFFF) - bits) << 31 | np.arange(len(density), dtype=np.int64)
    keys.sort()
    return keys & 0x7FFFFFFF
