"""Sparse prefill in the decoder: sampled rows of a cell, attention over the selected keys, and the cell's report.

Legend: `T` rows, `H` query heads and `K` KV heads of the shard, `D` head dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from protos.model.spec import ModelSpec
from protos.stage.messages import CellReport, ShardSpec
from workers.attention.attend import attend
from workers.attention.plan import Queries, Rotation
from workers.kv.paged import LayerKV
from workers.model.batch import Batch, Piece
from workers.model.rope import Rotary, Rotations, norm_and_rotate_
from workers.sparse.estimate import CellKeys, SampledRows
from workers.sparse.vertical_slash import CellChoice, CellQueries, choose, estimate_rows, held_out_rows


@dataclass(slots=True)
class CellLog:
    """The reports of the sparse cells of a step, over all layers of the shard.

    Those of a device are read from it by `read`, which waits for it.
    """

    cells: list[CellReport] = field(default_factory=list)
    seconds: float = 0.0  # spent on estimating and selecting
    on_device: Callable[[], list[CellReport]] | None = None

    def read(self) -> tuple[CellReport, ...]:
        """Return all reports."""
        return (*self.cells, *(self.on_device() if self.on_device is not None else ()))


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
        # By the first row of the cell, where its context is not one DCA chunk (else the true rotations are continuous):
        # the sampled rows of the step with their continuous rotations, and in every layer a copy of these rows.
        self._continuous: dict[int, tuple[slice, Rotations]] = {}
        self._raw_rows: dict[int, torch.Tensor] = {}
        for piece in batch.pieces:
            if piece.sparse and len(piece.plan.regions) > 1:
                sampled, first = estimate_rows(piece.plan.length, spec.sparse.last_q), piece.rows.start
                rows = slice(first + sampled.start, first + sampled.stop)
                self._continuous[first] = rows, rotary.continuous(batch.positions[rows])

    def begin_layer(self, layer: int, q: torch.Tensor, norm: torch.Tensor | None) -> None:
        """Copy the rows of the estimates that need rotations of their own.

        Args:
            layer: counted in the model.
            q: `[T, H, D]` of the whole step, neither normed nor rotated.
            norm: `[H, D]` weights of the query norm in float32, None for models without.
        """
        self._layer, self._norm = layer, norm
        self._raw_rows = {first: q[rows].clone() for first, (rows, _) in self._continuous.items()}

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
        length, last_q, first = piece.plan.length, self._sparse.last_q, piece.rows.start
        rows, others = estimate_rows(length, last_q), held_out_rows(length, last_q)
        sampled = q[rows.start : rows.stop]
        if first in self._continuous:
            _, rotations = self._continuous[first]
            succ = self._raw_rows.pop(first)
            inter = torch.empty_like(succ)
            copies = [(inter, rotations[Rotation.INTER])]
            norm_and_rotate_(succ, rotations[Rotation.SUCC], self._norm, self._eps, copies)
            sampled = Queries(sampled.intra, succ, inter)
        cell = CellQueries(
            estimate=SampledRows(rows, sampled, piece.scales[rows.start : rows.stop]),
            held_out=SampledRows(others, q[torch.tensor(others, device=q.intra.device)], piece.scales[list(others)]),
            layer=self._layer,
            first_head=self._heads.start,
        )
        return choose(cell, CellKeys(kv, piece.table, piece.plan), self._sparse)
