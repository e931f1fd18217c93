"""What the Triton kernels of a layer need to know of a step, in device memory, and their calls for attention.

Legend: `T` tokens of the step, `B` rows that decode, `H` and `K` query and KV heads, `D` head dim, `R` rotations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from workers.attention.plan import Rotation
from workers.kernels.device import processors
from workers.kv.paged import LayerKV, PagedKV, PlanMismatch
from workers.model.batch import Batch, Piece
from workers.model.device.tables import DeviceTables

if TYPE_CHECKING:
    from workers.kernels.triton.layer.decode import Rows
    from workers.model.rope import Rotations

_ORDER = (Rotation.INTRA, Rotation.SUCC, Rotation.INTER)


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """What is known of a step without its activations, in device memory."""

    slots: torch.Tensor  # [T] int32, of the step's keys and values; -1 for rows whose own are not kept
    tables: list[tuple[torch.Tensor, torch.Tensor]]  # cos and sin, in the order of `Rotation`
    decoding: torch.Tensor | None  # [B] int64, the rows that `rows` describes; None where these are all rows
    rows: Rows | None  # of sequences that decode; None without any
    others: tuple[Piece, ...]  # which attend one by one
    idle: torch.Tensor | None = None  # [T, 1] bool, rows that only fill up a graph; None without any

    @staticmethod
    def of(batch: Batch, kv: PagedKV, rotations: Rotations, distance: int, tables: DeviceTables) -> DeviceStep:
        """Copy what the kernels need to the device of the batch.

        Args:
            distance: tokens between the starts of two DCA chunks, 0 for plain attention.
            tables: those of rows that decode are brought up to date.

        Raises:
            PlanMismatch: a slot of the batch lies outside the cache.
        """
        device, size = batch.positions.device, kv.num_pages * kv.page_size
        for first, length in batch.slots:
            if not 0 <= first <= size - length:
                raise PlanMismatch(f"slot {first + length - 1} of a plan lies outside the cache of {size} slots")
        slots = np.concatenate([np.arange(first, first + length, dtype=np.int32) for first, length in batch.slots])
        single = tuple(piece for piece in batch.pieces if piece.plan.length == 1 and not piece.sparse)
        others = tuple(piece for piece in batch.pieces if piece.plan.length > 1 or piece.sparse)
        rows = _rows_of(single, kv, distance, tables) if single else None
        decoding = torch.tensor([piece.rows.start for piece in single], device=device) if single and others else None
        return DeviceStep(torch.from_numpy(slots).to(device), _in_order(rotations), decoding, rows, others)

    @staticmethod
    def of_rows(slots: torch.Tensor, rows: Rows, rotations: Rotations) -> DeviceStep:
        """Return the step of rows that decode, from device memory alone; rows without keys only fill it up."""
        return DeviceStep(slots, _in_order(rotations), None, rows, (), (rows.lengths == 0)[:, None])


def _in_order(rotations: Rotations) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(*rotations[rotation],) for rotation in _ORDER if rotation in rotations]


def _rows_of(pieces: tuple[Piece, ...], kv: PagedKV, distance: int, tables: DeviceTables) -> Rows:
    """Describe rows of a token each."""
    from workers.kernels.triton.layer.decode import Rows, count_splits

    device = tables.slots.device
    lengths = [piece.plan.start + 1 for piece in pieces]
    known = tables.places([piece.table for piece in pieces])
    places, seen = torch.tensor([known, lengths], dtype=torch.int32).to(device)
    return Rows(
        tables=tables.slots,
        places=places,
        lengths=seen,
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


def rotate_heads(
    q: torch.Tensor, norms: torch.Tensor | None, eps: float, tables: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """Normalise queries `[T, H, D]` and rotate them by every one of `tables`: `[R, T, H, D]`, without keys."""
    from workers.kernels.triton.layer import heads

    nothing = q.new_empty(0, 1, q.shape[2])
    return heads.store_heads(q, norms, eps, tables, q.new_empty(0, dtype=torch.int32), LayerKV(nothing, nothing))


def attend_decoding(q: torch.Tensor, kv: LayerKV, step: DeviceStep) -> torch.Tensor:
    """Compute attention `[B, H, D]` of the rows that decode; `q` is that of `store_heads`, of the whole step."""
    from workers.kernels.triton.layer import decode

    assert step.rows is not None
    return decode.attend_rows(q if step.decoding is None else q[:, step.decoding], kv, step.rows)
