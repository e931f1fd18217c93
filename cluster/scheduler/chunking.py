"""Share the tokens of a step among requests, and fit the shares to the grid of each prompt.

Pure arithmetic. Dense rows may be cut anywhere but at most up to the next border of a DCA chunk, and in a pipeline so
that steps take equal times; sparse rows come in whole cells (`protos.model.grid`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from protos.model import grid
from protos.model.spec import ModelSpec

_LEAST_PART = 8  # of the budget: the shortest dynamic chunk
_CHUNK_ROWS = 64  # dynamic chunks have a multiple


def share_budget(budget: int, remaining: Sequence[int]) -> list[int]:
    """Return the tokens that each request is granted in the next step.

    Single tokens (decoding) come first; beside a prefill they leave at least one token. Of the rest the oldest prefill
    gets at least half, so that a long prompt always progresses; what it leaves goes to the others, shortest first, so
    that short prompts do not wait for long ones. A step that others share stays short when they leave some: only alone
    does the oldest take it all.

    Args:
        budget: the most tokens of a step, at least 1.
        remaining: tokens each request still has to compute (0: nothing to do), in order of arrival.
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
class PrefillShare:
    """One request's input to `fit_to_grid`.

    Next position, prompt length, tokens granted this step, and the deficit carried over (deficit round robin,
    Shreedhar and Varghese 1995).
    """

    position: int
    prompt_len: int
    granted: int
    deficit: int = 0


@dataclass(frozen=True, slots=True)
class DynamicChunks:
    """Dense steps of a pipeline that take equal times: fewer rows where the context is long.

    A prompt takes the sum of its steps and, for every stage but one, the longest of them. With steps of equal length
    that is the last. Here a step of `1 / stages` of the way into the prompt and `budget` rows is the longest: those
    before have as many rows, those behind fewer, as far down as an eighth.

    `row` is the work of a row without attention, `pair` that of a query-key pair, in one unit.
    """

    stages: int
    budget: int
    row: int
    pair: int

    def most(self, position: int, prompt_len: int) -> int:
        """Return the most rows of a step of a prompt that begins at `position`."""
        longest = self.budget * (self.row + self.pair * prompt_len / self.stages)
        alone = self.row + self.pair * position  # of the first row; the later ones see more
        rows = (math.sqrt(alone * alone + 2 * self.pair * longest) - alone) / self.pair
        whole = max(int(rows), self.budget // _LEAST_PART) // _CHUNK_ROWS * _CHUNK_ROWS
        return min(self.budget, max(whole, _CHUNK_ROWS))


def fit_to_grid(
    spec: ModelSpec | None, shares: Sequence[PrefillShare], dynamic: DynamicChunks | None = None
) -> tuple[list[int], list[int]]:
    """Return the lengths that the grid allows, and the new deficits.

    A cell is never cut, so a sparse prompt may get more than it is granted in one step and nothing in the next: the
    difference is its deficit, and the sparse prompt with the largest goes first. One of them always goes, so a step
    may exceed its budget, but by one cell at most; decoding and dense prompts always get what they are granted.

    Args:
        spec: None: plain dense attention, which has no grid.
        shares: in order of arrival, which breaks ties.
        dynamic: limits of dense steps; None: they have none.
    """
    granted = [share.granted for share in shares]
    if dynamic is not None:
        granted = [min(share.granted, dynamic.most(share.position, share.prompt_len)) for share in shares]
    lengths, deficits = list(granted), [0] * len(shares)
    if spec is None:
        return lengths, deficits
    sparse = []
    for index, share in enumerate(shares):
        if share.granted and grid.is_sparse(spec, share.position, share.prompt_len):
            sparse.append(index)
        else:
            border = grid.next_cut(spec, share.position, share.prompt_len)
            lengths[index] = granted[index] if border is None else min(granted[index], border - share.position)
            deficits[index] = share.deficit if not share.granted else 0
    left = sum(shares[index].granted for index in sparse)
    limit = grid.largest_cell(spec)
    sparse.sort(key=lambda index: (-shares[index].deficit - shares[index].granted, index))
    for turn, index in enumerate(sparse):
        share = shares[index]
        due = share.granted + share.deficit
        wanted = min(left, due)
        length = grid.whole_cells(spec, share.position, wanted, share.prompt_len)
        lengths[index] = length if turn == 0 or length <= max(wanted, share.granted) else 0
        left = max(0, left - lengths[index])
        deficits[index] = min(max(due - lengths[index], -limit), limit) if len(sparse) > 1 else 0
    return lengths, deficits


def chunks(
    spec: ModelSpec | None, start: int, stop: int, prompt_len: int, budget: int, dynamic: DynamicChunks | None = None
) -> Iterator[Chunk]:
    """Yield the steps of a request that computes positions `start .. stop - 1` alone, with the whole budget of each."""
    while start < stop:
        (length,), _ = fit_to_grid(spec, [PrefillShare(start, prompt_len, min(budget, stop - start))], dynamic)
        yield Chunk(start, start + length, spec is not None and grid.is_sparse(spec, start, prompt_len))
        start += length
