"""The outside oracle of sparse prefill: selection from its definition with whole matrices, in float64."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch

from protos.model.spec import DualChunkSpec, HeadBudget, SparseSpec
from tests.support.data.dual_chunk import probabilities, relative_positions
from tests.support.oracles.dual_chunk import DualChunkOracle

TILE = 64  # rows of a cell that share a list of keys
FORCED_COLUMNS, FORCED_OFFSETS = 30, 100
ONE_CHUNK = DualChunkSpec(1 << 20, 1)  # plain attention


class SparseOracle(DualChunkOracle):
    """A checkpoint with a pattern of budgets. Only prompts above the threshold are asked of it."""

    def __init__(self, model_dir: Path, dual: DualChunkSpec | None, sparse: SparseSpec) -> None:
        super().__init__(model_dir, dual or ONE_CHUNK)
        assert sparse.patterns is not None
        self._sparse, self._patterns = sparse, sparse.patterns

    def _visible(self, layer: int, q: torch.Tensor, k: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        length, heads, _ = q.shape
        size = self._chunk - self._local
        cuts = sorted({*range(0, length, self._sparse.cell), *range(0, length, size), length})
        visible = torch.zeros(heads, length, length, dtype=torch.bool)
        for start, stop in pairwise(cuts):
            sums = self._sums(q, k, scales, start, stop)
            for head in range(heads):
                columns, offsets = _best(*(side[head] for side in sums), self._patterns[layer][head])
                for row in range(start, stop, TILE):
                    last = min(row + TILE, stop) - 1
                    reached = torch.zeros(length, dtype=torch.bool)
                    reached[columns] = True
                    for offset in offsets.tolist():
                        reached[max(0, row - offset) : max(0, last - offset + 1)] = True
                    visible[head, row : last + 1] = reached
        return visible

    def _sums(
        self, q: torch.Tensor, k: torch.Tensor, scales: torch.Tensor, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention `[H, stop]` of the last rows of the cell `start .. stop - 1` by key position and by distance."""
        first = max(start, stop - self._sparse.last_q)
        rows = torch.arange(first, stop)
        relative = relative_positions(rows, torch.arange(stop), self._chunk, self._local, continuous=True)
        mass = probabilities(q[first:stop], k[:stop], relative, self._inv_freq, scales[first:stop])
        offsets = torch.zeros(mass.shape[0], stop, dtype=mass.dtype)
        for at, row in enumerate(rows.tolist()):
            offsets[:, : row + 1] += mass[:, at, : row + 1].flip(-1)
        return mass.sum(dim=1), offsets


def _best(columns: torch.Tensor, offsets: torch.Tensor, budget: HeadBudget | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns and offsets that a head keeps, in any order, from their sums `[S]`."""
    if budget is None:
        return torch.arange(len(columns)), torch.arange(0)
    found = []
    for sums, count, forced in (
        (columns, budget.n_vertical, FORCED_COLUMNS), (offsets, budget.n_slash, FORCED_OFFSETS)
    ):  # fmt: skip
        wanted = sums.clone()
        wanted[:forced] = torch.inf
        found.append(wanted.topk(min(max(count, forced), len(sums))).indices)
    return found[0], found[1]
