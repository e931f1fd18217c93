"""What the Triton kernels of a layer need to know of a step, in device memory, and their calls for attention.

Legend: `T` tokens of the step, `B` rows that decode, `H` and `K` query and KV heads, `D` head dim, `R` rotations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from workers.attention.plan import Rotation
from workers.kernels.device import processors
from workers.kv.paged import LayerKV, PagedKV, PlanMismatch
from workers.model.batch import Batch, Piece

if TYPE_CHECKING:
    from workers.kernels.triton.layer.decode import Rows
    from workers.model.rope import Rotations

_ORDER = (Rotation.INTRA, Rotation.SUCC, Rotation.INTER)


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """What is known of a step without its activations, in device memory."""

    slots: torch.Tensor  # [T] int64, of the step's keys and values
    tables: list[tuple[torch.Tensor, torch.Tensor]]  # cos and sin, in the order of `Rotation`
    decoding: torch.Tensor | None  # [B] int64, the rows that `rows` describes; None where these are all rows
    rows: Rows | None  # of sequences that decode; None without any
    others: tuple[Piece, ...]  # which attend one by one

    @staticmethod
    def of(batch: Batch, kv: PagedKV, rotations: Rotations, distance: int) -> DeviceStep:
        """Copy what the kernels need to the device of the batch.

        Args:
            distance: tokens between the starts of two DCA chunks, 0 for plain attention.

        Raises:
            PlanMismatch: a slot of the batch lies outside the cache.
        """
        device, size = batch.positions.device, kv.num_pages * kv.page_size
        for first, length in batch.slots:
            if not 0 <= first <= size - length:
                raise PlanMismatch(f"slot {first + length - 1} of a plan lies outside the cache of {size} slots")
        slots = np.concatenate([np.arange(first, first + length) for first, length in batch.slots])
        single = tuple(piece for piece in batch.pieces if piece.plan.length == 1 and not piece.sparse)
        others = tuple(piece for piece in batch.pieces if piece.plan.length > 1 or piece.sparse)
        rows = _rows_of(single, kv, distance, device) if single else None
        decoding = torch.tensor([piece.rows.start for piece in single], device=device) if single and others else None
        tables = [(*rotations[rotation],) for rotation in _ORDER if rotation in rotations]
        return DeviceStep(torch.from_numpy(slots).to(device), tables, decoding, rows, others)


def _rows_of(pieces: tuple[Piece, ...], kv: PagedKV, distance: int, device: torch.device) -> Rows:
    """Describe rows of a token each, with the pages that they see."""
    from workers.kernels.triton.layer.decode import Rows, count_splits

    lengths = [piece.plan.start + 1 for piece in pieces]
    pages = -(-max(lengths) // kv.page_size)
    tables = np.zeros((len(pieces), pages), np.int32)
    for table, piece, length in zip(tables, pieces, lengths, strict=True):
        used = -(-length // kv.page_size)
        if used > piece.table.num_pages:
            raise PlanMismatch(f"position {length - 1} lies beyond the {piece.table.num_pages} pages of the table")
        table[:used] = np.frombuffer(piece.table.page_slots, np.int32, used)
    return Rows(
        tables=torch.from_numpy(tables).to(device),
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
        scales=torch.cat([piece.scales for piece in pieces]).to(device),
        page_size=kv.page_size,
        distance=distance,
        splits=count_splits(len(pieces), kv.layer(0).keys.shape[0], processors(device), max(lengths)),
    )


def store_heads(
    qkv: torch.Tensor, norms: torch.Tensor | None, eps: float, step: DeviceStep, kv: LayerKV
) -> torch.Tensor:
    """Normalise, rotate and store the heads `[T, H + 2 K, D]` of a layer; returns the queries `[R, T, H, D]`."""
    from workers.kernels.triton.layer import heads

    return heads.store_heads(qkv, norms, eps, step.tables, step.slots, kv)


def attend_decoding(q: torch.Tensor, kv: LayerKV, step: DeviceStep) -> torch.Tensor:
    """Compute attention `[B, H, D]` of the rows that decode; `q` is that of `store_heads`, of the whole step."""
    from workers.kernels.triton.layer import decode

    assert step.rows is not None
    return decode.attend_rows(q if step.decoding is None else q[:, step.decoding], kv, step.rows)
