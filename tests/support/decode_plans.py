"""Plans of steps in which sequences begin, join, leave and give their pages to others; most rows only decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from protos.stage.messages import SampleSpec, SamplingParams, SequenceSlice, StepPlan

ORDERS = (  # the sequences of each step, in the order of its rows: 1, 2, 3, 5 and 17 rows
    (1,), (1, 2), (2, 1), (1, 2, 3), (5, 1, 4, 2, 3), (4, 3, 2, 1, 5), tuple(range(1, 18)), (17, 2, 9), (2, 9, 17),
    (18, 2), (2, 18, 19), (19,), (19, 20, 18, 21, 2),
)  # fmt: skip


@dataclass
class DecodePlans:
    """Makes plans of one row for each sequence; `prompt` are the tokens of sequence 1 that one step reads before."""

    page: int
    pages: int
    vocab: int
    prompt: int = 0
    orders: Sequence[tuple[int, ...]] = ORDERS
    _tables: dict[int, list[int]] = field(default_factory=dict)
    _starts: dict[int, int] = field(default_factory=dict)

    def make(self) -> list[StepPlan]:
        """Return them; the pages of sequences that have left are used again, in an order of their own."""
        random = np.random.default_rng(3)
        self._free = list(random.permutation(self.pages))
        self._ids = random.integers(3, self.vocab, (22, 64)).tolist()
        plans = [StepPlan(1, (self._slice(1, self.prompt, False),))] if self.prompt else []
        gone: tuple[int, ...] = ()
        last = {sequence: step for step, order in enumerate(self.orders) for sequence in order}
        for step, order in enumerate(self.orders):
            parts = tuple(self._slice(sequence, 1, (sequence + step) % 5 != 0) for sequence in order)
            plans.append(StepPlan(len(plans) + 1, parts, gone))
            gone = tuple(sequence for sequence in self._tables if last[sequence] == step)
            for sequence in gone:
                self._free = [*self._tables.pop(sequence), *self._free]
        return plans

    def _slice(self, sequence: int, length: int, is_sampled: bool) -> SequenceSlice:
        start = self._starts.get(sequence, 0)
        table, stop = self._tables.setdefault(sequence, []), start + length
        self._starts[sequence] = stop
        new = [int(self._free.pop(0)) for _ in range(-(-stop // self.page) - len(table))]
        table += new
        ids: Sequence[int] = self._ids[sequence][start:stop]
        sample = SampleSpec(SamplingParams(), start) if is_sampled else None
        return SequenceSlice(sequence, start, length, 8, ids, new, len(table), sample)
