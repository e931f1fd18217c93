"""The decoder's input of a step, made from its plan: positions, slots, attention plans and rows to sample.

Legend: `T` tokens of the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from protos.model.grid import is_sparse, next_cut, split
from protos.model.spec import ModelSpec
from protos.stage.messages import SequenceSlice, StepPlan
from workers.attention.plan import AttentionPlan, Rotation
from workers.kv.paged import PageTable, PlanMismatch, SlotRun
from workers.model.rope import row_scales


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of the step that share one attention plan over the context of one sequence."""

    sequence: int
    prompt_len: int
    rows: slice
    table: PageTable
    plan: AttentionPlan
    scales: torch.Tensor  # [rows] float32 in host memory, the factors on their logits
    sparse: bool = False  # the rows are one sparse cell, whose keys are selected per head


@dataclass(frozen=True, slots=True)
class Batch:
    """Everything the decoder needs to know about a step besides its activations."""

    positions: torch.Tensor  # [T] int64
    pieces: tuple[Piece, ...]  # cover the rows in order
    slots: tuple[SlotRun, ...]  # for the step's keys and values, in row order
    sample_rows: torch.Tensor  # [samples] int64

    @property
    def regions(self) -> set[Rotation]:
        """The regions that the context of any piece has keys of."""
        return {rotation for piece in self.pieces for _, _, rotation in piece.plan.regions}


class PageTables(dict[int, PageTable]):
    """The page tables of the sequences in flight, updated by every plan."""

    def __init__(self, page_size: int) -> None:
        super().__init__()
        self._page_size = page_size

    def apply(self, plan: StepPlan) -> None:
        """Drop released sequences and append new pages.

        Raises:
            PlanMismatch: a table does not have the length that the plan states.
        """
        for sequence in plan.released:
            self.pop(sequence, None)
        for part in plan.slices:
            table = self.setdefault(part.sequence, PageTable(self._page_size))
            table.append(part.new_pages)
            if table.num_pages != part.num_pages:
                raise PlanMismatch(
                    f"sequence {part.sequence}: the plan counts {part.num_pages} pages, this shard {table.num_pages}"
                )

    def batch(self, plan: StepPlan, spec: ModelSpec, device: torch.device) -> Batch:
        """Make the batch of a plan that was applied.

        Raises:
            PlanMismatch: rows lie beyond the table, or sparse rows are not whole cells.
        """
        pieces: list[Piece] = []
        slots: list[SlotRun] = []
        sample_rows: list[int] = []
        positions = _positions(plan)
        row = 0
        for part in plan.slices:
            table = self[part.sequence]
            stop = part.start + part.length
            slots.extend(table.runs(part.start, stop))
            pieces.extend(_pieces(part, spec, table, row, positions))
            row += part.length
            if part.sample is not None:
                sample_rows.append(row - 1)
        return Batch(
            positions=positions.to(device),
            pieces=tuple(pieces),
            slots=tuple(slots),
            sample_rows=torch.tensor(sample_rows, dtype=torch.int64, device=device),
        )


def token_ids(plan: StepPlan, sampled: Mapping[int, int]) -> list[int]:
    """Return the input of the first stage, an id for each row.

    Args:
        sampled: the newest token of sequences whose plans come before their tokens.

    Raises:
        PlanMismatch: ids are missing.
    """
    ids: list[int] = []
    for part in plan.slices:
        tokens = part.token_ids
        if not len(tokens) and part.length == 1 and part.sequence in sampled:
            tokens = (sampled[part.sequence],)
        if len(tokens) != part.length:
            raise PlanMismatch(f"sequence {part.sequence}: {len(tokens)} ids for {part.length} rows")
        ids.extend(tokens)
    return ids


def _positions(plan: StepPlan) -> torch.Tensor:
    """Return `[T]` int64 in host memory; a decode step makes one tensor for any number of sequences."""
    if plan.is_decode:
        return torch.tensor([part.start for part in plan.slices])
    return torch.cat([torch.arange(part.start, part.start + part.length) for part in plan.slices])


def _pieces(
    part: SequenceSlice, spec: ModelSpec, table: PageTable, row: int, positions: torch.Tensor
) -> Iterator[Piece]:
    """Yield the pieces of a slice, whose first row is `row` of the step, cut where an attention plan must end."""
    scale_len = part.scale_len or part.prompt_len
    for start, stop in split(spec, part.start, part.start + part.length, part.prompt_len):
        sparse = is_sparse(spec, start, part.prompt_len)
        if sparse and not _is_cell(spec, start, stop, part.prompt_len):
            raise PlanMismatch(
                f"sequence {part.sequence}: rows {start} to {stop - 1} are not a whole cell of {part.prompt_len} tokens"
            )
        first = row + start - part.start
        rows = slice(first, first + stop - start)
        yield Piece(
            sequence=part.sequence,
            prompt_len=part.prompt_len,
            rows=rows,
            table=table,
            plan=AttentionPlan(start, stop - start, spec.chunk_distance),
            scales=row_scales(positions[rows], scale_len, spec.head_dim, spec.dual_chunk),
            sparse=sparse,
        )


def _is_cell(spec: ModelSpec, start: int, stop: int, prompt_len: int) -> bool:
    """Return whether rows `start .. stop - 1`, which no cut crosses, reach from one cut to the next."""
    begins = start == 0 or next_cut(spec, start - 1, prompt_len) == start
    return begins and next_cut(spec, start, prompt_len) == stop
