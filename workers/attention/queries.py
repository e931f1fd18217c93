"""Query rows under the rotations an attention plan needs.

Legend: `T` rows, `H` query heads of the shard, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Callable
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

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Queries:
        """Return the rows under each rotation, changed by one function."""
        succ, inter = (None if rows is None else change(rows) for rows in (self.succ, self.inter))
        return Queries(change(self.intra), succ, inter)

    def __getitem__(self, rows: slice | torch.Tensor) -> Queries:
        return self.map(lambda each: each[rows])
