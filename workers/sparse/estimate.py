"""Sums of attention over sampled rows of a cell in plain PyTorch: the twin of `native_estimate`.

Every function streams over the keys in blocks, so no matrix of rows by keys is ever kept.

Legend: `R` sampled rows, `H` query heads, `K` KV heads, `G = H // K`, `S` keys the cell sees, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from workers.attention.plan import AttentionPlan, IntArray, Rotation, Selection
from workers.attention.queries import Queries
from workers.kv.paged import LayerKV, PageTable
from workers.sparse.selection import FloatArray, offset_map

_BLOCK = 4096  # keys whose scores are in memory at a time


@dataclass(frozen=True, slots=True)
class SampledRows:
    """Rows of a cell, ascending and counted from its start, with their queries `[R, H, D]` and logit factors `[R]`."""

    rows: tuple[int, ...]
    queries: Queries
    scales: torch.Tensor  # float32 in host memory: D**-0.5 times the square of the length scale


@dataclass(frozen=True, slots=True)
class CellKeys:
    """The keys one cell sees: a layer of the cache, where its positions lie, and the (dense) plan of the cell."""

    kv: LayerKV
    table: PageTable
    plan: AttentionPlan

    @property
    def stop(self) -> int:
        """`S`: the position after the cell."""
        return self.plan.start + self.plan.length


@dataclass(frozen=True, slots=True)
class Sums:
    """The estimate of the query heads of one KV head: sums of probabilities over the sampled rows, float32.

    `columns` `[G, S]` by key position, `offsets` `[G, S]` by distance from query to key, and the natural `lse`
    `[G, R]`, the logarithm of a row's softmax denominator.
    """

    columns: FloatArray
    offsets: FloatArray
    lse: FloatArray


def sums(sample: SampledRows, keys: CellKeys, kv_head: int) -> Sums:
    """Softmax of neighbouring rows over all visible keys, summed along columns and diagonals."""
    positions = [keys.plan.start + row for row in sample.rows]
    lse = None
    for block in _blocks(keys):
        part = torch.logsumexp(_logits(sample, keys, kv_head, block), dim=-1)
        lse = part if lse is None else torch.logaddexp(lse, part)
    assert lse is not None
    columns = torch.zeros(lse.shape[0], keys.stop, device=lse.device)
    offsets = torch.zeros_like(columns)
    for block in _blocks(keys):
        start, stop, _ = block
        mass = (_logits(sample, keys, kv_head, block) - lse[..., None]).exp_()
        columns[:, start:stop] = mass.sum(dim=1)
        for row, position in enumerate(positions):
            seen = min(stop, position + 1) - start
            if seen > 0:
                offsets[:, position - start - seen + 1 : position - start + 1] += mass[:, row, :seen].flip(-1)
    return Sums(columns.cpu().numpy(), offsets.cpu().numpy(), lse.cpu().numpy())


def kept(sample: SampledRows, keys: CellKeys, kv_head: int, selections: Sequence[Selection]) -> npt.NDArray[np.float64]:
    """Share `[G]` of the rows' attention that falls on pairs a head keeps, by column or by offset; a mean over rows."""
    device = keys.kv.keys.device
    by_offset = torch.from_numpy(np.stack([offset_map(selection, keys.stop) for selection in selections])).to(device)
    by_column = torch.zeros_like(by_offset)
    for head, selection in enumerate(selections):
        by_column[head, torch.from_numpy(selection.columns).long()] = True
    positions = _positions(sample, keys)
    whole = held = None
    for block in _blocks(keys):
        start, stop, _ = block
        logits = _logits(sample, keys, kv_head, block)
        distance = positions[:, None] - torch.arange(start, stop, device=device)
        keep = by_offset[:, distance.clamp_min(0)] | by_column[:, None, start:stop]
        part, some = torch.logsumexp(logits, -1), torch.logsumexp(logits.masked_fill(~keep, -torch.inf), -1)
        whole = part if whole is None else torch.logaddexp(whole, part)
        held = some if held is None else torch.logaddexp(held, some)
    assert whole is not None
    assert held is not None
    share = (held - whole).double().exp().mean(dim=1).cpu().numpy()
    return np.asarray(share, np.float64)


def mass(
    sample: SampledRows, keys: CellKeys, kv_head: int, found: Sums, selections: Sequence[Selection | None]
) -> npt.NDArray[np.float64]:
    """Sum `[G]` of the estimate's probabilities over pairs a head keeps, as a set; 0 for heads without a selection.

    `found` are the `sums` of the same rows: kept columns and offsets, less the pairs that are kept by both.
    """
    total = np.zeros(len(selections))
    positions = _positions(sample, keys)
    for head, selection in enumerate(selections):
        if selection is None:
            continue
        near = offset_map(selection, keys.stop)
        total[head] = found.columns[head, selection.columns].sum(dtype=np.float64)
        total[head] += found.offsets[head, near].sum(dtype=np.float64)
        by_offset = torch.from_numpy(near).to(positions.device)
        for at in range(0, len(selection.columns), _BLOCK):
            columns = selection.columns[at : at + _BLOCK]
            twice = probabilities(sample, keys, kv_head, found.lse, columns)[head]
            distance = positions[:, None] - torch.from_numpy(columns).to(positions.device)
            total[head] -= float(twice.masked_fill_(~by_offset[distance.clamp_min(0)], 0).sum(dtype=torch.float64))
    return total


def probabilities(
    sample: SampledRows, keys: CellKeys, kv_head: int, lse: FloatArray, columns: IntArray
) -> torch.Tensor:
    """Attention `[G, R, n]` of the rows on single keys `columns` `[n]`, ascending; 0 where they are not visible."""
    parts = []
    for start, stop, rotation in keys.plan.regions:
        some = columns[np.searchsorted(columns, start) : np.searchsorted(columns, stop)]
        if len(some):
            parts.append(_scores(sample, keys, kv_head, some, rotation))
    return (torch.cat(parts, dim=-1) - torch.from_numpy(lse).to(parts[0].device)[..., None]).exp_()


def _blocks(keys: CellKeys) -> Iterator[tuple[int, int, Rotation]]:
    for start, stop, rotation in keys.plan.regions:
        for at in range(start, stop, _BLOCK):
            yield at, min(at + _BLOCK, stop), rotation


def _positions(sample: SampledRows, keys: CellKeys) -> torch.Tensor:
    return torch.tensor(sample.rows, device=keys.kv.keys.device) + keys.plan.start


def _logits(sample: SampledRows, keys: CellKeys, kv_head: int, block: tuple[int, int, Rotation]) -> torch.Tensor:
    start, stop, rotation = block
    return _scores(sample, keys, kv_head, np.arange(start, stop, dtype=np.int32), rotation)


def _scores(sample: SampledRows, keys: CellKeys, kv_head: int, columns: IntArray, rotation: Rotation) -> torch.Tensor:
    """Logits `[G, R, n]` in float32, minus infinity for keys after the row."""
    cache, scales = keys.kv.keys, keys.kv.key_scales
    rows = sample.queries.of(rotation)
    group = rows.shape[1] // cache.shape[0]
    q = rows[:, kv_head * group : (kv_head + 1) * group].transpose(0, 1).float()
    slots = torch.from_numpy(keys.table.slots(columns)).to(cache.device)
    k = cache[kv_head, slots].float()
    logits = (q @ k.T) * sample.scales.to(cache.device)[:, None]
    if scales is not None:
        logits = logits * scales[kv_head, slots]
    late = torch.from_numpy(columns).to(cache.device) > _positions(sample, keys)[:, None]
    return logits.masked_fill_(late, -torch.inf)
