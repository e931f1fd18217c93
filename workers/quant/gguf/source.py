"""Tensors of a GGUF file, region by region from the mapped file: quantised as they are, or as plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch

from protos.model.checkpoint import CheckpointError, StoredTensor
from protos.model.gguf.file import GgufError, GgufTensor, read_gguf
from protos.model.gguf.names import is_turned, stored_rows
from workers.quant.gguf.blocks import KINDS, unpack
from workers.quant.gguf.convert import to_weight
from workers.quant.weight import QuantizedWeight

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufSource:
    """A mapped file; usable as a context manager. Regions are copied: nothing of it stays mapped afterwards."""

    def __init__(self, path: Path, head_dim: int) -> None:
        """Map a file. `head_dim`: width of a head, for files that keep the rows of a head in another order.

        Raises CheckpointError: the file cannot be read.
        """
        try:
            self._file = read_gguf(path)
            self._data = np.memmap(path, np.uint8, mode="r")
        except (GgufError, OSError, ValueError) as error:
            raise CheckpointError(str(error)) from error
        self._head_dim = head_dim

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        del self._data

    def quantized(self, name: str, stored: StoredTensor, rows: range, exact: bool = False) -> QuantizedWeight:
        """Return whole rows of a canonical matrix in the internal layout; its type must be one of blocks."""
        data = self._rows(self._file.tensors[stored.name], name, stored.expert, rows, slice(None))
        return to_weight(unpack(stored.dtype, data), exact)

    def plain(self, name: str, stored: StoredTensor, rows: range, columns: range | None = None) -> torch.Tensor:
        """Return `[rows, columns]` of a canonical matrix, or rows of a vector: float32, or the type of the file."""
        tensor = self._file.tensors[stored.name]
        kind = tensor.kind
        if columns is None:  # a vector: one row in the file
            turned = is_turned(self._file.architecture, name)
            vector = self._row_bytes(tensor, None, range(1), slice(None)).view(_PLAIN[kind.name])[0]
            return vector[stored_rows(rows, self._head_dim)] if turned else vector[rows.start : rows.stop]
        first, last = columns.start // kind.elements, -(-columns.stop // kind.elements)
        data = self._rows(tensor, name, stored.expert, rows, slice(first * kind.size, last * kind.size))
        values = unpack(kind.name, data).dequantize() if kind.name in KINDS else data.view(_PLAIN[kind.name])
        start = columns.start - first * kind.elements
        return values[:, start : start + len(columns)]

    def _rows(
        self, tensor: GgufTensor, name: str, expert: int | None, rows: range, part: slice
    ) -> torch.Tensor:  # fmt: skip
        if not is_turned(self._file.architecture, name):
            return self._row_bytes(tensor, expert, rows, part)
        width = self._head_dim  # whole heads are read, since their rows lie in another order
        first, last = rows.start // width * width, -(-rows.stop // width) * width
        heads = self._row_bytes(tensor, expert, range(first, last), part)
        return heads[[row - first for row in stored_rows(rows, width)]]

    def _row_bytes(
        self, tensor: GgufTensor, expert: int | None, rows: Sequence[int], part: slice
    ) -> torch.Tensor:  # fmt: skip
        """Return the bytes `[rows, bytes of part]` of neighbouring rows of a matrix or of one expert's."""
        skipped = (expert or 0) * tensor.shape[-2] if expert is not None else 0
        start = tensor.start + (skipped + rows[0]) * tensor.row_bytes
        block = self._data[start : start + len(rows) * tensor.row_bytes].reshape(len(rows), tensor.row_bytes)
        return torch.from_numpy(np.array(block[:, part]))
