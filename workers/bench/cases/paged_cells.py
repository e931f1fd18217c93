"""Random rows over paged keys and values, with selections of every kind, and their attention in float64.

Legend: `T` rows, `S` context length, `H` query heads, `K` KV heads, `D` head dim.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import torch

from workers.attention.plan import AttentionPlan, Queries, Selection
from workers.bench.cases.attention import attend_reference
from workers.bench.cases.selections import random_selection
from workers.kv.paged import LayerKV, PageTable, quantise

# start, rows and DCA distance: rows of every size, behind borders of tiles, pages and DCA chunks
CELLS = (
    (0, 1, 0),
    (0, 193, 0),
    (63, 67, 0),
    (129, 256, 0),
    (749, 1, 250),
    (640, 67, 256),
    (500, 193, 250),
    (833, 17, 320),
)
CACHES = (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True)
class PagedCell:
    """Rows of one plan; `k` and `v` `[S, K, D]` are what the cache holds, without rounding by a cache's type."""

    plan: AttentionPlan
    q: Queries
    k: torch.Tensor
    v: torch.Tensor
    kv: LayerKV
    table: PageTable
    scales: torch.Tensor

    def on(self, device: torch.device, dtype: torch.dtype) -> PagedCell:
        """Return the same cell with its queries, rounded to `dtype`, and its cache on a device."""
        kv = self.kv
        sides = (kv.keys, kv.values, kv.key_scales, kv.value_scales)
        moved = LayerKV(*(None if side is None else side.to(device) for side in sides))  # type: ignore[arg-type]
        return replace(self, q=self.q.map(lambda rows: rows.to(device, dtype)), kv=moved)

    def reference(self, plan: AttentionPlan | None = None) -> torch.Tensor:
        """Compute attention `[T, H, D]` in float64."""
        q = self.q.map(torch.Tensor.double)
        return attend_reference(q, self.k.double(), self.v.double(), plan or self.plan, self.scales)


def paged_cell(
    start: int, rows: int, distance: int = 0, *, heads: int = 4, kv_heads: int = 2, dim: int = 16, page_size: int = 16,
    cache: torch.dtype = torch.float32, selections: tuple[Selection, ...] | None = None, in_order: bool = False,
) -> PagedCell:  # fmt: skip
    """Make rows whose pages are in disorder, or one run behind two others.

    Slots of nobody hold NaN (in int8 99 with scales of NaN).
    """
    torch.manual_seed(start + rows)
    stop = start + rows
    pages = -(-stop // page_size)
    table = PageTable(page_size)
    table.append(range(2, pages + 2) if in_order else torch.randperm(pages + 3)[:pages].tolist())
    slots = torch.from_numpy(table.slots(np.arange(stop)))

    def paged(side: torch.Tensor, empty: float = torch.nan) -> torch.Tensor:
        filled = torch.full((kv_heads, (pages + 3) * page_size, *side.shape[2:]), empty).to(side.dtype)
        filled[:, slots] = side.transpose(0, 1)
        return filled

    k, v = torch.randn(2, stop, kv_heads, dim)
    if cache.itemsize > 1:
        kv = LayerKV(*(paged(side.to(cache)) for side in (k, v)))
        k, v = (side.to(cache).float() for side in (k, v))
    else:
        pairs = [quantise(side) if cache == torch.int8 else _to_fp8(side) for side in (k, v)]
        (keys, key_scales), (values, value_scales) = pairs
        kv = LayerKV(paged(keys, 99), paged(values, 99), paged(key_scales), paged(value_scales))
        k, v = (small.float() * scales[..., None] for small, scales in pairs)
    q = Queries(*torch.randn(3, rows, heads + 1, dim)[:, :, :heads])  # strided as slices of a product are
    plan = AttentionPlan(start, rows, distance, selections)
    return PagedCell(plan, q, k, v, kv, table, torch.linspace(0.2, 0.3, rows))


def _to_fp8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = rows.abs().amax(dim=-1) / torch.finfo(torch.float8_e4m3fn).max
    return (rows / scales[..., None]).to(torch.float8_e4m3fn), scales


def selections(stop: int, seed: int = 0) -> dict[str, Selection]:
    """Return selections of a context by what is special about them; all keep distance 0."""
    none, every = np.empty(0, np.int32), np.arange(stop, dtype=np.int32)
    far = np.arange(0, stop, 131, dtype=np.int32)
    near = np.array([[0, min(stop - 1, 40)]], np.int32)
    block = np.array([[0, 0], [70, 90]], np.int32)[: 2 if stop > 90 else 1]
    return {
        "everything": Selection.everything(stop),
        "nothing else": Selection(np.zeros((1, 2), np.int32), none),
        "isolated diagonals": Selection(np.stack([far, far], axis=1), none),
        "all columns": Selection(near, every),
        "columns in blocks": Selection(block, every[every % 5 != 2]),
        "random": random_selection(stop, random.Random(seed)),
    }


def with_heads(cell: PagedCell, heads: tuple[Selection, ...]) -> AttentionPlan:
    """Return the plan of a cell with a selection a head."""
    return replace(cell.plan, heads=heads)
