"""How far two greedy continuations of a prompt are one, where rounding alone may decide between two tokens.

A position is *tied* when the reference's logit of our token is at most `margin` below its best: then both are right,
the texts part, and the rest of the prompt is not compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Agreement:
    """Tokens that were the same; whether a tie ended it; and what is wrong, if anything is."""

    same: int
    tied: bool = False
    problem: str = ""


def agree(ours: Sequence[int], logits: torch.Tensor, margin: float) -> Agreement:
    """Compare tokens with the reference's logits `[len(ours), V]` after the same tokens.

    The logits were computed for our tokens; as long as each is the reference's best one, that is its own continuation.
    """
    for index, token in enumerate(ours):
        row = logits[index]
        best = int(row.argmax())
        if best != token:
            return _parted(index, token, best, float(row[best] - row[token]), margin)
    return Agreement(len(ours))


def agree_with_text(
    ours: Sequence[int], theirs: Sequence[int], best: Sequence[dict[int, float]], margin: float
) -> Agreement:
    """Compare tokens with those that another program chose.

    Args:
        best: log-probabilities of the program's best tokens at each of its positions.
    """
    for index, (token, other) in enumerate(zip(ours, theirs, strict=False)):
        if token != other:
            known = best[index]
            gap = known[other] - known[token] if token in known else float("inf")
            return _parted(index, token, other, gap, margin)
    if len(ours) != len(theirs):
        return Agreement(min(len(ours), len(theirs)), problem=f"{len(ours)} tokens, not {len(theirs)}")
    return Agreement(len(ours))


def _parted(index: int, token: int, other: int, gap: float, margin: float) -> Agreement:
    if gap <= margin:
        return Agreement(index, tied=True)
    return Agreement(index, problem=f"token {index}: {token}, not {other}, whose logit is {gap:.4g} above")


def summary(agreements: Iterable[Agreement]) -> str:
    """Return one line for the output of a test."""
    found = list(agreements)
    ties = sum(one.tied for one in found)
    return f"{len(found)} prompts, {sum(one.same for one in found)} tokens the same, {ties} ended by a tie"
