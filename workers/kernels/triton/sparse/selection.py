"""The largest sums of every head, without a sort: a threshold from histograms of float bits, then one ordered pass.

Results equal `workers.sparse.selection.top_indices` exactly: ties go to the lower index, NaN counts as infinity. One
program does a row (a head of a cell), so that nothing has to be added up between programs.

Legend: `C` cells, `H` query heads, `S` keys a cell sees, `N` room for keys, `W = N // 32` words, `V` room for columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from workers.kernels.triton.sparse.cells import NUM_CELL_FIELDS, CellTables

_CELL_FIELDS = tl.constexpr(NUM_CELL_FIELDS)
_INFINITY = tl.constexpr(0x7F800000)  # its bits
_NOTHING = tl.constexpr(0x7FFFFFFF)  # a threshold that no value exceeds
_DENSITY, _COLUMN = tl.constexpr(0x7FFFFFFE), tl.constexpr(1)  # bits of the ranks of adaptive budgets
_BLOCK, _WARPS = 2048, 16  # values that a program reads at a time


@triton.jit
def load_ranks(
    scores: tl.tensor, index: tl.tensor, first: tl.tensor, stop: tl.tensor, ADAPTIVE: tl.constexpr
) -> tl.tensor:
    """Load scores as integers in their order: the bits of the float; -1 outside of `first .. stop - 1`.

    For `ADAPTIVE` budgets they are rounded to 23 bits, and the last bit is set: these are columns.
    """
    score = tl.load(scores + index, mask=index < stop, other=0.0)
    bits = tl.where(score > 0, score, 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(score != score, _INFINITY, bits)
    if ADAPTIVE:
        bits = (bits & _DENSITY) | _COLUMN
    return tl.where((index >= first) & (index < stop), bits, -1)


@triton.jit
def threshold_kernel(
    thresholds: tl.tensor, quotas: tl.tensor, scores: tl.tensor, counts: tl.tensor, cells: tl.tensor, width: tl.tensor,
    HEADS: tl.constexpr, FORCED: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Find the score of the last index that a row keeps, 8 bits at a time.

    A row `(cell, head)` keeps its first `FORCED` indices, those whose rank exceeds `thresholds` `[C * H]`, and the
    first `quotas` `[C * H]` of equal rank; together `counts` `[C * H]`, but at least `FORCED` and at most `S`.
    """
    row = tl.program_id(0)
    seen = tl.load(cells + row // HEADS * _CELL_FIELDS)
    forced = tl.minimum(FORCED, seen)
    wanted = tl.minimum(tl.maximum(tl.load(counts + row), forced), seen) - forced
    values = scores + row.to(tl.int64) * width
    prefix, threshold = row * 0, tl.where(wanted == 0, _NOTHING, -1)
    if (wanted > 0) & (wanted < seen - forced):
        bins = tl.arange(0, 256)
        for level in range(4):
            shift = 24 - 8 * level
            histogram = tl.zeros([256], tl.int32)
            for at in tl.range(0, seen, BLOCK, num_stages=3):
                ranks = load_ranks(values, at + tl.arange(0, BLOCK), forced, seen, False)
                is_near = (ranks >= 0) & ((ranks >> shift >> 8) == prefix)
                histogram += tl.histogram((ranks >> shift) & 255, 256, mask=is_near)
            from_here = tl.sum(histogram) - tl.cumsum(histogram) + histogram  # values of this bin and higher ones
            chosen = tl.sum((from_here >= wanted).to(tl.int32)) - 1
            wanted -= tl.sum(tl.where(bins > chosen, histogram, 0))
            prefix = prefix * 256 + chosen
        threshold = prefix
    tl.store(thresholds + row, threshold)
    tl.store(quotas + row, wanted)


@triton.jit
def pack_bits(kept: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Return words of 32 bits `[BLOCK // 32]`, the bit of the first value lowest."""
    bits = tl.reshape(kept.to(tl.int32), (BLOCK // 32, 32)) << tl.arange(0, 32)[None, :]
    return tl.sum(bits, 1)


@triton.jit(do_not_specialize=["room"])
def compact_kernel(
    words: tl.tensor, indices: tl.tensor, totals: tl.tensor, masses: tl.tensor, scores: tl.tensor,
    thresholds: tl.tensor, quotas: tl.tensor, done: tl.tensor, cells: tl.tensor, width: tl.tensor, room: tl.tensor,
    HEADS: tl.constexpr, FORCED: tl.constexpr, ADAPTIVE: tl.constexpr, LISTED: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Write what a row keeps, program `(cell, head)`.

    Args:
        words: `[C * H, W]`, a bit for every index.
        indices: `[C * H, V]`, the indices in ascending order; with `LISTED` only. `room` is `V`; the rest is dropped.
        totals, masses: `[C * H]`, the number of indices, and the sum of their scores.
        done: `[C * H]`, rows to leave as they are; with `ADAPTIVE` only.
    """
    row = tl.program_id(0)
    seen = tl.load(cells + row // HEADS * _CELL_FIELDS)
    threshold, quota = tl.load(thresholds + row), tl.load(quotas + row)
    forced = tl.minimum(FORCED, seen)
    values = scores + row.to(tl.int64) * width
    equal, total, mass = row * 0, row * 0, tl.zeros([BLOCK], tl.float32)
    if ADAPTIVE:  # noqa: SIM102
        if tl.load(done + row) != 0:
            return
    for at in tl.range(0, width, BLOCK, num_stages=3):
        index = at + tl.arange(0, BLOCK)
        ranks = load_ranks(values, index, forced, seen, ADAPTIVE)
        is_above = (ranks > threshold) & (ranks >= 0) | (index < forced)
        is_equal = (ranks == threshold) & (ranks >= 0)
        before = tl.cumsum(is_above.to(tl.int32) + (is_equal.to(tl.int32) << 16))  # two counts below 2**15
        ordinal = equal + (before >> 16)  # of those that are equal, from 1
        kept = is_above | (is_equal & (ordinal <= quota))
        tl.store(
            words + row.to(tl.int64) * (width // 32) + at // 32 + tl.arange(0, BLOCK // 32), pack_bits(kept, BLOCK),
            mask=at // 32 + tl.arange(0, BLOCK // 32) < width // 32,
        )  # fmt: skip
        score = tl.load(values + index, mask=kept, other=0.0)
        mass += score
        if LISTED:
            place = total + (before & 65535) + tl.minimum(ordinal, quota) - tl.minimum(equal, quota) - 1
            tl.store(indices + row.to(tl.int64) * room + place, index, mask=kept & (place < room))
        total += tl.sum(kept.to(tl.int32))
        equal += tl.sum(is_equal.to(tl.int32))
    tl.store(totals + row, total)
    tl.store(masses + row, tl.sum(mass))


@triton.jit
def mass_kernel(masses: tl.tensor, words: tl.tensor, scores: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Sum the scores of a row whose bits are set, program `(cell, head)`: `masses` `[C * H]`."""
    row = tl.program_id(0)
    mass = tl.zeros([BLOCK], tl.float32)
    for at in range(0, width, BLOCK):
        index = at + tl.arange(0, BLOCK)
        word = tl.load(words + row.to(tl.int64) * (width // 32) + index // 32, mask=index < width, other=0)
        mass += tl.load(scores + row.to(tl.int64) * width + index, mask=(word >> (index % 32)) & 1 != 0, other=0.0)
    tl.store(masses + row, tl.sum(mass))


@dataclass(frozen=True, slots=True)
class Kept:
    """What the heads keep of one kind, columns or offsets.

    `words` `[C, H, W]` int32 has a bit an index; `indices` `[C, H, V]` int32 are ascending (None where they are not
    listed), of which `totals` `[C, H]` int32 are set; `masses` `[C, H]` float32 are the sums of their scores.
    """

    words: torch.Tensor
    indices: torch.Tensor | None
    totals: torch.Tensor
    masses: torch.Tensor


def thresholds(
    scores: torch.Tensor, counts: torch.Tensor, forced: int, tables: CellTables, block: int = _BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rank thresholds and quotas `[C, H]` int32 for the `counts` `[C, H]` int32 largest of `scores` `[C, H, N]`.

    The first `forced` indices of every row are kept beside, and count.
    """
    found = torch.empty_like(counts), torch.empty_like(counts)
    rows, heads = counts.numel(), counts.shape[1]
    threshold_kernel[(rows,)](
        *found, scores, counts, tables.cells, tables.width, HEADS=heads, FORCED=forced, BLOCK=block, num_warps=_WARPS
    )
    return found


def compact(
    scores: torch.Tensor, found: tuple[torch.Tensor, torch.Tensor], forced: int, tables: CellTables, room: int = 0,
    block: int = _BLOCK,
) -> Kept:  # fmt: skip
    """Write the indices of `scores` `[C, H, N]` that lie above thresholds, or equal them within quotas.

    Args:
        room: `V`; 0: bits only.
    """
    kept = _empty(scores, room)
    _compact(kept, scores, found, None, forced, tables, block)
    return kept


def compact_proposal(
    before: Kept | None, scores: torch.Tensor, found: tuple[torch.Tensor, torch.Tensor], done: torch.Tensor,
    forced: int, tables: CellTables, block: int = _BLOCK,
) -> Kept:  # fmt: skip
    """Write the columns of a proposal of adaptive budgets, in place of those of the one `before`.

    Heads that are `done` `[C, H]` keep theirs. There is room for all columns.
    """
    kept = before or _empty(scores, scores.shape[2])
    _compact(kept, scores, found, done, forced, tables, block)
    return kept


def _empty(scores: torch.Tensor, room: int) -> Kept:
    num_cells, heads, width = scores.shape
    words = torch.empty((num_cells, heads, width // 32), dtype=torch.int32, device=scores.device)
    indices = torch.zeros((num_cells, heads, room), dtype=torch.int32, device=scores.device) if room else None
    totals = torch.empty((num_cells, heads), dtype=torch.int32, device=scores.device)
    return Kept(words, indices, totals, torch.empty_like(totals, dtype=torch.float32))


def _compact(
    kept: Kept, scores: torch.Tensor, found: tuple[torch.Tensor, torch.Tensor], done: torch.Tensor | None, forced: int,
    tables: CellTables, block: int,
) -> None:  # fmt: skip
    num_cells, heads, width = scores.shape
    room = 0 if kept.indices is None else kept.indices.shape[2]
    compact_kernel[(num_cells * heads,)](
        kept.words, kept.indices, kept.totals, kept.masses, scores, *found, done, tables.cells, width, room,
        HEADS=heads, FORCED=forced, ADAPTIVE=done is not None, LISTED=room > 0, BLOCK=block, num_warps=_WARPS,
    )  # fmt: skip


def kept_masses(words: torch.Tensor, scores: torch.Tensor, block: int = _BLOCK) -> torch.Tensor:
    """Sum the `scores` `[C, H, N]` whose bits `words` `[C, H, W]` are set: `[C, H]` float32."""
    masses = torch.empty(scores.shape[:2], dtype=torch.float32, device=scores.device)
    mass_kernel[(masses.numel(),)](masses, words, scores, scores.shape[2], BLOCK=block, num_warps=_WARPS)
    return masses
