"""Sparse prefill in the decoder: sampled rows of a cell, attention over the selected keys, and the cell's report.

Legend: `T` rows, `H` query heads and `K` KV heads of the shard, `D` head dim.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from protos.model.spec import ModelSpec
from protos.stage.messages import CellReport, ShardSpec
from workers.attention.attend import attend
from workers.attention.plan import Rotation
from workers.attention.queries import Queries
from workers.kv.paged import LayerKV
from workers.model.batch import Batch, Piece
from workers.model.rope import Rotary, Rotations, norm_and_rotate_
from workers.sparse.estimate import CellKeys, SampledRows
from workers.sparse.vertical_slash import CellChoice, CellQueries, choose, estimate_rows, held_out_rows


@dataclass(frozen=True, slots=True)
class _Estimate:
    """The rows that the estimate of a cell samples, counted from its start, and their continuous rotations."""

    rows: slice
    rotations: Rotations | None  # None: the context is one DCA chunk, where the true rotations are continuous


@dataclass(slots=True)
class CellLog:
    """The reports of the sparse cells of a step, over all layers of the shard."""

    cells: list[CellReport] = field(default_factory=list)
    seconds: float = 0.0  # spent on estimating and selecting


class SparsePrefill:
    """The sparse cells of one step.

    In every layer `begin_layer` is called before the queries are rotated in place, then `attend` once per cell.
    """

    def __init__(self, spec: ModelSpec, shard: ShardSpec, rotary: Rotary, batch: Batch, log: CellLog) -> None:
        assert spec.sparse is not None
        self._sparse, self._eps = spec.sparse, spec.rms_norm_eps
        self._heads = shard.heads
        self._log = log
        self._layer = 0
        self._norm: torch.Tensor | None = None
        self._raw_rows: dict[int, torch.Tensor] = {}  # by the first row of the piece, like the estimates
        self._estimates: dict[int, _Estimate] = {}
        for piece in batch.pieces:
            if piece.sparse:
                rows = _span(estimate_rows(piece.plan.length, spec.sparse.last_q))
                far = piece.has_region(Rotation.SUCC)
                rotations = rotary.continuous(batch.positions[piece.rows][rows]) if far else None
                self._estimates[piece.rows.start] = _Estimate(rows, rotations)

    def begin_layer(self, layer: int, q: torch.Tensor, norm: torch.Tensor | None) -> None:
        """Copy the rows of the estimates that need rotations of their own.

        Args:
            layer: counted in the model.
            q: `[T, H, D]` of the whole step, neither normed nor rotated.
            norm: `[H, D]` weights of the query norm in float32, None for models without.
        """
        self._layer, self._norm = layer, norm
        self._raw_rows = {
            first: q[first + estimate.rows.start : first + estimate.rows.stop].clone()
            for first, estimate in self._estimates.items()
            if estimate.rotations is not None
        }

    def attend(self, piece: Piece, q: Queries, kv: LayerKV) -> torch.Tensor:
        """Compute attention `[T, H, D]` of one cell.

        Args:
            q: the rows of the cell under their true rotations.
            kv: the layer's cache; the keys of the cell are already written.
        """
        began = time.perf_counter()
        choice = self._choose(piece, q, kv)
        self._log.seconds += time.perf_counter() - began
        plan, visited = replace(piece.plan, heads=choice.selections), torch.empty(self._heads.size, dtype=torch.int64)
        out = attend(q, kv, piece.table, plan, piece.scales, visited)
        self._log.cells.append(
            CellReport(
                sequence=piece.sequence,
                layer=self._layer,
                first_head=self._heads.start,
                start=plan.start,
                length=plan.length,
                density=(visited / plan.causal_pairs).tolist(),
                estimated_recall=choice.estimated_recall,
                held_out_recall=choice.held_out_recall,
                dense=choice.dense,
            )
        )
        return out

    def _choose(self, piece: Piece, q: Queries, kv: LayerKV) -> CellChoice:
        estimate, length = self._estimates[piece.rows.start], piece.plan.length
        sampled = q[estimate.rows]
        if estimate.rotations is not None:
            sampled = self._continuous(self._raw_rows.pop(piece.rows.start), estimate.rotations, sampled.intra)
        others = held_out_rows(length, self._sparse.last_q)
        cell = CellQueries(
            estimate=SampledRows(
                tuple(range(estimate.rows.start, estimate.rows.stop)), sampled, piece.scales[estimate.rows]
            ),
            held_out=SampledRows(others, q[torch.tensor(others, device=q.intra.device)], piece.scales[list(others)]),
            layer=self._layer,
            first_head=self._heads.start,
        )
        return choose(cell, CellKeys(kv, piece.table, piece.plan), self._sparse)

    def _continuous(self, raw: torch.Tensor, rotations: Rotations, intra: torch.Tensor) -> Queries:
        assert rotations.succ is not None
        assert rotations.inter is not None
        inter = torch.empty_like(raw)
        norm_and_rotate_(raw, rotations.succ, self._norm, self._eps, [(inter, rotations.inter)])
        return Queries(intra, raw, inter)


def _span(rows: Sequence[int]) -> slice:
    assert list(rows) == list(range(rows[0], rows[-1] + 1))
    return slice(rows[0], rows[-1] + 1)
