"""How long a step takes: `t = c + g * S + b * T + a * visited`, fitted online from measured steps.

Per stage: `T` tokens of the step, `S` longest context it touches, `visited` query-key pairs. The model sizes nothing by
itself; it answers "how long will the rest of this prefill take".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from protos.messages import StepPlan

_FORGET = 0.98  # weight of the past at each new step: about 50 steps are remembered
_SCALE = np.array([1.0, 1e5, 1e3, 1e8])  # typical sizes of (1, S, T, visited): keeps the equations well scaled
_RIDGE = 1e-6


def features(plan: StepPlan) -> np.ndarray:
    """(1, S, T, visited pairs) of a plan."""
    context = max((part.start + part.length for part in plan.slices), default=0)
    visited = sum(part.length * part.start + part.length * (part.length + 1) // 2 for part in plan.slices)
    return np.array([1.0, context, plan.num_tokens, visited])


class LatencyModel:
    """Four non-negative coefficients by recursive least squares with forgetting."""

    def __init__(self) -> None:
        self._gram = np.zeros((4, 4))
        self._moment = np.zeros(4)
        self._coefficients: np.ndarray | None = None
        self.num_steps = 0

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """Take the measured time of a step (of the slowest stage)."""
        x = features(plan) / _SCALE
        weight = 1.0 / max(seconds, 1e-6)  # errors count relative to the step: decode steps matter as much as chunks
        self._gram = _FORGET * self._gram + weight**2 * np.outer(x, x)
        self._moment = _FORGET * self._moment + weight**2 * x * seconds
        self._coefficients = None
        self.num_steps += 1

    @property
    def coefficients(self) -> tuple[float, float, float, float]:
        """(c, g, b, a) in seconds, seconds per context token, per token, per visited pair; zeros before any step."""
        if not self.num_steps:
            return 0.0, 0.0, 0.0, 0.0
        fitted = self._coefficients  # once: other threads ask while the engine's observes
        if fitted is None:
            fitted = self._coefficients = _non_negative(self._gram, self._moment) / _SCALE
        c, g, b, a = fitted.tolist()
        return c, g, b, a

    def predict(self, plan: StepPlan) -> float:
        """Seconds a step would take."""
        return float(features(plan) @ np.array(self.coefficients))

    def predict_prefill(self, start: int, stop: int, chunk: int) -> float | None:
        """Seconds for a prefill of positions `start .. stop - 1` in chunks; None before any step was measured."""
        if not self.num_steps:
            return None
        starts = np.arange(start, stop, chunk, dtype=np.float64)
        if not len(starts):
            return 0.0
        lengths = np.minimum(chunk, stop - starts)
        visited = lengths * starts + lengths * (lengths + 1) / 2
        c, g, b, a = self.coefficients
        return float(len(starts) * c + g * (starts + lengths).sum() + b * lengths.sum() + a * visited.sum())


def _non_negative(gram: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """Least squares with coefficients >= 0: solve, drop the most negative one, repeat (four unknowns at most)."""
    active: Sequence[int] = range(4)
    # Unit diagonal first: short decode steps weigh 1e6 times more than chunks, and the ridge must not hide the chunks.
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
