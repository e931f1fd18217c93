"""Query rows under the rotations an attention plan needs.

Legend: `T` rows, `H` query heads of the shard, `D` head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workers.attention.plan import Rotation


@dataclass(frozen=True, slots=True)
class Queries:
    """Rows `[T, H, D]` each; unit stride in `D`, any stride of rows and heads. None: the plan has no such region."""

    intra: torch.Tensor
    succ: torch.Tensor | None = None
    inter: torch.Tensor | None = None

    def of(self, rotation: Rotation) -> torch.Tensor:
        """The rows that meet keys tagged with `rotation`."""
        rows = (self.intra, self.succ, self.inter)[rotation]
        assert rows is not None, f"the plan needs {rotation.name} queries"
        return rows

    def __getitem__(self, rows: slice) -> Queries:
        succ, inter = self.succ, self.inter
        return Queries(self.intra[rows], None if succ is None else succ[rows], None if inter is None else inter[rows])
