"""Adaptive budgets on a GPU: the search of `workers.sparse.adaptive.AdaptiveSearch` for all heads, without a sort.

Candidates (columns, and groups of 64 offsets) are ranked by new mass over cost. The list of a proposal is a threshold
of ranks: the highest one whose candidates are enough in mass and in number, found four bits at a time. A step of the
search is one launch for all heads; those that are done leave it at once. The host decides how many steps there are.

Legend: `C` cells, `H` query heads, `S` keys a cell sees, `N` room for keys, `U = N // 64` groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from workers.kernels.triton.sparse.cells import NUM_CELL_FIELDS, CellTables
from workers.kernels.triton.sparse.selection import Kept, load_ranks

GROUP = 64  # offsets
PATIENCE = 4  # proposals after which each one is longer by an eighth at least
_CELL_FIELDS = tl.constexpr(NUM_CELL_FIELDS)
_DENSITY, _COLUMN = tl.constexpr(0x7FFFFFFE), tl.constexpr(1)  # bits of a rank
_NOTHING = tl.constexpr(0x7FFFFFFF)  # a threshold that no rank exceeds
_PATIENCE, _GROUP = tl.constexpr(PATIENCE), tl.constexpr(GROUP)
_BLOCK = 1024


@triton.jit
def _load_groups(groups: tl.tensor, index: tl.tensor, count: tl.tensor) -> tl.tensor:
    """Load ranks of groups of offsets; -1 from `count` on."""
    return tl.where(index < count, load_ranks(groups, index, 0, count, False) & _DENSITY, -1)


@triton.jit
def _add_candidates(
    number: tl.tensor, mass: tl.tensor, ranks: tl.tensor, prefix: tl.tensor, shift: tl.tensor, cost: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Add candidates of 16 ranges of ranks from `prefix` on: how many have a rank from the begin of each, and mass."""
    is_near = (ranks >= prefix) & ((ranks - prefix) >> shift < 16)
    if tl.sum(is_near.to(tl.int32)) > 0:
        place = tl.where(is_near, (ranks - prefix) >> shift, -1)
        reached = place[None, :] >= tl.arange(0, 16)[:, None]
        density = (ranks & _DENSITY).to(tl.float32, bitcast=True)
        number += tl.sum(reached.to(tl.int32), 1)
        mass += tl.sum(tl.where(reached, density[None, :] * cost, 0.0), 1).to(tl.float64)
    return number, mass


@triton.jit(do_not_specialize=["step", "is_last"])
def propose_kernel(
    thresholds: tl.tensor, quotas: tl.tensor, lengths: tl.tensor, sums: tl.tensor, done: tl.tensor, columns: tl.tensor,
    groups: tl.tensor, base: tl.tensor, kept: tl.tensor, goal: tl.tensor, cells: tl.tensor, step: tl.tensor,
    is_last: tl.tensor, width: tl.tensor, HEADS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Take over what the proposal keeps, and propose a longer list unless that is enough: program `(cell, head)`.

    Args:
        thresholds, quotas, lengths, sums, done: `[C * H]`, the proposal: candidates above a rank, and some that equal
            it; their number; their mass (float64), forced pairs included; and whether the search is over.
        columns, groups: new masses of columns `[C, H, N]`, and of groups by offset `[C, H, U]`.
        base, kept: `[C * H]` float64, the mass of forced pairs, and of the proposal as a set; `goal` `[C]` float64.
        step: proposals so far. `is_last`: propose everything.
    """
    row = tl.program_id(0)
    cell = row // HEADS
    seen = tl.load(cells + cell * _CELL_FIELDS)
    num_groups = (seen + _GROUP - 1) // _GROUP
    everything = seen + num_groups
    forced, wanted = tl.load(base + row), tl.load(goal + cell)
    length, found = tl.load(lengths + row), tl.load(sums + row)
    shortfall = wanted - tl.load(kept + row)
    is_done = (tl.load(done + row) != 0) | ((step > 0) & ((shortfall <= 0) | (length == everything)))
    tl.store(done + row, is_done.to(tl.int32))
    gained = tl.load(kept + row) - forced
    rate = tl.where(gained > 0, gained / tl.where(found > forced, found - forced, 1.0), 1.0)
    target = tl.where(step == 0, wanted, found + shortfall / tl.minimum(1.0, tl.maximum(0.5, rate)))
    growth = tl.where(step >= _PATIENCE, length // 8, 0)
    shortest = tl.where(step == 0, 0, length + tl.maximum(1, growth))
    shortest = tl.where(is_last != 0, everything, tl.minimum(shortest, everything))
    if is_done:
        return
    if (target <= forced) & (shortest == 0):
        tl.store(thresholds + row, _NOTHING)
        tl.store(quotas + row, 0)
        tl.store(lengths + row, 0)
        tl.store(sums + row, forced)
        return
    prefix, above, above_mass = row * 0, row * 0, forced
    own_columns, own_groups = columns + row.to(tl.int64) * width, groups + row.to(tl.int64) * (width // _GROUP)
    choice = tl.arange(0, 16)
    is_enough = row < 0
    for level in range(8):
        shift = 28 - 4 * level
        number, mass = tl.zeros([16], tl.int32) + above, tl.zeros([16], tl.float64) + above_mass
        for at in tl.range(0, seen, BLOCK, num_stages=3):
            ranks = load_ranks(own_columns, at + tl.arange(0, BLOCK), 0, seen, True)
            number, mass = _add_candidates(number, mass, ranks, prefix, shift, 1)
        for at in range(0, num_groups, BLOCK):
            ranks = _load_groups(own_groups, at + tl.arange(0, BLOCK), num_groups)
            number, mass = _add_candidates(number, mass, ranks, prefix, shift, _GROUP)
        is_enough_from = (number >= shortest) & (mass >= target) & ((level > 0) | (choice < 8))  # 31 bits
        chosen = tl.max(tl.where(is_enough_from, choice, -1))
        is_enough = (level > 0) & is_enough | (chosen >= 0)
        chosen = tl.maximum(chosen, 0)
        above = tl.where(chosen == 15, above, tl.sum(tl.where(choice == chosen + 1, number, 0)))
        above_mass = tl.where(chosen == 15, above_mass, tl.sum(tl.where(choice == chosen + 1, mass, 0.0)))
        prefix = prefix | (chosen << shift)
    each = (prefix & _DENSITY).to(tl.float32, bitcast=True).to(tl.float64)
    each = tl.where(prefix & _COLUMN != 0, each, each * _GROUP)
    missing = tl.ceil((target - above_mass) / tl.where(each > 0, each, 1.0))
    quota = tl.maximum(tl.minimum(missing, 1e9).to(tl.int32), shortest - above)
    tl.store(thresholds + row, tl.where(is_enough, prefix, -1))
    tl.store(quotas + row, quota)
    tl.store(lengths + row, tl.where(is_enough, above + quota, everything))
    tl.store(sums + row, above_mass + quota * each)


@triton.jit(do_not_specialize=["num_groups"])
def groups_kernel(
    words: tl.tensor, totals: tl.tensor, masses: tl.tensor, groups: tl.tensor, thresholds: tl.tensor, quotas: tl.tensor,
    done: tl.tensor, cells: tl.tensor, num_groups: tl.tensor, HEADS: tl.constexpr, FORCED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Write the offsets that a proposal keeps, as `compact_kernel` does columns; the first `FORCED` groups always."""
    row = tl.program_id(0)
    seen = tl.load(cells + row // HEADS * _CELL_FIELDS)
    threshold, quota = tl.load(thresholds + row), tl.load(quotas + row)
    own = groups + row.to(tl.int64) * num_groups
    equal, total, mass = row * 0, row * 0, tl.zeros([BLOCK], tl.float32)
    if tl.load(done + row) != 0:
        return
    for at in range(0, num_groups, BLOCK):
        index = at + tl.arange(0, BLOCK)
        ranks = _load_groups(own, index, (seen + _GROUP - 1) // _GROUP)
        is_equal = (ranks == threshold) & (ranks >= 0)
        ordinal = equal + tl.cumsum(is_equal.to(tl.int32))
        kept = (ranks >= 0) & ((ranks > threshold) | (is_equal & (ordinal <= quota)) | (index < FORCED))
        size = tl.where(kept, tl.minimum(tl.maximum(seen - index * _GROUP, 0), _GROUP), 0)  # offsets of the group
        for half in tl.static_range(2):
            bits = tl.minimum(tl.maximum(size - 32 * half, 0), 32)
            word = tl.where(bits == 32, -1, (1 << (bits & 31)) - 1)
            tl.store(words + (row.to(tl.int64) * num_groups + index) * 2 + half, word, mask=index < num_groups)
        mass += tl.load(own + index, mask=kept, other=0.0) * _GROUP
        total += tl.sum(size)
        equal += tl.sum(is_equal.to(tl.int32))
    tl.store(totals + row, total)
    tl.store(masses + row, tl.sum(mass))


@dataclass(frozen=True, slots=True)
class Search:
    """The state of the search for all heads of a step: see `propose_kernel`."""

    columns: torch.Tensor
    groups: torch.Tensor
    base: torch.Tensor
    goal: torch.Tensor
    thresholds: torch.Tensor
    quotas: torch.Tensor
    lengths: torch.Tensor
    sums: torch.Tensor
    done: torch.Tensor
    tables: CellTables

    @staticmethod
    def begin(
        columns: torch.Tensor, offsets: torch.Tensor, num_rows: torch.Tensor, goal: torch.Tensor, tables: CellTables
    ) -> Search:
        """Begin a search.

        Args:
            columns, offsets: `[C, H, N]`, sums over the pairs that the forced selection does not keep.
            num_rows, goal: `[C]` float64, the rows of the estimate, and the mass to keep.
        """
        sizes, device = columns.shape[:2], columns.device
        groups = offsets.view(*sizes, -1, GROUP).sum(-1, dtype=torch.float64).div_(GROUP).float()
        base = num_rows[:, None] - columns.sum(-1, dtype=torch.float64)
        state = [torch.zeros(sizes, dtype=torch.int32, device=device) for _ in range(4)]
        thresholds, quotas, lengths, done = state
        return Search(
            columns, groups, base.contiguous(), goal.contiguous(), thresholds, quotas, lengths, base.clone(), done,
            tables,
        )  # fmt: skip

    def propose(self, kept: torch.Tensor, step: int, is_last: bool, block: int = _BLOCK) -> None:
        """Propose the next lists, from the masses `kept` `[C, H]` float64 of the ones before."""
        num_cells, heads, width = self.columns.shape
        propose_kernel[(num_cells * heads,)](
            self.thresholds, self.quotas, self.lengths, self.sums, self.done, self.columns, self.groups, self.base,
            kept, self.goal, self.tables.cells, step, int(is_last), width, HEADS=heads, BLOCK=block, num_warps=8,
        )  # fmt: skip

    def kept_offsets(self, before: Kept | None, forced: int, block: int = _BLOCK) -> Kept:
        """Write the offsets of the proposal, in place of those of the one `before`; heads that are done keep theirs."""
        num_cells, heads, num_groups = self.groups.shape
        kept = before
        if kept is None:
            words = torch.empty((num_cells, heads, 2 * num_groups), dtype=torch.int32, device=self.groups.device)
            kept = Kept(words, None, torch.empty_like(self.lengths), self.groups.new_empty((num_cells, heads)))
        groups_kernel[(num_cells * heads,)](
            kept.words, kept.totals, kept.masses, self.groups, self.thresholds, self.quotas, self.done,
            self.tables.cells, num_groups, HEADS=heads, FORCED=forced // GROUP, BLOCK=block,
        )  # fmt: skip
        return kept
