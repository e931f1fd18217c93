"""The estimate of a cell: attention of sampled rows, summed along columns and diagonals, and the share a head keeps.

`Estimate` computes it in PyTorch, for any device: the CUDA path, and the fallback of `estimate_compiled`.

Legend: `R` sampled rows, `H` query heads, `K` KV heads, `G = H // K`, `S` keys the cell sees, `D` head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from workers.attention.plan import AttentionPlan, IntArray, Queries, Rotation, Selection
from workers.kv.paged import LayerKV, PageTable
from workers.sparse import selection
from workers.sparse.selection import FloatArray, offset_mask

_BLOCK = 4096  # keys whose scores are in memory at a time


@dataclass(frozen=True, slots=True)
class SampledRows:
    """Rows of a cell, ascending and counted from its start, with their queries `[R, H, D]` and logit factors `[R]`."""

    rows: Sequence[int]
    queries: Queries
    scales: torch.Tensor  # float32 in host memory: D**-0.5 times the square of the length scale


@dataclass(frozen=True, slots=True)
class CellKeys:
    """The keys one cell sees: a layer of the cache, the pages of the sequence, and the (dense) plan of the cell."""

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

    `columns` `[G, S]` by key position, `offsets` `[G, S]` by distance from query to key, and `lse` `[G, R]`, the
    natural logarithm of a row's softmax denominator.
    """

    columns: FloatArray
    offsets: FloatArray
    lse: FloatArray


class Estimate:
    """Attention of sampled rows over all keys of a cell, for the query heads of one KV head.

    Keys are read block by block, so that no matrix of rows by keys is ever kept.
    """

    top_indices = staticmethod(selection.top_indices)

    def __init__(self, sample: SampledRows, keys: CellKeys, kv_head: int) -> None:
        self.sample, self.keys, self.kv_head = sample, keys, kv_head
        self.group = sample.queries.intra.shape[1] // keys.kv.keys.shape[0]
        self._positions = torch.tensor(sample.rows, device=keys.kv.keys.device) + keys.plan.start

    def sums(self) -> Sums:
        """Compute the softmax of neighbouring rows over all visible keys, summed along columns and diagonals."""
        parts = (torch.logsumexp(logits, dim=-1) for _, _, logits in self._blocks())
        lse = functools.reduce(torch.logaddexp, parts)
        columns = torch.zeros(self.group, self.keys.stop, device=lse.device)
        offsets = torch.zeros_like(columns)
        for start, stop, logits in self._blocks():
            mass = (logits - lse[..., None]).exp_()
            columns[:, start:stop] = mass.sum(dim=1)
            for row, position in enumerate(self._positions.tolist()):
                seen = min(stop, position + 1) - start
                if seen > 0:
                    offsets[:, position - start - seen + 1 : position - start + 1] += mass[:, row, :seen].flip(-1)
        return Sums(columns.cpu().numpy(), offsets.cpu().numpy(), lse.cpu().numpy())

    def kept_share(self, selections: Sequence[Selection]) -> npt.NDArray[np.float64]:
        """Compute the share `[G]` of the rows' attention on pairs a head keeps, by column or offset; mean of rows."""
        device = self.keys.kv.keys.device
        by_offset = torch.from_numpy(np.stack([offset_mask(one, self.keys.stop) for one in selections])).to(device)
        by_column = torch.zeros_like(by_offset)
        for head, one in enumerate(selections):
            by_column[head, torch.from_numpy(one.columns).long()] = True
        all_lse, kept_lse = [], []  # of every block, [G, R]
        for start, stop, logits in self._blocks():
            distance = self._positions[:, None] - torch.arange(start, stop, device=device)
            keep = by_offset[:, distance.clamp_min(0)] | by_column[:, None, start:stop]
            all_lse.append(torch.logsumexp(logits, -1))
            kept_lse.append(torch.logsumexp(logits.masked_fill(~keep, -torch.inf), -1))
        lse, kept = (functools.reduce(torch.logaddexp, parts) for parts in (all_lse, kept_lse))
        share = (kept - lse).double().exp().mean(dim=1).cpu().numpy()
        return np.asarray(share, np.float64)

    def kept_mass(self, sums: Sums, selections: Sequence[Selection | None]) -> npt.NDArray[np.float64]:
        """Compute the sum `[G]` of the estimate's probabilities over the pairs a head keeps, each pair once.

        It is the sum of kept columns and offsets in `sums` (of these rows), less the pairs that are kept by both; 0 for
        heads without a selection.
        """
        total = np.zeros(len(selections))
        for head, one in enumerate(selections):
            if one is None:
                continue
            mask = offset_mask(one, self.keys.stop)
            total[head] = sums.columns[head, one.columns].sum(dtype=np.float64)
            total[head] += sums.offsets[head, mask].sum(dtype=np.float64)
            by_offset = torch.from_numpy(mask).to(self._positions.device)
            for at in range(0, len(one.columns), _BLOCK):
                columns = one.columns[at : at + _BLOCK]
                twice = self.probabilities(sums.lse, columns)[head]
                distance = self._positions[:, None] - torch.from_numpy(columns).to(self._positions.device)
                total[head] -= float(twice.masked_fill_(~by_offset[distance.clamp_min(0)], 0).sum(dtype=torch.float64))
        return total

    def probabilities(self, lse: FloatArray, columns: IntArray) -> torch.Tensor:
        """Compute the attention `[G, R, n]` of the rows on single keys `columns` `[n]`, ascending; 0 on later keys."""
        parts = []
        for start, stop, rotation in self.keys.plan.regions:
            inside = columns[np.searchsorted(columns, start) : np.searchsorted(columns, stop)]
            if len(inside):
                parts.append(self._scores(inside, rotation))
        return (torch.cat(parts, dim=-1) - torch.from_numpy(lse).to(parts[0].device)[..., None]).exp_()

    def _blocks(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield start and stop of every block of keys, and the logits of all rows with them."""
        for first, last, rotation in self.keys.plan.regions:
            for start in range(first, last, _BLOCK):
                stop = min(start + _BLOCK, last)
                yield start, stop, self._scores(np.arange(start, stop, dtype=np.int32), rotation)

    def _scores(self, columns: IntArray, rotation: Rotation) -> torch.Tensor:
        """Return logits `[G, R, n]` in float32, minus infinity for keys after the row."""
        cache, scales = self.keys.kv.keys, self.keys.kv.key_scales
        heads = slice(self.kv_head * self.group, (self.kv_head + 1) * self.group)
        q = self.sample.queries.of(rotation)[:, heads].transpose(0, 1).float()
        slots = torch.from_numpy(self.keys.table.slots(columns)).to(cache.device)
        logits = (q @ cache[self.kv_head, slots].float().T) * self.sample.scales.to(cache.device)[:, None]
        if scales is not None:
            logits = logits * scales[self.kv_head, slots]
        late = torch.from_numpy(columns).to(cache.device) > self._positions[:, None]
        return logits.masked_fill_(late, -torch.inf)
