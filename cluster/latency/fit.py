"""Least squares of measured steps: what each unit of work costs, drawn to usual costs where steps say little."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cluster.latency.step_work import UNITS

Costs = tuple[float, ...]  # of each feature: seconds of each of UNITS
Floats = NDArray[np.float64]

_FORGET = 0.98  # weight of the past at each new step of a kind: a memory of about 50 steps
_SPREAD = 4.0  # measured over expected time, or the opposite, beyond which a step counts less or not more
# A short step is late if it takes more than `_LATE` times what is expected, once `_KNOWN` steps of its kind were seen.
# Bursts of some ten late steps pass. Where half of the steps are late, the machine has become slower.
_LATE, _KNOWN, _LONGEST = 2.0, 50, 0.5  # seconds; a longer step is none of a burst
# Of the first `_KNOWN` steps one counts in full while it differs from what is expected by at most this share, or half
# of what others do; less beyond (Huber's weights): one late step would move the end of a long prefill by a tenth. Not
# after a step that is `_FAR` times as far off, as where the machine has become slower, nor before some steps are seen.
_NEAR, _USUAL_SHARE, _FAR, _SOME = 0.05, 0.5, 3.0, 2
_FEW = 3  # late steps in a row that count; of more the first
_RECENT, _MOST = 30, 16  # steps, and late ones among them that are more than a burst
_CHANGED = 0.02  # weight of the past then: about one step, which still tells of other steps
_RIDGE = 1e-6
# Ridge of a normal prior: (scatter of steps / error of usual costs) ** 2. Quiet steps scatter by 12 to 22 %,
# rates of a table may be wrong by a factor of two, 0.7 in logarithms: (0.15 / 0.7) ** 2. So a cost that differs from
# the usual one by its own size counts as one step that is 22 % off.
_DRAW = 0.05
_ROUNDS = 3  # of solving, as the draw to a cost depends on it


class _Step(NamedTuple):
    x: Costs
    seconds: float
    expected: float
    is_late: bool


def _difference(step: _Step) -> float:
    """Return by which share of the expected time a step differs from it."""
    return abs(step.seconds - step.expected) / max(step.expected, 1e-9)


class Sums:
    """Weighted sums of products of features, forgetting, and the number of steps behind them."""

    def __init__(self, size: int = len(UNITS), is_even: bool = False) -> None:
        """
        Args:
            size: the number of features.
            is_even: first steps count in full, however far off: of several stages in turn.
        """
        self.gram = [[0.0] * size for _ in range(size)]  # lists, as numpy costs more than so many sums
        self.moment = [0.0] * size
        self.steps = 0
        self._is_even = is_even
        self._recent: deque[_Step] = deque(maxlen=_RECENT)
        self._run = 0  # late steps in a row, up to the last one: they do not count yet

    def add(self, x: Costs, seconds: float, expected: float) -> bool:
        """Take one step; returns whether it shows that the machine has become slower: the past then counts little.

        Late steps here and there count, as on a machine that is busy now and then; of a burst only the first does.
        """
        self.steps += 1
        step = _Step(x, seconds, expected, self.steps > _KNOWN and _LATE * expected < seconds < _LONGEST)
        self._recent.append(step)
        late = [each for each in self._recent if each.is_late]
        if len(late) >= _MOST:
            self.gram = [[_CHANGED * old for old in row] for row in self.gram]
            self.moment = [_CHANGED * old for old in self.moment]
            for each in late:
                self._count(each._replace(expected=each.seconds))
            self._recent.clear()
            self._run = 0
            return True
        if step.is_late:
            self._run += 1
            return False
        run = list(self._recent)[-1 - self._run : -1]
        for each in (*(run if len(run) <= _FEW else run[:1]), step):
            self._count(each)
        self._run = 0
        return False

    def _count(self, step: _Step) -> None:
        """Add a step; errors count relative to the expected time, so that decode steps matter as much as chunks.

        Relative to the measured one the fastest steps would count most: a busy machine would be predicted as idle.
        """
        x, seconds, expected, _ = step
        weight = max(min(max(expected, seconds / _SPREAD), seconds * _SPREAD), 1e-6) ** -2
        if self.steps <= _KNOWN and len(self._recent) > _SOME and not self._is_even:
            near = max(_NEAR, _USUAL_SHARE * median(map(_difference, self._recent)))
            if _difference(self._recent[-2]) < _FAR * near:
                weight *= min(1.0, near / max(_difference(step), near))
        self.gram = [
            [_FORGET * old + weight * a * b if a else _FORGET * old for old, b in zip(row, x, strict=True)]
            for row, a in zip(self.gram, x, strict=True)
        ]
        self.moment = [_FORGET * old + weight * a * seconds for old, a in zip(self.moment, x, strict=True)]

    def level(self, costs: Costs) -> float:
        """Return measured over fitted seconds of the first steps, of which late ones count less in `costs`; then 1.

        So late chunks here and there tell how long a prefill takes, and not how its steps grow with the context.
        """
        counted = list(self._recent)[max(0, _SOME + len(self._recent) - self.steps) :]
        if self.steps > _KNOWN or self._is_even or not counted:
            return 1.0
        fitted = sum(sum(x * cost for x, cost in zip(step.x, costs, strict=True)) for step in counted)
        return sum(step.seconds for step in counted) / fitted if fitted > 0 else 1.0

    def absorb(self, other: Sums) -> None:
        """Add the steps of another run."""
        self.gram = (np.array(self.gram) + np.array(other.gram)).tolist()
        self.moment = (np.array(self.moment) + np.array(other.moment)).tolist()
        self.steps += other.steps

    def to_json(self) -> dict[str, Any]:
        return {"gram": self.gram, "moment": self.moment, "steps": self.steps}

    @classmethod
    def from_json(cls, value: object, size: int = len(UNITS), is_even: bool = False) -> Sums:
        """Return the sums that `to_json` has written; others as of the class. Raises ValueError."""
        if not isinstance(value, Mapping) or not isinstance(value.get("steps"), int) or value["steps"] < 0:
            raise ValueError("it has no sums")
        sums = cls(size, is_even)
        sums.gram, sums.steps = numbers(value.get("gram"), (size, size)).tolist(), value["steps"]
        sums.moment = numbers(value.get("moment"), (size,)).tolist()
        return sums


def numbers(value: object, shape: tuple[int, ...]) -> Floats:
    """Return finite numbers of a shape. Raises ValueError."""
    try:
        found = np.array(value, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError("it has no numbers") from error
    if found.shape != shape or not np.isfinite(found).all():
        raise ValueError(f"it has not the finite numbers of shape {shape}")
    return found


def fit(parts: Sequence[Sums], usual: Costs | None = None) -> Costs:
    """Return the cost of each unit, at least 0, that explains the steps of all parts best.

    Without `usual`, units that no step had cost 0. With it, the fit minimises the sum of squared relative errors, plus
    `_DRAW * ((c - p) / max(c, p)) ** 2` of each unit, where `p` are the usual costs times the one factor that explains
    the steps best. So only ratios of usual costs matter, and one that is far too low holds nothing back: what many
    steps determine is fitted to them, what they leave open keeps its usual ratio to the rest.
    """
    gram = np.array([part.gram for part in parts]).sum(0)
    moment = np.array([part.moment for part in parts]).sum(0)
    solution = prior = np.zeros(len(moment))
    if usual is None or not (scale := np.array(usual) @ gram @ np.array(usual)) > 0:
        return tuple(_non_negative(gram, moment).tolist())
    prior = np.array(usual) * max(float(np.array(usual) @ moment / scale), 1e-30)
    for _ in range(_ROUNDS):
        draw = _DRAW / np.maximum(solution, prior) ** 2
        solution = _non_negative(gram + np.diag(draw), moment + draw * prior)
    return tuple(solution.tolist())


def _non_negative(gram: Floats, moment: Floats) -> Floats:
    """Solve least squares with coefficients >= 0: solve, drop the most negative one, repeat."""
    active: Sequence[int] = range(len(moment))
    # Unit diagonal first: decode steps weigh 1e6 times more than chunks, which the ridge would outweigh otherwise.
    size = np.sqrt(np.diag(gram))
    size[size == 0] = 1.0
    gram, moment = gram / np.outer(size, size), moment / size
    while active:
        index = np.array(active)
        solution = np.linalg.solve(gram[np.ix_(index, index)] + _RIDGE * np.eye(len(index)), moment[index])
        if (solution >= 0).all():
            out = np.zeros(len(moment))
            out[index] = solution / size[index]
            return out
        worst = int(index[solution.argmin()])
        active = [i for i in active if i != worst]
    return np.zeros(len(moment))
