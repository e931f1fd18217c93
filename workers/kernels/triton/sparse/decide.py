"""What a selection keeps in all, and which heads become dense: one launch for the heads of all cells.

Legend: `C` cells, `H` query heads, `K` KV heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from workers.kernels.triton.sparse.cells import NUM_CELL_FIELDS, CellTables
from workers.kernels.triton.sparse.selection import Kept

_CELL_FIELDS = tl.constexpr(NUM_CELL_FIELDS)
NUM_RULE_FIELDS = 3  # sampled rows of a cell, heads of a KV head that may become dense, share below which they do
_RULE_FIELDS = tl.constexpr(NUM_RULE_FIELDS)


@triton.jit(do_not_specialize=["num_cells"])
def decide_kernel(
    figures: tl.tensor, dense: tl.tensor, shares: tl.tensor, masses: tl.tensor, column_masses: tl.tensor,
    twice: tl.tensor, totals: tl.tensor, cells: tl.tensor, rules: tl.tensor, num_cells: tl.tensor,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr, PADDED_PARTS: tl.constexpr,
) -> None:  # fmt: skip
    """Decide for the heads of one KV head in one cell, program `(cell, KV head)`.

    Args:
        figures: `[3, C, H]` float64: recall of the estimate's rows, of held-out rows, and 1 for dense heads.
        dense: `[C, H]` int32.
        shares: `[C, H]`, of held-out rows.
        masses: `[C, H]` of offsets, and of columns `column_masses`; pairs kept by both are in `twice` `[C, H, PARTS]`.
            Without parts `masses` are of all that is kept.
        totals: `[C, H]`, the number of offsets kept; heads that keep all have recalls of 1.
        rules: `[C, 3]` float64.
    """
    cell, kv_head = tl.program_id(0), tl.program_id(1)
    member = tl.arange(0, PADDED)
    is_head = member < GROUP
    own = cell * HEADS + kv_head * GROUP + member
    num_rows, room, floor = (
        tl.load(rules + cell * _RULE_FIELDS), tl.load(rules + cell * _RULE_FIELDS + 1),
        tl.load(rules + cell * _RULE_FIELDS + 2),
    )  # fmt: skip
    is_whole = tl.load(totals + own, mask=is_head, other=0) >= tl.load(cells + cell * _CELL_FIELDS)
    mass = tl.load(masses + own, mask=is_head, other=0.0)
    if PARTS:
        part = tl.arange(0, PADDED_PARTS)
        mass += tl.load(column_masses + own, mask=is_head, other=0.0)
        is_part = is_head[:, None] & (part < PARTS)[None, :]
        mass -= tl.sum(tl.load(twice + own[:, None] * PARTS + part[None, :], mask=is_part, other=0.0), 1)
    recall = tl.where(is_whole, 1.0, tl.minimum(mass.to(tl.float64) / num_rows, 1.0))
    share = tl.where(is_whole, 1.0, tl.load(shares + own, mask=is_head, other=1.0))
    is_before = (share[None, :] < share[:, None]) | (
        (share[None, :] == share[:, None]) & (member[None, :] < member[:, None])
    )
    rank = tl.sum((is_before & is_head[None, :]).to(tl.int32), 1)
    becomes_dense = (share.to(tl.float64) < floor) & (rank < room)
    heads = num_cells * HEADS
    tl.store(figures + own, recall, mask=is_head)
    tl.store(figures + heads + own, share.to(tl.float64), mask=is_head)
    tl.store(figures + 2 * heads + own, becomes_dense.to(tl.float64), mask=is_head)
    tl.store(dense + own, becomes_dense.to(tl.int32), mask=is_head)


def decide(
    shares: torch.Tensor, offsets: Kept, columns: Kept, kept: torch.Tensor, rules: torch.Tensor, tables: CellTables,
    kv_heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Decide which heads become dense: of a KV head's, those with the lowest shares (then the lower head).

    They are below the floor, and no more than there is room for. The rule is that of `vertical_slash.choose`.

    Args:
        shares: `[C, H]` float32, of the attention of held-out rows that is kept.
        kept: `[C, H]` float64, the mass of the estimate's rows that is kept; or `[C, H, n]` float32, the parts of the
            mass that is kept both by column and by offset.
        rules: `[C, 3]` float64 on the device: sampled rows, room, floor.

    Returns:
        Figures `[3, C, H]` float64 (recall of the estimate's rows and of held-out rows, 1 for dense heads), and which
        heads are dense, `[C, H]` int32.
    """
    num_cells, heads = shares.shape
    group, has_parts = heads // kv_heads, kept.dim() == 3
    parts = kept.shape[2] if has_parts else 0
    figures = torch.empty((3, num_cells, heads), dtype=torch.float64, device=shares.device)
    dense = torch.empty((num_cells, heads), dtype=torch.int32, device=shares.device)
    decide_kernel[(num_cells, kv_heads)](
        figures, dense, shares, offsets.masses if has_parts else kept, columns.masses, kept, offsets.totals,
        tables.cells, rules, num_cells, HEADS=heads, GROUP=group, PADDED=triton.next_power_of_2(group), PARTS=parts,
        PADDED_PARTS=triton.next_power_of_2(max(1, parts)), num_warps=1,
    )  # fmt: skip
    return figures, dense
