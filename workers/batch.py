"""A step plan made ready for the decoder: positions, cache slots and rows to sample. Legend: `T` tokens of the step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from protos.messages import StepPlan
from workers.attention.plan import AttentionPlan, dense_plan
from workers.kv_cache import BlockTable, PlanMismatch, SlotRun


@dataclass(frozen=True, slots=True)
class BatchSlice:
    """Rows `rows.start .. rows.stop - 1` of the step belong to one sequence."""

    rows: slice
    table: BlockTable
    plan: AttentionPlan


@dataclass(frozen=True, slots=True)
class Batch:
    """Everything the decoder needs to know about a step besides the activations."""

    positions: torch.Tensor  # [T] int64
    token_ids: torch.Tensor | None  # [T] int64, first stage only
    slices: tuple[BatchSlice, ...]
    slots: tuple[SlotRun, ...]  # where the step's keys and values go, in row order
    sample_rows: torch.Tensor  # [samples] int64


class BlockTables:
    """The block tables of the sequences in flight, kept in step with the plans."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._tables: dict[int, BlockTable] = {}

    def __len__(self) -> int:
        return len(self._tables)

    def clear(self) -> None:
        self._tables.clear()

    def apply(self, plan: StepPlan) -> None:
        """Drop released sequences and append new blocks.

        Raises:
            PlanMismatch: a table would not have the length the plan states.
        """
        for sequence in plan.released:
            self._tables.pop(sequence, None)
        for part in plan.slices:
            table = self._tables.get(part.sequence)
            if table is None:
                table = self._tables[part.sequence] = BlockTable(self._page_size)
            table.append(part.new_blocks)
            if table.num_blocks != part.num_blocks:
                raise PlanMismatch(
                    f"sequence {part.sequence}: the plan counts {part.num_blocks} blocks, this shard {table.num_blocks}"
                )

    def batch(
        self, plan: StepPlan, device: torch.device, with_tokens: bool, sampled: Mapping[int, int] | None = None
    ) -> Batch:
        """Turn a plan (already applied) into a batch; `sampled` has the newest token of sequences that run ahead."""
        parts: list[BatchSlice] = []
        slots: list[SlotRun] = []
        sample_rows: list[int] = []
        positions: list[torch.Tensor] = []
        ids: list[int] = []
        row = 0
        for part in plan.slices:
            table = self._tables[part.sequence]
            stop = part.start + part.length
            slots.extend(table.runs(part.start, stop))
            attention = dense_plan(part.start, part.length)
            parts.append(BatchSlice(slice(row, row + part.length), table, attention))
            positions.append(torch.arange(part.start, stop))
            if with_tokens:
                given = part.token_ids
                if not len(given) and part.length == 1 and sampled is not None and part.sequence in sampled:
                    given = (sampled[part.sequence],)
                if len(given) != part.length:
                    raise PlanMismatch(f"sequence {part.sequence}: {len(given)} ids for {part.length} rows")
                ids.extend(given)
            row += part.length
            if part.sample is not None:
                sample_rows.append(row - 1)
        return Batch(
            positions=torch.cat(positions).to(device),
            token_ids=torch.tensor(ids, dtype=torch.int64, device=device) if with_tokens else None,
            slices=tuple(parts),
            slots=tuple(slots),
            sample_rows=torch.tensor(sample_rows, dtype=torch.int64, device=device),
        )
