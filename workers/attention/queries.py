"""Query rows under the rotations an attention plan needs.

Legend: `T` rows, `H` query heads of the shard, `D` head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workers.attention.plan import Rotation


@dataclass(frozen=True, slots=True)
class Queries:
    """The rows `[T, H, D]` under each rotation: unit stride in `D`, any strides of rows and heads.

    None where the plan has no region of that rotation.
    """

    intra: torch.Tensor
    succ: torch.Tensor | None = None
    inter: torch.Tensor | None = None

    def of(self, rotation: Rotation) -> torch.Tensor:
        """Return the rows that meet keys tagged with `rotation`."""
        rows = (self.intra, self.succ, self.inter)[rotation]
        assert rows is not None, f"the plan needs {rotation.name} queries"
        return rows

    def __getitem__(self, rows: slice) -> Queries:
        succ, inter = self.succ, self.inter
        return Queries(self.intra[rows], None if succ is None else succ[rows], None if inter is None else inter[rows])
