"""A quantised matrix whose tensors are in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class MatrixInMemory:
    """A `StoredMatrix` of `[rows, columns]`."""

    rows: int
    columns: int
    tensors: dict[str, torch.Tensor]

    def has(self, part: str) -> bool:
        return part in self.tensors

    def read(self, part: str, *region: slice) -> torch.Tensor:
        return self.tensors[part][region] if region else self.tensors[part]

    def error(self, part: str, problem: str) -> Exception:
        return LookupError(f"{part}: {problem}")
