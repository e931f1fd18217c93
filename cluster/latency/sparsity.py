"""How many keys the rows of sparse cells visit, extrapolated to longer contexts from cells that were measured."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from protos.model.spec import ModelSpec

Floats = NDArray[np.float64]
TILE = 64  # rows that read their keys together
_FORGET = 0.98  # weight of the past at each new cell
_WHOLE = 0.99  # budgets that are more than this share of a context do not bind
# prior of the exponent of the context, and its weight as a number of cells at twice the context
_FIXED, _ADAPTIVE = (0.0, 4.0), (0.5, 0.5)


def budget_keys(spec: ModelSpec, contexts: Floats) -> Floats:
    """Return the keys that rows of sparse cells visit, of heads with fixed budgets; adaptive ones count as dense.

    Columns, offsets, and the keys between the offsets of the rows of a tile.
    """
    sparse = spec.sparse
    if sparse is None or sparse.is_adaptive:
        return contexts
    heads = [head for layer in sparse.patterns for head in layer] if sparse.patterns else [sparse.uniform]
    total = np.zeros_like(contexts)
    for budget in set(heads):
        keys = contexts if budget is None else np.minimum(contexts, budget.n_vertical + budget.n_slash + TILE)
        total += keys * heads.count(budget)
    return total / len(heads)


class Sparsity:
    """Fits the keys that a sparse row visits: `k = A * base * S ** slope`, slope from 0 to 1.

    With fixed budgets `base` is what they say, and the slope stays near 0 unless heads turn dense; cells whose budgets
    cover their whole context tell nothing of longer ones. With adaptive budgets `base` is 1. Before the first cell
    rows count as dense.
    """

    def __init__(self, spec: ModelSpec | None = None) -> None:
        self.sums = np.zeros(5)  # weight, x, y, x * x, x * y in logarithms, forgetting
        sparse = None if spec is None else spec.sparse
        self._spec = spec if sparse is not None and not sparse.is_adaptive else None
        self._slope, self._slope_weight = _ADAPTIVE if self._spec is None else _FIXED

    def observe(self, context: float, share: float) -> None:
        """Take the mean context of the rows of a slice, and the share of it they visited."""
        base = float(self._base(np.array(context)))
        if self._spec is not None and base > _WHOLE * context:
            return
        x, y = math.log(context), math.log(context * share / base)
        self.sums = _FORGET * self.sums + np.array([1.0, x, y, x * x, x * y])

    def keys(self, contexts: Floats) -> Floats:
        """Return the keys visited by rows with these mean contexts."""
        count, x, y, xx, xy = self.sums.tolist()
        if not count:
            return contexts if self._spec is None else self._base(contexts)
        prior = self._slope_weight * math.log(2) ** 2
        slope = (xy - x * y / count + prior * self._slope) / (xx - x * x / count + prior)
        slope = min(max(slope, 0.0), 1.0)
        logs = np.log(np.maximum(contexts, 1.0))
        fitted = self._base(contexts) * np.exp(y / count + slope * (logs - x / count))
        keys: Floats = np.minimum(contexts, fitted)
        return keys

    def _base(self, contexts: Floats) -> Floats:
        return np.ones_like(contexts, float) if self._spec is None else budget_keys(self._spec, contexts)
