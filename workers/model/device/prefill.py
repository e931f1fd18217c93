"""Attention of the rows of a step that do not decode, on CUDA devices.

Keys and values of a sequence are staged once a layer, for all of its pieces: sparse cells and dense rows in one or more
DCA chunks. One sequence follows the other, so that scratch memory is that of the longest one.

Legend: `T` rows of the step, `H` query heads and `K` KV heads of the shard, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

from protos.model.spec import ModelSpec
from protos.stage.messages import CellReport, ShardSpec
from workers.attention import cuda
from workers.attention.attend import attend
from workers.attention.plan import Queries
from workers.kv.paged import LayerKV
from workers.model.batch import Batch, Piece
from workers.model.device.sparse import SequenceCells
from workers.model.rope import Rotary
from workers.sparse.cuda import HeadBudgets


class DevicePrefill:
    """The rows of one step; in every layer `begin_layer` is called, then `attend`, and `reports` at the end."""

    def __init__(
        self, pieces: Sequence[Piece], spec: ModelSpec, shard: ShardSpec, rotary: Rotary, batch: Batch,
        budgets: HeadBudgets | None,
    ) -> None:  # fmt: skip
        """Copy what the layers need to the device, without waiting for it.

        Args:
            pieces: those of the batch that do not decode.
            budgets: of the heads; None for models without sparse prefill.
        """

        def of_one(sequence: list[Piece]) -> _Sequence:
            sparse = [piece for piece in sequence if piece.sparse]
            cells = None
            if sparse:
                assert budgets is not None
                cells = SequenceCells(sparse, spec, shard, rotary, batch, budgets)
            return _Sequence(sequence, cells, batch.positions.device)

        self._sequences = [of_one(list(some)) for _, some in groupby(pieces, key=lambda piece: piece.sequence)]

    def begin_layer(self, layer: int, q: torch.Tensor, norm: torch.Tensor | None) -> None:
        """Copy the rows of the estimates that need rotations of their own.

        Args:
            layer: counted in the model.
            q: `[T, H, D]` of the whole step, neither normed nor rotated.
            norm: `[H, D]` weights of the query norm in float32, None for models without.
        """
        for one in self._sequences:
            if one.cells is not None:
                one.cells.begin_layer(layer, q, norm)

    def attend(self, q: Queries, kv: LayerKV, out: torch.Tensor) -> None:
        """Compute attention of the rows into theirs of `out` `[T, H, D]`.

        Args:
            q: `[T, H, D]` of the whole step under their true rotations.
            kv: the layer's cache; the keys of the step are already written.
        """
        for one in self._sequences:
            one.attend(q, kv, out)

    def reports(self) -> list[CellReport]:
        """Wait for the device if there are sparse cells, and return their reports in all layers, layer by layer."""
        found = [report for one in self._sequences if one.cells is not None for report in one.cells.reports()]
        return sorted(found, key=lambda report: report.layer)


class _Sequence:
    """The pieces of one sequence. Rows that are too few to be worth staging read the pages."""

    def __init__(self, pieces: Sequence[Piece], cells: SequenceCells | None, device: torch.device) -> None:
        self.cells = cells
        self._pieces = pieces
        self._is_staged = cells is not None or max(piece.plan.length for piece in pieces) >= cuda.MIN_ROWS
        self._stop = max(piece.plan.start + piece.plan.length for piece in pieces)
        self._dense = [(piece, cuda.RowScales.of(piece.scales, device)) for piece in pieces if not piece.sparse]

    def attend(self, q: Queries, kv: LayerKV, out: torch.Tensor) -> None:
        if not self._is_staged:
            for piece in self._pieces:
                out[piece.rows] = attend(q[piece.rows], kv, piece.table, piece.plan, piece.scales)
            return
        staged = cuda.stage(kv, self._pieces[0].table, self._stop)
        if self.cells is not None:
            self.cells.attend(q, staged, out)
        for piece, scales in self._dense:
            out[piece.rows] = cuda.attend_dense(q[piece.rows], staged, piece.plan, scales)
