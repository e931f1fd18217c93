"""The sparse cells of one sequence in a step on CUDA devices: selection, lists and attention, with reports at the end.

The device is waited for after the last layer.

Legend: `T` rows of the step, `H` query heads and `K` KV heads of the shard, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from protos.model.spec import ModelSpec
from protos.stage.messages import CellReport, ShardSpec
from workers.attention import cuda
from workers.attention.plan import Queries, Rotation
from workers.kernels.triton.lists import TILES
from workers.model.batch import Batch, Piece
from workers.model.device.step import rotate_heads
from workers.model.rope import CosSin, Rotary
from workers.sparse.cuda import HeadBudgets, SparseCell, StepSelection

if TYPE_CHECKING:
    from workers.kernels.triton.staging import Staged


class SequenceCells:
    """The cells of a sequence; in every layer `begin_layer` is called, then `attend`, and `reports` at the end."""

    def __init__(
        self, pieces: Sequence[Piece], spec: ModelSpec, shard: ShardSpec, rotary: Rotary, batch: Batch,
        budgets: HeadBudgets,
    ) -> None:  # fmt: skip
        assert spec.sparse is not None
        self._pieces, self._heads, self._eps = pieces, shard.heads, spec.rms_norm_eps
        device = batch.positions.device
        cells = [SparseCell(piece.plan, piece.scales, piece.rows.start) for piece in pieces]
        self._scales = [cuda.RowScales.of(piece.scales, device) for piece in pieces]
        self._selection = StepSelection(spec.sparse, cells, budgets, shard.kv_heads.size, device, TILES)
        self._rows = self._selection.estimate.rows.flatten()
        # The rotations of the estimate's rows where a context is not one DCA chunk (else the true ones are continuous),
        # and in every layer a copy of these rows, neither normed nor rotated.
        self._continuous: list[CosSin] = []
        if any(len(piece.plan.regions) > 1 for piece in pieces):
            rotations = rotary.continuous(batch.positions[self._rows])
            self._continuous = [rotations[rotation] for rotation in (Rotation.INTRA, Rotation.SUCC, Rotation.INTER)]
        self._raw: torch.Tensor | None = None
        self._norm: torch.Tensor | None = None
        self._layer = 0

    def begin_layer(self, layer: int, q: torch.Tensor, norm: torch.Tensor | None) -> None:
        """Copy the rows of the estimate if they need rotations of their own; see `SparsePrefill.begin_layer`."""
        self._layer, self._norm = layer, norm
        if self._continuous:
            self._raw = q[self._rows]

    def attend(self, q: Queries, staged: Staged, out: torch.Tensor) -> None:
        """Compute attention of the rows of all cells into their rows of `out` `[T, H, D]`.

        Args:
            q: `[T, H, D]` of the whole step under their true rotations.
            staged: the sequence up to its last cell at least.
        """
        selection = self._selection
        estimate, held_out = selection.estimate.pack(self._sampled(q)), selection.held_out.take(q)
        lists = selection.select(self._layer, estimate, held_out, staged.by_head()[0])
        visited = []
        for piece, scales, own in zip(self._pieces, self._scales, lists, strict=True):
            _, pairs = cuda.attend_lists(q[piece.rows], staged, piece.plan, scales, own, out[piece.rows])
            visited.append(pairs)
        selection.note_visited(visited)

    def reports(self) -> list[CellReport]:
        """Wait for the device, and return the reports of all cells in all layers that were computed."""
        found = []
        for figures in self._selection.figures():
            piece = self._pieces[figures.cell]
            found.append(
                CellReport(
                    sequence=piece.sequence,
                    layer=figures.layer,
                    first_head=self._heads.start,
                    start=piece.plan.start,
                    length=piece.plan.length,
                    density=figures.density,
                    estimated_recall=figures.estimated_recall,
                    held_out_recall=figures.held_out_recall,
                    dense=figures.dense,
                )
            )
        return found

    def _sampled(self, q: Queries) -> Queries:
        """Return the rows of the estimate, with continuous rotations of the far regions."""
        if self._raw is None:
            return q.map(lambda each: each[self._rows])
        raw, self._raw = self._raw, None
        return Queries(*rotate_heads(raw, self._norm, self._eps, self._continuous))
