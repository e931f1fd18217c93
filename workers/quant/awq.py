"""AWQ, version gemm: 4-bit codes packed along the outputs, `qweight [K, N / 8]`, in int32.

Eight outputs of an int32 are in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on (`awq.utils.packing_utils`).
"""

from __future__ import annotations

import torch

from protos.model.quant.scheme import QuantScheme
from protos.stage.messages import Span
from workers.quant.stored import StoredMatrix, group_size, outward, unpack_words, words
from workers.quant.weight import QuantizedWeight, pack_nibbles

_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # of the outputs in an int32
_WORD = 8


def read(stored: StoredMatrix, scheme: QuantScheme, rows: Span, columns: Span) -> QuantizedWeight:
    """Return rows and columns of a matrix.

    Raises:
        ValueError: the columns cut groups to less than 16.
    """
    group = group_size(scheme, stored.columns)
    wide, all_rows = outward(columns, group, stored.columns), outward(rows, _WORD, stored.rows)
    first = rows.start - all_rows.start

    def outputs(part: str, region: slice) -> torch.Tensor:
        """Return values `[n, region]` of the rows."""
        values = unpack_words(stored.read(part, region, words(all_rows, _WORD)), 4)
        values = values.view(values.shape[0], -1, _WORD)[:, :, _PLACES].flatten(1)
        return values[:, first : first + rows.size].T

    groups = words(wide, group)
    weight = QuantizedWeight(
        "int4", group, pack_nibbles(outputs("qweight", slice(*wide))),
        stored.read("scales", groups, slice(*rows)).T.contiguous(), outputs("qzeros", groups).contiguous(),
    )  # fmt: skip
    return weight.columns(columns.start - wide.start, columns.stop - wide.start)
