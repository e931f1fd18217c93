"""Adaptive budgets: a short list of columns and offsets that keeps the mass it is asked for. Arrays only.

Besides the sums of the estimate, which the search reads in place, a head takes four bytes a key and the columns it
picks, so that many heads of a long context are searched side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from workers.attention.plan import IntArray, Selection
from workers.sparse.selection import GROUP, FloatArray, forced, intervals

_PATIENCE = 4  # proposals of a search that may grow by little
_CHUNK = 1 << 14  # values looked at together; a multiple of GROUP
_COLUMN = np.uint32(1)  # the last bit of a key: whether it is a column's
_DENSITY = np.uint32(0xFFFFFFFE)

Keys = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Changed:
    """An array with some values replaced; `values` itself stays as it is, for others that read it."""

    values: FloatArray
    at: IntArray  # ascending
    new: FloatArray

    def part(self, low: int, high: int) -> FloatArray:
        """Values `low .. high - 1`, a copy."""
        found = self.values[low:high].copy()
        first, last = np.searchsorted(self.at, (low, high))
        found[self.at[first:last] - low] = self.new[first:last]
        return found


@dataclass(frozen=True, slots=True)
class NewMass:
    """What each candidate would add to the forced selection, before candidates overlap with each other.

    `base` is the mass of the forced selection; `columns` and `offsets` are `[S]`, without the pairs that the forced
    selection keeps already.
    """

    base: float
    columns: Changed
    offsets: Changed


class AdaptiveSearch:
    """Finds a short list of candidates that keeps the mass `goal`, in the order of new mass per visited key.

    Candidates are columns, which cost each tile of 64 rows one key, and groups of 64 neighbouring offsets, which cost
    it 64 keys beside a group that is kept (127 alone, but gathering a column costs more than the key). Each is ranked
    by its own new mass over its cost, rounded to 23 bits; equal ones columns first, then by position.

    Candidates overlap, so the sum of their masses is more than a list really keeps. `selection` is a proposal; whoever
    searches tells `measured` what it keeps as a set, until `done`. A shortfall is made up at the rate that the list had
    on average (a half at least); late proposals grow by an eighth at least.
    """

    def __init__(self, mass: NewMass, goal: float) -> None:
        self._mass, self._goal = mass, goal
        self._stop = len(mass.columns.values)
        start = forced(self._stop)
        self._forced_columns, self._forced_groups = len(start.columns), int(start.offsets[0, 1]) // GROUP + 1
        self._groups = np.concatenate([_of_groups(mass.offsets, *span) for span in self._spans()])
        ascending = np.empty(self._stop + len(self._groups), np.uint32)
        for low, high in self._spans():
            ascending[low:high] = self._columns(low, high)
        ascending[self._stop :] = self._groups
        ascending.sort()
        self._ascending, self._order = ascending, ascending[::-1]
        parts = [_masses(self._order[low : low + _CHUNK]).sum() for low in range(0, len(ascending), _CHUNK)]
        self._before = mass.base + np.concatenate([[0.0], np.cumsum(parts)])  # of every chunk of the order
        self._steps = self._length = 0
        self.done = False
        self._propose(goal)

    def measured(self, kept: float) -> None:
        """Take the mass that `selection` keeps; afterwards it is another one, or the search is `done`."""
        shortfall = self._goal - kept
        if shortfall <= 0 or self._length == len(self._order):
            self.done = True
            return
        summed, gained = self._summed(self._length), kept - self._mass.base
        rate = gained / (summed - self._mass.base) if gained > 0 else 1.0
        self._propose(summed + shortfall / min(1.0, max(0.5, rate)))

    def _spans(self) -> Iterator[tuple[int, int]]:
        return ((low, min(low + _CHUNK, self._stop)) for low in range(0, self._stop, _CHUNK))

    def _columns(self, low: int, high: int) -> Keys:
        return _keys(self._mass.columns.part(low, high)) | _COLUMN

    def _summed(self, length: int) -> float:
        """Mass of the first `length` of the order, each counted whole."""
        chunk = length // _CHUNK
        return float(self._before[chunk] + _masses(self._order[chunk * _CHUNK : length]).sum())

    def _enough(self, aim: float) -> int:
        """The least length whose summed mass is `aim`; all of the order where there is none."""
        if aim <= self._mass.base:
            return 0
        chunk = int(np.searchsorted(self._before[1:], aim))
        part = self._order[chunk * _CHUNK : (chunk + 1) * _CHUNK]
        return chunk * _CHUNK + int(np.searchsorted(self._before[chunk] + np.cumsum(_masses(part)), aim)) + 1

    def _propose(self, aim: float) -> None:
        """The shortest list that sums up to `aim`, longer than the one before."""
        grow = self._length // 8 if self._steps >= _PATIENCE else 0
        least = self._length + max(1, grow) if self._steps else 0
        self._length = min(max(least, self._enough(aim)), len(self._order))
        self._steps += 1
        self.selection = forced(self._stop)  # lets go of the one before
        self.selection = self._first(self._length)

    def _columns_among(self, length: int) -> int:
        spans = range(0, length, _CHUNK)
        return sum(int((self._order[low : min(low + _CHUNK, length)] & _COLUMN).sum()) for low in spans)

    def _first(self, length: int) -> Selection:
        """The first `length` of the order, beside what is forced."""
        last = self._order[length - 1] if length else np.uint32(0xFFFFFFFF)
        equal = length - (len(self._order) - int(np.searchsorted(self._ascending, last, side="right")))
        columns = np.empty(self._forced_columns + self._columns_among(length), np.int32)
        columns[: self._forced_columns] = np.arange(self._forced_columns)
        end = self._forced_columns
        for low, high in self._spans():
            picked, taken = _above(self._columns(low, high), last, equal if last & _COLUMN else 0)
            equal -= taken if last & _COLUMN else 0
            picked = picked[picked + low >= self._forced_columns]
            columns[end : end + len(picked)] = picked + low
            end += len(picked)
        picked, _ = _above(self._groups, last, 0 if last & _COLUMN else equal)
        groups = np.union1d(np.arange(self._forced_groups), picked).astype(np.int32)
        offsets = intervals(groups) * np.int32(GROUP)
        offsets[:, 1] = np.minimum(offsets[:, 1] + GROUP - 1, self._stop - 1)
        return Selection(offsets, columns[:end])


def _keys(density: FloatArray) -> Keys:
    """Whole numbers in the order of densities, which are rounded down to 23 bits; the last bit is free."""
    return np.nan_to_num(np.maximum(density, 0), nan=np.inf).view(np.uint32) & _DENSITY


def _masses(keys: Keys) -> npt.NDArray[np.float64]:
    return np.where(keys & _COLUMN, 1.0, GROUP) * (keys & _DENSITY).view(np.float32)


def _of_groups(offsets: Changed, low: int, high: int) -> Keys:
    starts = np.arange(0, high - low, GROUP)
    return _keys((np.add.reduceat(offsets.part(low, high).astype(np.float64), starts) / GROUP).astype(np.float32))


def _above(keys: Keys, last: np.uint32, equal: int) -> tuple[npt.NDArray[np.int64], int]:
    """Where keys are above `last`, and the first `equal` that are `last`; also how many of these there were."""
    same = np.flatnonzero(keys == last)[:equal]
    picked = keys > last
    picked[same] = True
    return np.flatnonzero(picked), len(same)
