"""RULER's scores, and 95 % intervals around their means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

_Z = 1.959964  # of a normal distribution: 95 % lie within so many standard deviations


def score(answer: str, outputs: Sequence[str], match: Literal["all", "any"] = "all") -> float:
    """Return the share of `outputs` that stand in an answer, whatever their case; of `any`, 1.0 for one of them."""
    text = answer.lower()
    hits = [output.lower() in text for output in outputs]
    return float(any(hits)) if match == "any" else sum(hits) / len(hits)


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """Return Wilson's 95 % interval of the mean of scores between 0 and 1.

    It holds for right or wrong, and is too wide rather than too narrow for shares, which vary less.
    """
    count, mean = len(scores), sum(scores) / len(scores)
    middle = mean + _Z**2 / (2 * count)
    reach = _Z * math.sqrt(mean * (1 - mean) / count + _Z**2 / (4 * count**2))
    scale = 1 + _Z**2 / count
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


def average(groups: Iterable[Sequence[float]]) -> tuple[float, float]:
    """Return the mean of the means of groups of scores, and the half-width of its 95 % interval.

    The variance of a group is that of right or wrong with two of each added (Agresti and Coull, 1998), so that a group
    that is all right is not taken for certain.
    """
    means, variance = [], 0.0
    for scores in groups:
        count = len(scores) + 4
        share = (sum(scores) + 2) / count
        means.append(sum(scores) / len(scores))
        variance += share * (1 - share) / count
    return sum(means) / len(means), _Z * math.sqrt(variance) / len(means)


def mean_of_groups(groups: Iterable[Sequence[float]]) -> tuple[float, float]:
    """Return the mean of the means of groups of differences, and the half-width of its 95 % interval.

    By a normal approximation from the spread within groups; 0 where nothing differs, or groups have one value.
    """
    means, variance = [], 0.0
    for values in groups:
        mean = sum(values) / len(values)
        means.append(mean)
        if len(values) > 1:
            variance += sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)
    return sum(means) / len(means), _Z * math.sqrt(variance) / len(means)


def differences(
    first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]]
) -> tuple[float, float] | None:
    """Return the mean of first minus second over the tasks both have, sample by sample, and its half-width."""
    pairs = [
        [one - other for one, other in zip(first[task], second[task], strict=True)]
        for task in first
        if task in second and len(first[task]) == len(second[task])
    ]
    return mean_of_groups(pairs) if pairs else None
