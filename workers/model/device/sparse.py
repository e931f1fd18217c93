"""Sparse prefill of a step by the kernels of CUDA devices: selection, lists and attention, with reports at the end.

The keys of a sequence are staged once a layer for all of its cells. The device is waited for after the last layer.

Legend: `T` rows of the step, `H` query heads and `K` KV heads of the shard, `D` head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby

import torch

from protos.model.spec import ModelSpec
from protos.stage.messages import CellReport, ShardSpec
from workers.attention import cuda
from workers.attention.plan import Queries, Rotation
from workers.kernels.device import moved
from workers.kernels.triton.lists import TILES
from workers.kv.paged import LayerKV
from workers.model.batch import Batch, Piece
from workers.model.rope import Rotary, Rotations, norm_and_rotate_
from workers.sparse.cuda import HeadBudgets, SparseCell, StepSelection

TILE = TILES[0]  # rows of a tile of the attention kernel


@dataclass(slots=True)
class _Cells:
    """The sparse cells of one sequence in a step, and the factors of their rows' logits in device memory.

    `continuous` has the rotations of the estimate's rows where a context is not one DCA chunk (else the true ones are
    continuous), and `raw` in every layer a copy of these rows, neither normed nor rotated.
    """

    pieces: list[Piece]
    scales: list[torch.Tensor]
    selection: StepSelection
    continuous: Rotations | None
    raw: torch.Tensor | None = field(default=None)

    @property
    def stop(self) -> int:
        """The positions that the last cell sees."""
        return max(piece.plan.start + piece.plan.length for piece in self.pieces)


class DeviceSparsePrefill:
    """The sparse cells of one step; in every layer `begin_layer` is called, then `attend`, and `reports` at the end."""

    def __init__(self, spec: ModelSpec, shard: ShardSpec, rotary: Rotary, batch: Batch, budgets: HeadBudgets) -> None:
        assert spec.sparse is not None
        self._eps, self._heads = spec.rms_norm_eps, shard.heads
        self._layer = 0
        self._norm: torch.Tensor | None = None
        self._sequences: list[_Cells] = []
        sparse = [piece for piece in batch.pieces if piece.sparse]
        for _, some in groupby(sparse, key=lambda piece: piece.sequence):
            pieces = list(some)
            cells = [SparseCell(piece.plan, piece.scales, piece.rows.start) for piece in pieces]
            selection = StepSelection(spec.sparse, cells, budgets, shard.kv_heads.size, batch.positions.device, TILE)
            has_regions = any(len(piece.plan.regions) > 1 for piece in pieces)
            positions = batch.positions[selection.estimate.rows.flatten()]
            continuous = rotary.continuous(positions) if has_regions else None
            scales = [moved(piece.scales, positions.device) for piece in pieces]
            self._sequences.append(_Cells(pieces, scales, selection, continuous))

    def begin_layer(self, layer: int, q: torch.Tensor, norm: torch.Tensor | None) -> None:
        """Copy the rows of the estimates that need rotations of their own.

        Args:
            layer: counted in the model.
            q: `[T, H, D]` of the whole step, neither normed nor rotated.
            norm: `[H, D]` weights of the query norm in float32, None for models without.
        """
        self._layer, self._norm = layer, norm
        for cells in self._sequences:
            if cells.continuous is not None:
                cells.raw = q[cells.selection.estimate.rows.flatten()]

    def attend(self, q: Queries, kv: LayerKV, out: torch.Tensor) -> None:
        """Compute attention of the rows of all cells into their rows of `out` `[T, H, D]`.

        Args:
            q: `[T, H, D]` of the whole step under their true rotations.
            kv: the layer's cache; the keys of the step are already written.
        """
        for cells in self._sequences:
            selection, table = cells.selection, cells.pieces[0].table
            heads, dim = q.intra.shape[1:]
            room = cuda.column_rows(selection.column_capacity, heads, dim)
            staged = cuda.stage(kv, table, cells.stop, room)
            estimate = selection.estimate.pack(self._sampled(cells, q))
            keys = staged.by_head(0, cells.stop)[0]
            lists = selection.select(self._layer, estimate, selection.held_out.take(q), keys)
            visited = []
            for piece, scales, own in zip(cells.pieces, cells.scales, lists, strict=True):
                out[piece.rows], pairs = cuda.attend_lists(q[piece.rows], staged, piece.plan, scales, own)
                visited.append(pairs)
            selection.note_visited(visited)

    def reports(self) -> list[CellReport]:
        """Wait for the device, and return the reports of all cells in all layers that were computed."""
        found = []
        for cells in self._sequences:
            for figures in cells.selection.figures():
                piece = cells.pieces[figures.cell]
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
        return sorted(found, key=lambda report: report.layer)

    def _sampled(self, cells: _Cells, q: Queries) -> Queries:
        """Return the rows of the estimate, with continuous rotations of the far regions."""
        rows = cells.selection.estimate.rows.flatten()
        if cells.continuous is None or cells.raw is None:
            return q.map(lambda each: each[rows])
        succ, cells.raw = cells.raw, None
        inter = torch.empty_like(succ)
        copies = [(inter, cells.continuous[Rotation.INTER])]
        norm_and_rotate_(succ, cells.continuous[Rotation.SUCC], self._norm, self._eps, copies)
        return Queries(q.intra[rows], succ, inter)
