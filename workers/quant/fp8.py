"""FP8 e4m3 as in the official checkpoints of Qwen3 and DeepSeek: a scale a block of 128 x 128, a row, or a matrix.

`weight_scale_inv` is what a stored weight is multiplied by, in spite of its name. Without blocks it is `weight_scale`.
"""

from __future__ import annotations

from protos.model.quant.scheme import QuantScheme
from protos.stage.messages import Span
from workers.quant.compressed_tensors import read_bytes
from workers.quant.stored import StoredMatrix
from workers.quant.weight import QuantizedWeight


def read(stored: StoredMatrix, scheme: QuantScheme, rows: Span, columns: Span) -> QuantizedWeight:
    """Return rows and columns of a matrix; the scale of a block is repeated for each of its rows.

    Raises:
        ValueError: the columns cut groups to less than 16.
    """
    return read_bytes(stored, scheme, rows, columns, "weight_scale_inv" if scheme.group else "weight_scale")
