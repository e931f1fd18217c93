"""Counts the query-key pairs of a plan without spelling out its lists of keys."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from workers.attention.plan import AttentionPlan, Selection

Ints = npt.NDArray[np.int64]


def causal_pairs(plan: AttentionPlan) -> int:
    """Pairs that causal attention of the plan's rows has."""
    return plan.length * (plan.start + 1) + plan.length * (plan.length - 1) // 2


def visited_pairs(plan: AttentionPlan, head: int) -> int:
    """Equal to `plan.visited_pairs`; some hundred times faster for plans of many tiles."""
    if plan.heads is None:
        return causal_pairs(plan)
    first = plan.start + np.arange(0, plan.length, plan.tile, dtype=np.int64)
    last = np.minimum(first + plan.tile, plan.start + plan.length) - 1
    return int(_visited(plan.heads[head], first, last).sum())


def _visited(selection: Selection, first: Ints, last: Ints) -> Ints:
    """Pairs `[tiles]` that rows at `first .. last` visit, without those of keys after the row.

    Ranges of farther offsets begin and end earlier, so all that a range shares with those before it is what it shares
    with its neighbour.
    """
    low, high = selection.offsets.astype(np.int64).T
    starts = np.maximum(first[:, None] - high, 0)
    stops = np.maximum(last[:, None] - low + 1, starts)
    shared = np.maximum(stops[:, 1:], starts[:, :-1])
    missing = _Missing(selection, first, last)
    inside = missing(starts, stops).sum(axis=1) - missing(starts[:, :-1], shared).sum(axis=1)
    return np.asarray(inside + missing.columns((last + 1)[:, None])[:, 0])


class _Missing:
    """Counts visible pairs of key ranges `[tiles, n]` that are not among the gathered columns."""

    def __init__(self, selection: Selection, first: Ints, last: Ints) -> None:
        self._first, self._rows = first[:, None], (last - first + 1)[:, None]
        self._keys = selection.columns.astype(np.int64)
        self._sums = np.concatenate([[0], np.cumsum(self._keys)])

    def __call__(self, start: Ints, stop: Ints) -> Ints:
        return self._all(stop) - self._all(start) - self.columns(stop) + self.columns(start)

    def _all(self, stop: Ints) -> Ints:
        """Visible pairs of all keys before `stop`; key `first + i` is hidden from `i` rows."""
        late = np.maximum(stop - 1 - self._first, 0)
        return np.asarray(stop * self._rows - late * (late + 1) // 2)

    def columns(self, stop: Ints) -> Ints:
        """Visible pairs of the gathered columns before `stop`."""
        seen, whole = (np.searchsorted(self._keys, edge) for edge in (stop, np.minimum(stop, self._first + 1)))
        hidden = self._sums[seen] - self._sums[whole] - (seen - whole) * self._first
        return np.asarray(seen * self._rows - hidden)
