"""Numbers of query-key pairs of a plan, without spelling out its lists of keys."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from workers.attention.plan import AttentionPlan, Selection

Ints = npt.NDArray[np.int64]


def causal_pairs(plan: AttentionPlan) -> int:
    """Return the number of pairs of causal attention of the plan's rows."""
    return plan.length * (plan.start + 1) + plan.length * (plan.length - 1) // 2


def visited_pairs(plan: AttentionPlan, head: int) -> int:
    """Return the number of pairs that one head visits, without those that the causal mask removes."""
    if plan.heads is None:
        return causal_pairs(plan)
    first = plan.start + np.arange(0, plan.length, plan.tile, dtype=np.int64)
    last = np.minimum(first + plan.tile, plan.start + plan.length) - 1
    return int(_visited(plan.heads[head], first, last).sum())


def _visited(selection: Selection, first: Ints, last: Ints) -> Ints:
    """Return the pairs `[tiles]` that rows at `first .. last` visit, without those of keys after the row.

    Ranges of larger offsets begin and end earlier, so what a range shares with all ranges before it is what it shares
    with its neighbour.
    """
    low, high = selection.offsets.astype(np.int64).T
    starts = np.maximum(first[:, None] - high, 0)
    stops = np.maximum(last[:, None] - low + 1, starts)
    shared = np.maximum(stops[:, 1:], starts[:, :-1])
    uncovered = _Uncovered(selection, first, last)
    inside = uncovered(starts, stops).sum(axis=1) - uncovered(starts[:, :-1], shared).sum(axis=1)
    return np.asarray(inside + uncovered.columns((last + 1)[:, None])[:, 0])


class _Uncovered:
    """Counts the visible pairs of key ranges `[tiles, n]`, without those of the gathered columns."""

    def __init__(self, selection: Selection, first: Ints, last: Ints) -> None:
        self._first, self._rows = first[:, None], (last - first + 1)[:, None]
        self._keys = selection.columns.astype(np.int64)
        self._sums = np.concatenate([[0], np.cumsum(self._keys)])

    def __call__(self, start: Ints, stop: Ints) -> Ints:
        return self._all(stop) - self._all(start) - self.columns(stop) + self.columns(start)

    def _all(self, stop: Ints) -> Ints:
        """Return the visible pairs of all keys before `stop`; key `first + i` is hidden from `i` rows."""
        late = np.maximum(stop - 1 - self._first, 0)
        return np.asarray(stop * self._rows - late * (late + 1) // 2)

    def columns(self, stop: Ints) -> Ints:
        """Return the visible pairs of the gathered columns before `stop`."""
        seen, whole = (np.searchsorted(self._keys, edge) for edge in (stop, np.minimum(stop, self._first + 1)))
        hidden = self._sums[seen] - self._sums[whole] - (seen - whole) * self._first
        return np.asarray(seen * self._rows - hidden)
