"""How the token budget of a step is shared among requests, and where the grid of a prompt lets it be cut.

Pure arithmetic. Dense rows may be cut anywhere but at most up to the next border of a DCA chunk; sparse rows come in
whole cells (`protos.model.grid`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from protos.model import grid
from protos.model.spec import ModelSpec


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


class Chunk(NamedTuple):
    """Positions `start .. stop - 1` of one prompt in one step."""

    start: int
    stop: int
    sparse: bool = False


@dataclass(frozen=True, slots=True)
class Stand:
    """Where a request stands when a step is cut: its next position, prompt length, share and saved-up tokens."""

    position: int
    prompt_len: int
    share: int
    credit: int = 0


def cut(spec: ModelSpec | None, stands: Sequence[Stand]) -> tuple[list[int], list[int]]:
    """Turn shares into lengths that the grid allows; returns lengths and new credits.

    A cell is never cut, so a sparse prompt may get more than its share of one step and none of the next: shares are
    saved up as credit, and the sparse prompt with the most of it goes first. One of them always goes, so a step may
    exceed its budget, but by one cell at most; what decodes and dense prompts take does not depend on grid.

    Args:
        spec: None: plain dense attention, nothing is cut.
        stands: in order of arrival, which breaks ties.
    """
    lengths, credits = [s.share for s in stands], [0] * len(stands)
    if spec is None:
        return lengths, credits
    waiting = []
    for index, stand in enumerate(stands):
        if stand.share and grid.is_sparse(spec, stand.position, stand.prompt_len):
            waiting.append(index)
        else:
            border = grid.next_cut(spec, stand.position, stand.prompt_len)
            lengths[index] = stand.share if border is None else min(stand.share, border - stand.position)
            credits[index] = stand.credit if not stand.share else 0
    left = sum(stands[index].share for index in waiting)
    limit = grid.largest_cell(spec)
    waiting.sort(key=lambda index: (-stands[index].credit - stands[index].share, index))
    for turn, index in enumerate(waiting):
        stand = stands[index]
        wanted = min(left, stand.share + stand.credit)
        length = grid.whole_cells(spec, stand.position, wanted, stand.prompt_len)
        lengths[index] = length if length <= max(wanted, stand.share) or not turn else 0
        left = max(0, left - lengths[index])
        saved = stand.credit + stand.share - lengths[index]
        credits[index] = min(max(saved, -limit), limit) if len(waiting) > 1 else 0
    return lengths, credits


def chunks(spec: ModelSpec | None, start: int, stop: int, prompt_len: int, budget: int) -> Iterator[Chunk]:
    """The steps of a request that computes positions `start .. stop - 1` alone, with the whole budget of each."""
    while start < stop:
        (length,), _ = cut(spec, [Stand(start, prompt_len, min(budget, stop - start))])
        sparse = spec is not None and grid.is_sparse(spec, start, prompt_len)
        yield Chunk(start, start + length, sparse)
        start += length


def num_steps(tokens: int, budget: int, spec: ModelSpec | None = None) -> int:
    """Steps a prompt of `tokens` takes when it has the whole budget of each."""
    if spec is None:
        return -(-tokens // budget)
    return sum(1 for _ in chunks(spec, 0, tokens, tokens, budget))
