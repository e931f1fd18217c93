"""The estimate of a cell: attention of sampled rows, summed along columns and diagonals, and the share a head keeps.

Two modules implement `EstimateBackend`: `estimate_torch` for any device, and `estimate_compiled` for host memory.

Legend: `R` sampled rows, `H` query heads, `K` KV heads, `G = H // K`, `S` keys the cell sees, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from workers.attention.plan import AttentionPlan, IntArray, Selection
from workers.attention.queries import Queries
from workers.kv.paged import LayerKV, PageTable
from workers.sparse.selection import FloatArray


@dataclass(frozen=True, slots=True)
class SampledRows:
    """Rows of a cell, ascending and counted from its start, with their queries `[R, H, D]` and logit factors `[R]`."""

    rows: tuple[int, ...]
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


class EstimateBackend(Protocol):
    """The sums of an estimate, and what selections keep of it, for the query heads of one KV head."""

    def sums(self, sample: SampledRows, keys: CellKeys, kv_head: int) -> Sums:
        """Compute the softmax of neighbouring rows over all visible keys, summed along columns and diagonals."""

    def kept_share(
        self, sample: SampledRows, keys: CellKeys, kv_head: int, selections: Sequence[Selection]
    ) -> npt.NDArray[np.float64]:
        """Compute the share `[G]` of the rows' attention on pairs a head keeps, by column or offset; mean of rows."""

    def kept_mass(
        self, sample: SampledRows, keys: CellKeys, kv_head: int, sums: Sums, selections: Sequence[Selection | None]
    ) -> npt.NDArray[np.float64]:
        """Compute the sum `[G]` of the estimate's probabilities over the pairs a head keeps, each pair once.

        It is the sum of kept columns and offsets in `sums` (of the same rows), less the pairs that are kept by both; 0
        for heads without a selection.
        """

    def top_indices(self, scores: FloatArray, counts: Sequence[int], forced: int) -> list[IntArray]:
        """Return what `selection.top_indices` returns."""
