"""Adaptive budgets: a short list of columns and offsets that keeps a given mass of the estimate. Arrays only.

The search reads the sums of the estimate in place. Besides them a head needs four bytes per key and its columns, so
that several heads of a long context can be searched at once.

Legend: `S` keys the cell sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from workers.attention.plan import IntArray, Selection
from workers.sparse.selection import GROUP, FloatArray, forced_selection, to_intervals

_PATIENCE = 4  # proposals after which each one is longer by an eighth at least
_CHUNK = 1 << 14  # values processed together; a multiple of GROUP
_COLUMN = np.uint32(1)  # bit of a sort key: set for columns, clear for groups of offsets
_DENSITY = np.uint32(0xFFFFFFFE)  # bits of a sort key that hold the density

SortKeys = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class PatchedArray:
    """A copy-on-read view of `values` `[S]` with the values `new` at the ascending indices `at`."""

    values: FloatArray
    at: IntArray
    new: FloatArray

    def slice(self, low: int, high: int) -> FloatArray:
        """Return a copy of the values `low .. high - 1`."""
        values = self.values[low:high].copy()
        first, last = np.searchsorted(self.at, (low, high))
        values[self.at[first:last] - low] = self.new[first:last]
        return values


class AdaptiveSearch:
    """Finds a short list of candidates that keeps the mass `goal`, in the order of new mass per visited key.

    Candidates are columns, which cost a tile of 64 rows one key each, and groups of 64 neighbouring offsets, which cost
    it 64 keys beside a kept group (127 alone, but gathering a column costs more than its key). They are ranked by new
    mass over cost, rounded to 23 bits; of equal ones columns come first, then the lower position.

    Candidates overlap, so a list keeps less than the sum of its masses. `selection` is a proposal; the caller measures
    what it keeps as a set and calls `update`, until `done`. The next proposal assumes that further candidates keep as
    large a part of their mass as the list did on average (a half at least).
    """

    def __init__(self, base: float, columns: PatchedArray, offsets: PatchedArray, goal: float) -> None:
        """Propose the first selection.

        Args:
            base: the mass of the forced selection.
            columns, offsets: `[S]`, the mass that each adds to it, not counting overlap between candidates.
            goal: the mass to keep.
        """
        self._base, self._columns, self._goal = base, columns, goal
        self._stop = len(columns.values)
        start = forced_selection(self._stop)
        self._forced_columns, self._forced_groups = len(start.columns), int(start.offsets[0, 1]) // GROUP + 1
        self._groups = np.concatenate([_group_keys(offsets, *span) for span in self._spans()])
        ascending = np.empty(self._stop + len(self._groups), np.uint32)
        for low, high in self._spans():
            ascending[low:high] = self._column_keys(low, high)
        ascending[self._stop :] = self._groups
        ascending.sort()
        self._ascending, self._order = ascending, ascending[::-1]
        parts = [_masses(self._order[low : low + _CHUNK]).sum() for low in range(0, len(ascending), _CHUNK)]
        self._before = base + np.concatenate([[0.0], np.cumsum(parts)])  # mass before every chunk of the order
        self._steps = self._length = 0
        self.done = False
        self._propose(goal)

    def update(self, kept: float) -> None:
        """Continue with the mass that `selection` keeps: propose another selection, or set `done`."""
        shortfall = self._goal - kept
        if shortfall <= 0 or self._length == len(self._order):
            self.done = True
            return
        mass, gained = self._mass_of_first(self._length), kept - self._base
        rate = gained / (mass - self._base) if gained > 0 else 1.0
        self._propose(mass + shortfall / min(1.0, max(0.5, rate)))

    def _spans(self) -> Iterator[tuple[int, int]]:
        return ((low, min(low + _CHUNK, self._stop)) for low in range(0, self._stop, _CHUNK))

    def _column_keys(self, low: int, high: int) -> SortKeys:
        return _sort_keys(self._columns.slice(low, high)) | _COLUMN

    def _mass_of_first(self, length: int) -> float:
        """Return the summed mass of the first `length` candidates."""
        chunk = length // _CHUNK
        return float(self._before[chunk] + _masses(self._order[chunk * _CHUNK : length]).sum())

    def _length_for(self, mass: float) -> int:
        """Return the shortest length whose summed mass is `mass`, or one that exceeds the order."""
        if mass <= self._base:
            return 0
        chunk = int(np.searchsorted(self._before[1:], mass))
        part = self._order[chunk * _CHUNK : (chunk + 1) * _CHUNK]
        return chunk * _CHUNK + int(np.searchsorted(self._before[chunk] + np.cumsum(_masses(part)), mass)) + 1

    def _propose(self, mass: float) -> None:
        """Propose the shortest list with the summed mass `mass` that is longer than the one before."""
        growth = self._length // 8 if self._steps >= _PATIENCE else 0
        shortest = self._length + max(1, growth) if self._steps else 0
        self._length = min(max(shortest, self._length_for(mass)), len(self._order))
        self._steps += 1
        self.selection = forced_selection(self._stop)  # frees the previous one
        self.selection = self._select_first(self._length)

    def _columns_among(self, length: int) -> int:
        spans = range(0, length, _CHUNK)
        return sum(int((self._order[low : min(low + _CHUNK, length)] & _COLUMN).sum()) for low in spans)

    def _select_first(self, length: int) -> Selection:
        """Return the forced selection and the first `length` candidates."""
        last = self._order[length - 1] if length else np.uint32(0xFFFFFFFF)
        equal = length - (len(self._order) - int(np.searchsorted(self._ascending, last, side="right")))
        columns = np.empty(self._forced_columns + self._columns_among(length), np.int32)
        columns[: self._forced_columns] = np.arange(self._forced_columns)
        end = self._forced_columns
        for low, high in self._spans():
            picked, taken = _picked(self._column_keys(low, high), last, equal if last & _COLUMN else 0)
            equal -= taken if last & _COLUMN else 0
            picked = picked[picked + low >= self._forced_columns]
            columns[end : end + len(picked)] = picked + low
            end += len(picked)
        picked, _ = _picked(self._groups, last, 0 if last & _COLUMN else equal)
        groups = np.union1d(np.arange(self._forced_groups), picked).astype(np.int32)
        offsets = to_intervals(groups) * np.int32(GROUP)
        offsets[:, 1] = np.minimum(offsets[:, 1] + GROUP - 1, self._stop - 1)
        return Selection(offsets, columns[:end])


def _sort_keys(density: FloatArray) -> SortKeys:
    """Return integers in the order of densities, which are rounded down to 23 bits; the last bit is clear."""
    return np.nan_to_num(np.maximum(density, 0), nan=np.inf).view(np.uint32) & _DENSITY


def _masses(keys: SortKeys) -> npt.NDArray[np.float64]:
    return np.where(keys & _COLUMN, 1.0, GROUP) * (keys & _DENSITY).view(np.float32)


def _group_keys(offsets: PatchedArray, low: int, high: int) -> SortKeys:
    starts = np.arange(0, high - low, GROUP)
    mass = np.add.reduceat(offsets.slice(low, high).astype(np.float64), starts)
    return _sort_keys((mass / GROUP).astype(np.float32))


def _picked(keys: SortKeys, last: np.uint32, equal: int) -> tuple[npt.NDArray[np.int64], int]:
    """Return the indices of keys above `last` and of the first `equal` keys that equal it, and how many these are."""
    same = np.flatnonzero(keys == last)[:equal]
    picked = keys > last
    picked[same] = True
    return np.flatnonzero(picked), len(same)
