"""RULER's scores, and 95 % intervals around their means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import variance
from typing import Literal

_Z = 1.959964  # of a normal distribution: 95 % lie within so many standard deviations


def score(answer: str, outputs: Sequence[str], match: Literal["all", "any"] = "all") -> float:
    """Return the share of `outputs` that stand in an answer, whatever their case; of `any`, 1.0 for one of them."""
    text = answer.lower()
    hits = [output.lower() in text for output in outputs]
    return float(any(hits)) if match == "any" else sum(hits) / len(hits)


def interval(scores: Sequence[float], cluster: int = 1) -> tuple[float, float]:
    """Return Wilson's 95 % interval of the mean of scores between 0 and 1.

    It holds for right or wrong, and is too wide rather than too narrow for shares, which vary less.

    Args:
        cluster: how many scores in turn are of one haystack; the interval is that of as many independent scores as
            `design_effect` leaves.
    """
    count, mean = len(scores) / design_effect(scores, cluster), sum(scores) / len(scores)
    middle = mean + _Z**2 / (2 * count)
    reach = _Z * math.sqrt(mean * (1 - mean) / count + _Z**2 / (4 * count**2))
    scale = 1 + _Z**2 / count
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


def design_effect(values: Sequence[float], cluster: int) -> float:
    """Return how many times the variance of a mean exceeds that of independent values, from 1 to `cluster`.

    Estimated from the variance between the means of clusters, `cluster` values in turn (Kish, 1965); 1 where one
    cluster is all there is, or all values are equal: neither shows whether clusters differ.
    """
    means = [sum(values[at : at + cluster]) / cluster for at in range(0, len(values), cluster)]
    if cluster == 1 or len(means) == 1 or not (spread := variance(values)):
        return 1.0
    return min(float(cluster), max(1.0, cluster * variance(means) / spread))


def average(groups: Iterable[Sequence[float]], cluster: int = 1) -> tuple[float, float]:
    """Return the mean of the means of groups of scores, and the half-width of its 95 % interval.

    The variance of a group is that of right or wrong with two of each added (Agresti and Coull, 1998), so that a group
    that is all right is not taken for certain. Groups count as independent.

    Args:
        cluster: as of `interval`.
    """
    means, total = [], 0.0
    for scores in groups:
        independent = len(scores) / design_effect(scores, cluster)
        means.append(sum(scores) / len(scores))
        share = (means[-1] * independent + 2) / (independent + 4)
        total += share * (1 - share) / (independent + 4)
    return sum(means) / len(means), _Z * math.sqrt(total) / len(means)


def mean_of_groups(groups: Iterable[Sequence[float]], cluster: int = 1) -> tuple[float, float]:
    """Return the mean of the means of groups of differences, and the half-width of its 95 % interval.

    By a normal approximation from the spread within groups; 0 where nothing differs, or groups have one value.

    Args:
        cluster: as of `interval`.
    """
    means, total = [], 0.0
    for values in groups:
        means.append(sum(values) / len(values))
        if len(values) > 1:
            total += variance(values) / len(values) * design_effect(values, cluster)
    return sum(means) / len(means), _Z * math.sqrt(total) / len(means)


def differences(
    first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]], cluster: int = 1
) -> tuple[float, float] | None:
    """Return the mean of first minus second over the tasks both have, sample by sample, and its half-width.

    Args:
        cluster: as of `interval`.
    """
    pairs = [
        [one - other for one, other in zip(first[task], second[task], strict=True)]
        for task in first
        if task in second and len(first[task]) == len(second[task])
    ]
    return mean_of_groups(pairs, cluster) if pairs else None
