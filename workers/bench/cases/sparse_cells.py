"""A random sparse cell over a paged cache, and its estimate written from the definition with whole float64 matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from protos.model.spec import SparseSpec
from workers.attention.plan import AttentionPlan, Queries, Selection
from workers.kv.paged import LayerKV, PageTable, quantise
from workers.sparse.estimate import CellKeys, SampledRows
from workers.sparse.vertical_slash import CellQueries, estimate_rows, held_out_rows


@dataclass(frozen=True)
class Shape:
    """Sizes of a case; `distance` 0: no DCA."""

    start: int
    length: int
    distance: int = 0
    last_q: int = 64
    page_size: int = 16
    heads: int = 4
    kv_heads: int = 2
    dim: int = 32
    dtype: torch.dtype = torch.float32
    cache: torch.dtype | None = None  # None: the same
    seed: int = 0


@dataclass(frozen=True)
class Cell:
    """What `choose` takes, besides the budgets."""

    queries: CellQueries
    kv: LayerKV
    table: PageTable
    plan: AttentionPlan

    @property
    def keys(self) -> CellKeys:
        return CellKeys(self.kv, self.table, self.plan)

    def args(self, **spec: object) -> tuple[CellQueries, CellKeys, SparseSpec]:
        """The arguments of `choose`."""
        return self.queries, self.keys, SparseSpec(**spec)  # type: ignore[arg-type]


def random_cell(shape: Shape) -> Cell:
    """A cell whose pages are scattered over the cache, with attention that is neither flat nor a single key."""
    random = torch.Generator().manual_seed(shape.seed)
    stop = shape.start + shape.length
    pages = -(-stop // shape.page_size)
    table = PageTable(shape.page_size)
    table.append((torch.randperm(pages + 3, generator=random)[:pages]).tolist())
    size = (shape.kv_heads, (pages + 3) * shape.page_size, shape.dim)
    keys = torch.randn(size, generator=random)
    kv = LayerKV(keys.to(shape.cache or shape.dtype), keys)
    if shape.cache == torch.int8:
        small, scales = quantise(keys)
        kv = LayerKV(small, small, scales, scales)

    def sample(rows: Sequence[int]) -> SampledRows:
        some = [torch.randn(len(rows), shape.heads, shape.dim, generator=random).to(shape.dtype) for _ in range(3)]
        scales = shape.dim**-0.5 * (1.5 + torch.rand(len(rows), generator=random))
        return SampledRows(rows, Queries(*some), scales)

    queries = CellQueries(
        sample(estimate_rows(shape.length, shape.last_q)), sample(held_out_rows(shape.length, shape.last_q)), layer=3
    )
    return Cell(queries, kv, table, AttentionPlan(shape.start, shape.length, shape.distance))


def with_heads(cell: Cell, heads: slice, kv_heads: slice) -> Cell:
    """The part of a cell that a shard with these heads sees."""

    def cut(sample: SampledRows) -> SampledRows:
        rows = (sample.queries.intra, sample.queries.succ, sample.queries.inter)
        return replace(sample, queries=Queries(*(None if one is None else one[:, heads] for one in rows)))  # type: ignore[arg-type]

    queries = CellQueries(cut(cell.queries.estimate), cut(cell.queries.held_out), cell.queries.layer, heads.start)
    kv = LayerKV(
        cell.kv.keys[kv_heads], cell.kv.values[kv_heads],
        *(None if one is None else one[kv_heads] for one in (cell.kv.key_scales, cell.kv.value_scales)),
    )  # fmt: skip
    return replace(cell, queries=queries, kv=kv)


def attention(cell: Cell, sample: SampledRows) -> np.ndarray:
    """Probabilities `[H, R, S]` of the rows over all keys, float64."""
    plan, stop = cell.plan, cell.plan.start + cell.plan.length
    heads, kv_heads = sample.queries.intra.shape[1], cell.kv.keys.shape[0]
    keys = cell.kv.keys.double()
    if cell.kv.key_scales is not None:
        keys = keys * cell.kv.key_scales.double()[..., None]
    page_size = cell.table.page_size
    pages = [run.first // page_size + at for run in cell.table.runs(0, cell.table.num_pages * page_size)
              for at in range(run.length // page_size)]  # fmt: skip
    position = np.arange(stop)
    slots = np.array(pages)[position // page_size] * page_size + position % page_size
    region = np.zeros(stop, int)  # DCA chunks between the rows and a key, at most 2
    if plan.distance:
        region = np.minimum(plan.start // plan.distance - position // plan.distance, 2)
    late = position > plan.start + np.array(sample.rows)[:, None]
    found = np.zeros((heads, len(sample.rows), stop))
    for head in range(heads):
        k = keys[head * kv_heads // heads, torch.from_numpy(slots)].numpy()
        queries = [q[:, head].double().numpy() for q in (sample.queries.intra, sample.queries.succ,
                                                         sample.queries.inter) if q is not None]  # fmt: skip
        logits = np.choose(region, [q @ k.T for q in queries]) * sample.scales.double().numpy()[:, None]
        logits[late] = -np.inf
        mass = np.exp(logits - logits.max(axis=1, keepdims=True))
        found[head] = mass / mass.sum(axis=1, keepdims=True)
    return found


def column_and_offset_sums(cell: Cell, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`[H, S]` sums over the rows of the estimate by key position and by distance."""
    stop = probabilities.shape[-1]
    offsets = np.zeros((probabilities.shape[0], stop))
    for at, row in enumerate(cell.queries.estimate.rows):
        position = cell.plan.start + row
        offsets[:, position - np.arange(position + 1)] += probabilities[:, at, : position + 1]
    return probabilities.sum(axis=1), offsets


def largest(scores: np.ndarray, count: int, always: int) -> list[int]:
    """The indices that the definition keeps, ascending."""
    order = sorted(range(len(scores)), key=lambda at: (at >= always, 0 if at < always else -scores[at], at))
    return sorted(order[: max(count, always)])


def kept_mass(probabilities: np.ndarray, start: int, rows: Sequence[int], selection: Selection) -> float:
    """Mean over the rows `[R, S]` of the mass on kept pairs, as a set."""
    keys = np.arange(probabilities.shape[-1])
    offsets = start + np.array(rows)[:, None] - keys
    keep = np.isin(keys, selection.columns)[None] | np.zeros_like(offsets, bool)
    for low, high in selection.offsets.tolist():
        keep |= (offsets >= low) & (offsets <= high)
    return float(probabilities[keep].sum()) / len(rows)
