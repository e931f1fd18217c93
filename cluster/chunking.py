"""How the token budget of a step is shared among requests. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence


def share_budget(budget: int, remaining: Sequence[int]) -> list[int]:
    """Tokens each request computes in the next step; requests stand in order of arrival.

    Single tokens (decoding) come first, each costs one; beside a prefill they leave at least one token. Of the rest the
    oldest prefill gets at least half, so that a long job always progresses; what it leaves goes to the others, shortest
    first, so that short jobs do not wait for long ones. A step that others share stays short when they leave some: only
    alone does the oldest take it all.

    Args:
        budget: most tokens in the step, at least 1.
        remaining: tokens each request still has to compute (0: nothing to do).
    """
    shares = [0] * len(remaining)
    prefills = [index for index, count in enumerate(remaining) if count > 1]
    decodes = [index for index, count in enumerate(remaining) if count == 1]
    left = budget
    for index in decodes[: max(1, budget - 1) if prefills else budget]:
        shares[index] = 1
        left -= 1
    if not prefills or not left:
        return shares
    oldest = prefills[0]
    shares[oldest] = min(remaining[oldest], -(-left // 2))
    left -= shares[oldest]
    for index in sorted(prefills[1:], key=lambda i: (remaining[i], i)):
        shares[index] = min(remaining[index], left)
        left -= shares[index]
    if len(prefills) == 1:
        shares[oldest] += min(left, remaining[oldest] - shares[oldest])
    return shares


def num_steps(tokens: int, budget: int) -> int:
    """Steps a prefill of `tokens` takes when it has the whole budget."""
    return -(-tokens // budget)
