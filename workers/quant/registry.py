"""The readers of quantised matrices by format."""

from __future__ import annotations

from collections.abc import Callable

from protos.model.quant.scheme import QuantScheme
from protos.stage.messages import Span
from workers.quant import awq, compressed_tensors, fp8, gptq
from workers.quant.stored import StoredMatrix
from workers.quant.weight import QuantizedWeight

Reader = Callable[[StoredMatrix, QuantScheme, Span, Span], QuantizedWeight]

_READERS: dict[str, Reader] = {
    "gptq": gptq.read,
    "awq": awq.read,
    "pack-quantized": compressed_tensors.read_packed,
    "int-quantized": compressed_tensors.read_bytes,
    "float-quantized": compressed_tensors.read_bytes,
    "fp8": fp8.read,
}


def read_matrix(stored: StoredMatrix, scheme: QuantScheme, rows: Span, columns: Span) -> QuantizedWeight:
    """Return rows and columns of a stored matrix; see the readers for their errors."""
    return _READERS[scheme.format](stored, scheme, rows, columns)
