"""The estimate in PyTorch, for any device: the CUDA path, and the fallback of `estimate_compiled`.

Keys are read block by block, so that no matrix of rows by keys is ever kept.

Legend: `R` sampled rows, `H` query heads, `K` KV heads, `G = H // K`, `S` keys the cell sees, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from workers.attention.plan import IntArray, Rotation, Selection
from workers.sparse import selection
from workers.sparse.estimate import CellKeys, SampledRows, Sums
from workers.sparse.selection import FloatArray, offset_mask

_BLOCK = 4096  # keys whose scores are in memory at a time

top_indices = selection.top_indices


def sums(sample: SampledRows, keys: CellKeys, kv_head: int) -> Sums:
    """See `EstimateBackend.sums`."""
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


def kept_share(
    sample: SampledRows, keys: CellKeys, kv_head: int, selections: Sequence[Selection]
) -> npt.NDArray[np.float64]:
    """See `EstimateBackend.kept_share`."""
    device = keys.kv.keys.device
    by_offset = torch.from_numpy(np.stack([offset_mask(one, keys.stop) for one in selections])).to(device)
    by_column = torch.zeros_like(by_offset)
    for head, one in enumerate(selections):
        by_column[head, torch.from_numpy(one.columns).long()] = True
    positions = _positions(sample, keys)
    all_lse = kept_lse = None
    for block in _blocks(keys):
        start, stop, _ = block
        logits = _logits(sample, keys, kv_head, block)
        distance = positions[:, None] - torch.arange(start, stop, device=device)
        keep = by_offset[:, distance.clamp_min(0)] | by_column[:, None, start:stop]
        part, kept = torch.logsumexp(logits, -1), torch.logsumexp(logits.masked_fill(~keep, -torch.inf), -1)
        all_lse = part if all_lse is None else torch.logaddexp(all_lse, part)
        kept_lse = kept if kept_lse is None else torch.logaddexp(kept_lse, kept)
    assert all_lse is not None
    assert kept_lse is not None
    share = (kept_lse - all_lse).double().exp().mean(dim=1).cpu().numpy()
    return np.asarray(share, np.float64)


def kept_mass(
    sample: SampledRows, keys: CellKeys, kv_head: int, sums: Sums, selections: Sequence[Selection | None]
) -> npt.NDArray[np.float64]:
    """See `EstimateBackend.kept_mass`."""
    total = np.zeros(len(selections))
    positions = _positions(sample, keys)
    for head, one in enumerate(selections):
        if one is None:
            continue
        mask = offset_mask(one, keys.stop)
        total[head] = sums.columns[head, one.columns].sum(dtype=np.float64)
        total[head] += sums.offsets[head, mask].sum(dtype=np.float64)
        by_offset = torch.from_numpy(mask).to(positions.device)
        for at in range(0, len(one.columns), _BLOCK):
            columns = one.columns[at : at + _BLOCK]
            twice = probabilities(sample, keys, kv_head, sums.lse, columns)[head]
            distance = positions[:, None] - torch.from_numpy(columns).to(positions.device)
            total[head] -= float(twice.masked_fill_(~by_offset[distance.clamp_min(0)], 0).sum(dtype=torch.float64))
    return total


def probabilities(
    sample: SampledRows, keys: CellKeys, kv_head: int, lse: FloatArray, columns: IntArray
) -> torch.Tensor:
    """Compute the attention `[G, R, n]` of the rows on single keys `columns` `[n]`, ascending; 0 on later keys."""
    parts = []
    for start, stop, rotation in keys.plan.regions:
        inside = columns[np.searchsorted(columns, start) : np.searchsorted(columns, stop)]
        if len(inside):
            parts.append(_scores(sample, keys, kv_head, inside, rotation))
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
    """Return logits `[G, R, n]` in float32, minus infinity for keys after the row."""
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
