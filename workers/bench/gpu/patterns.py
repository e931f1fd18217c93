"""Stated patterns of sparse prefill: which offsets and columns a head keeps, instead of what random weights would say.

All have the same numbers of offsets and columns; they differ in how far the offsets cluster, and that decides how many
pairs a tile visits. `stated` lets the whole selection run, and only puts the pattern in place of what it found.

Legend: `C` cells, `H` query heads, `N` room for keys, `V` columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from workers.bench.gpu.context import Sizes
from workers.bench.gpu.parts import Recorder
from workers.kernels.triton.sparse.cells import CellTables

if TYPE_CHECKING:  # it needs Triton
    from workers.kernels.triton.sparse.selection import Kept


@dataclass(frozen=True, slots=True)
class Pattern:
    """`offsets` distances: the nearest `near`, and runs of `run` at random multiples of it; `columns` random keys."""

    near: int
    run: int
    offsets: int
    columns: int

    @property
    def name(self) -> str:
        """Say what it is."""
        runs = (self.offsets - self.near) // self.run
        what = "isolated offsets" if self.run == 1 else f"runs of {self.run}"
        return f"nearest {self.near} and {runs} {what}, {self.columns} columns"


def patterns(sizes: Sizes) -> tuple[Pattern, ...]:
    """Return the four patterns, from offsets that cluster to those that do not."""
    near, budget = sizes.near, (sizes.offsets, sizes.columns)
    longest = max(2, (sizes.offsets - near) // 28)  # 28 runs, of 256 in the real sizes
    middle, short = max(2, longest // 4), max(2, longest // 16)
    return (
        Pattern(near, longest, *budget),
        Pattern(near // 2, middle, *budget),
        Pattern(near // 2, short, *budget),
        Pattern(near // 4, 1, *budget),
    )


class StatedKept:
    """The offsets and columns of all heads of the cells of a step, as the selection leaves them on the device."""

    def __init__(self, pattern: Pattern, tables: CellTables, heads: int, seed: int = 0) -> None:
        """Draw them, on the device of `tables`."""
        device = tables.cells.device
        generator = torch.Generator(device).manual_seed(seed)
        rows = len(tables.spans), heads
        self.offset_words = torch.empty(*rows, tables.width // 32, dtype=torch.int32, device=device)
        self.column_words = torch.empty_like(self.offset_words)
        self.columns = torch.zeros(*rows, min(pattern.columns, tables.width), dtype=torch.int32, device=device)
        self.totals = torch.empty(2, *rows, dtype=torch.int32, device=device)  # of offsets, of columns
        for cell, span in enumerate(tables.spans):
            for head in range(heads):
                bits = _offsets(pattern, span.stop, tables.width, generator)
                self.offset_words[cell, head] = _packed(bits)
                self.totals[0, cell, head] = bits.sum()
                chosen = _distinct(span.stop, pattern.columns, generator).sort().values
                self.columns[cell, head, : len(chosen)] = chosen
                self.totals[1, cell, head] = len(chosen)
                bits = torch.zeros(tables.width, dtype=torch.bool, device=device)
                bits[chosen] = True
                self.column_words[cell, head] = _packed(bits)

    def offsets_as(self, like: Kept | None = None) -> Kept:
        """Return the offsets, with the masses of `like`."""
        from workers.kernels.triton.sparse.selection import Kept

        masses = self.totals[0].float() if like is None else like.masses
        return Kept(self.offset_words, None, self.totals[0], masses)

    def columns_as(self, like: Kept | None = None) -> Kept:
        """Return the columns, with the masses of `like`."""
        from workers.kernels.triton.sparse.selection import Kept

        masses = self.totals[1].float() if like is None else like.masses
        return Kept(self.column_words, self.columns, self.totals[1], masses)


@contextmanager
def stated(pattern: Pattern, device: torch.device) -> Iterator[Recorder]:
    """Have the selection on the device end with a pattern: what it selects is computed, and then dropped.

    The pattern of a step serves all of its layers. Budgets must be those of the pattern. Yields the seconds that
    drawing takes, which are no part of the selection.
    """
    from workers.kernels.triton.sparse import selection

    original = selection.compact
    drawing = Recorder(device)
    draw = drawing.wrapped("drawing", StatedKept)
    drawn: dict[int, tuple[CellTables, StatedKept]] = {}

    def compact(scores: torch.Tensor, found: Any, forced: int, tables: CellTables, room: int = 0, **rest: Any) -> Kept:
        selected = original(scores, found, forced, tables, room, **rest)
        if id(tables) not in drawn:
            drawn.clear()  # of the step before
            drawn[id(tables)] = tables, draw(pattern, tables, scores.shape[1], tables.spans[0].start)
        kept = drawn[id(tables)][1]
        return kept.columns_as(selected) if room else kept.offsets_as(selected)

    with mock.patch.object(selection, "compact", compact):
        yield drawing


def _offsets(pattern: Pattern, stop: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Return which distances below `width` are kept, of those below `stop`."""
    bits = torch.zeros(width, dtype=torch.bool, device=generator.device)
    first = -(-pattern.near // pattern.run)
    places = first + _distinct(stop // pattern.run - first, (pattern.offsets - pattern.near) // pattern.run, generator)
    runs = places[:, None] * pattern.run + torch.arange(pattern.run, device=generator.device)
    bits[runs.flatten()] = True
    bits[: min(pattern.near, stop)] = True
    return bits


def _distinct(below: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Return random different numbers below `below`, all of them where there are not more."""
    if below <= 0:
        return torch.empty(0, dtype=torch.int64, device=generator.device)
    return torch.randperm(below, generator=generator, device=generator.device)[:count]


def _packed(bits: torch.Tensor) -> torch.Tensor:
    """Return words of 32 bits, the first bit lowest."""
    shifts = torch.arange(32, dtype=torch.int32, device=bits.device)
    return (bits.view(-1, 32).int() << shifts).sum(-1, dtype=torch.int32)
