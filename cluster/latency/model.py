"""Predict how long a step takes: `t = c + g * S + b * T + a * visited`, fitted online from measured steps.

Per stage: `T` tokens of the step, `S` longest context it touches, `visited` query-key pairs. Dense rows visit all
pairs; for sparse cells the shards report the share they visited, and a second small fit extrapolates it to longer
contexts. No size of a step depends on the model: it serves the predicted end of a prefill and the hang detector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cluster.scheduler.chunking import Chunk
from protos.model import grid
from protos.model.spec import ModelSpec
from protos.stage.messages import CellReport, SequenceSlice, StepPlan

_FORGET = 0.98  # weight of the past at each new step: a memory of about 50 steps
_SCALE = (1.0, 1e5, 1e3, 1e8)  # typical sizes of (1, S, T, visited): keeps the equations well scaled
_RIDGE = 1e-6
_SLOPE = 0.5  # prior exponent: visited keys grow as this power of the context
_SLOPE_WEIGHT = 0.5  # weight of the prior, as a number of cells at twice the context

Features = tuple[float, float, float, float]
Floats = NDArray[np.float64]


def causal_pairs(start: int, length: int) -> int:
    """Return the number of query-key pairs that plain causal attention of these rows visits."""
    return length * start + length * (length + 1) // 2


def visited_share(part: SequenceSlice, reports: Sequence[CellReport]) -> float | None:
    """Return the share of a slice's causal pairs that were visited, over layers and heads; None without reports."""
    visited = pairs = 0.0
    for report in reports:
        if report.sequence == part.sequence and len(report.density):
            weight = causal_pairs(report.start, report.length)
            pairs += weight * len(report.density)
            visited += weight * sum(report.density)
    return visited / pairs if pairs else None


class LatencyModel:
    """Fits four non-negative coefficients by recursive least squares with forgetting."""

    def __init__(self, spec: ModelSpec | None = None) -> None:
        self._spec = spec
        self._sparsity = _Sparsity()
        self._gram = [[0.0] * 4] * 4  # lists, as numpy costs more than 16 sums
        self._moment = [0.0] * 4
        self._coefficients: Floats | None = None
        self.num_steps = 0

    def observe(self, plan: StepPlan, seconds: float, reports: Sequence[CellReport] = ()) -> None:
        """Take the measured time of a step (of the slowest stage), and what the shards report of its sparse grid."""
        for part in plan.slices:
            if reports and (share := visited_share(part, reports)):
                self._sparsity.observe(causal_pairs(part.start, part.length) / part.length, share)
        x = [value / scale for value, scale in zip(self.features(plan, reports), _SCALE, strict=True)]
        weight = max(seconds, 1e-6) ** -2  # errors count relative to the step: decode steps matter as much as chunks
        self._gram = [
            [_FORGET * old + weight * a * b for old, b in zip(row, x, strict=True)]
            for row, a in zip(self._gram, x, strict=True)
        ]
        self._moment = [_FORGET * old + weight * a * seconds for old, a in zip(self._moment, x, strict=True)]
        self._coefficients = None
        self.num_steps += 1

    def features(self, plan: StepPlan, reports: Sequence[CellReport] = ()) -> Features:
        """Return (1, S, T, visited pairs) of a plan; sparse slices without reports are estimated."""
        context = max((part.start + part.length for part in plan.slices), default=0)
        visited = sum(self._visited(part, reports) for part in plan.slices)
        return 1.0, context, plan.num_tokens, visited

    @property
    def coefficients(self) -> tuple[float, float, float, float]:
        """(c, g, b, a) in seconds, seconds per context token, per token, per visited pair; zeros before any step."""
        if not self.num_steps:
            return 0.0, 0.0, 0.0, 0.0
        fitted = self._coefficients  # read once: other threads ask while the engine's thread observes
        if fitted is None:
            fitted = self._coefficients = _non_negative(np.array(self._gram), np.array(self._moment)) / _SCALE
        c, g, b, a = fitted.tolist()
        return c, g, b, a

    def predict(self, plan: StepPlan) -> float:
        """Return the seconds that a step would take."""
        return sum(x * c for x, c in zip(self.features(plan), self.coefficients, strict=True))

    def predict_chunks(self, chunks: Sequence[Chunk]) -> float | None:
        """Return the seconds of steps of one chunk each; None before any step was measured."""
        if not self.num_steps:
            return None
        if not chunks:
            return 0.0
        starts, stops, sparse = (np.array(column, np.float64) for column in zip(*chunks, strict=True))
        lengths = stops - starts
        contexts = starts + (lengths + 1) / 2
        visited = lengths * np.where(sparse > 0, self._sparsity.keys(contexts), contexts)
        c, g, b, a = self.coefficients
        return float(len(chunks) * c + g * stops.sum() + b * lengths.sum() + a * visited.sum())

    def _visited(self, part: SequenceSlice, reports: Sequence[CellReport]) -> float:
        pairs = causal_pairs(part.start, part.length)
        if self._spec is None or not grid.is_sparse(self._spec, part.start, part.prompt_len):
            return pairs
        share = visited_share(part, reports)
        if share is not None:
            return share * pairs
        return part.length * float(self._sparsity.keys(np.array(pairs / part.length)))


class _Sparsity:
    """Fits the keys that a sparse row visits as a power of its context: `k = A * S ** slope`, slope from 0 to 1.

    Published budgets are the same at every length (slope 0 once they bind), adaptive ones grow. Before the first cell
    rows count as dense.
    """

    def __init__(self) -> None:
        self._sums = np.zeros(5)  # weight, x, y, x * x, x * y in logarithms, forgetting

    def observe(self, context: float, share: float) -> None:
        """Take the mean context of the rows of a slice, and the share of it they visited."""
        x, y = math.log(context), math.log(context * share)
        self._sums = _FORGET * self._sums + np.array([1.0, x, y, x * x, x * y])

    def keys(self, contexts: Floats) -> Floats:
        """Return the keys visited by rows with these mean contexts."""
        count, x, y, xx, xy = self._sums.tolist()
        if not count:
            return contexts
        prior = _SLOPE_WEIGHT * math.log(2) ** 2
        slope = (xy - x * y / count + prior * _SLOPE) / (xx - x * x / count + prior)
        slope = min(max(slope, 0.0), 1.0)
        logs = np.log(np.maximum(contexts, 1.0))
        keys: Floats = np.minimum(contexts, np.exp(y / count + slope * (logs - x / count)))
        return keys


def _non_negative(gram: Floats, moment: Floats) -> Floats:
    """Solve least squares with coefficients >= 0: solve, drop the most negative one, repeat (four unknowns at most)."""
    active: Sequence[int] = range(4)
    # Unit diagonal first: decode steps weigh 1e6 times more than chunks, which the ridge would outweigh otherwise.
    size = np.sqrt(np.diag(gram))
    size[size == 0] = 1.0
    gram, moment = gram / np.outer(size, size), moment / size
    while active:
        index = np.array(active)
        solution = np.linalg.solve(gram[np.ix_(index, index)] + _RIDGE * np.eye(len(index)), moment[index])
        if (solution >= 0).all():
            out = np.zeros(4)
            out[index] = solution / size[index]
            return out
        worst = int(index[solution.argmin()])
        active = [i for i in active if i != worst]
    return np.zeros(4)
