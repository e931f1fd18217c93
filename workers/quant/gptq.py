"""GPTQ: codes packed along the inputs, `qweight [K * bits / 32, N]`, in int32.

In the first format stored zero points are one too small, for all of an int32 at once: `qzeros + 0x11111111` is what
GPTQModel computes (`convert_gptq_v1_to_v2_format_module`), and a borrow between two of them is undone with it. `g_idx`
has the group of every input; with `desc_act` they are in the order of activation.
"""

from __future__ import annotations

import math

import torch

from protos.model.quant.scheme import QuantScheme
from protos.stage.messages import Span
from workers.quant.stored import (
    StoredMatrix,
    activation_order,
    codes_of_bytes,
    group_size,
    outward,
    reorder,
    signed,
    unpack_words,
    words,
    zero_points,
)
from workers.quant.weight import QuantizedWeight

_ONES = {4: 0x11111111, 8: 0x01010101}  # one in each of the zero points of an int32


def read(stored: StoredMatrix, scheme: QuantScheme, rows: Span, columns: Span) -> QuantizedWeight:
    """Return rows and columns of a matrix.

    Raises:
        CheckpointError: zero points differ although the checkpoint is symmetric; groups of several sizes.
        ValueError: the columns cut groups to less than 16, or are a part of inputs in the order of activation.
    """
    bits, group = scheme.bits, group_size(scheme, stored.columns)
    count = 32 // bits
    order = activation_order(stored, "g_idx", group)
    wide = Span(0, stored.columns) if order is not None else outward(columns, math.lcm(group, count), stored.columns)
    packed = codes_of_bytes(stored.read("qweight", words(wide, count), slice(*rows)))  # [m, 4 n]
    depth = wide.size * bits // 8
    codes = packed.view(packed.shape[0], rows.size, 4).transpose(0, 1).reshape(rows.size, -1)[:, :depth]
    codes = signed(codes, bits)
    if order is not None:
        codes = reorder(codes, order, bits)
    groups = words(wide, group)
    weight = QuantizedWeight(
        "int4" if bits == 4 else "int8", group, codes,
        stored.read("scales", groups, slice(*rows)).T.contiguous(),
        _zeros(stored, scheme, rows, groups), order,
    )  # fmt: skip
    return weight.columns(columns.start - wide.start, columns.stop - wide.start)


def _zeros(stored: StoredMatrix, scheme: QuantScheme, rows: Span, groups: slice) -> torch.Tensor | None:
    """Return the zero points `[n, g]`; None where all are those of a symmetric checkpoint."""
    count = 32 // scheme.bits
    wide = outward(rows, count, stored.rows)
    packed = stored.read("qzeros", groups, words(wide, count))
    if scheme.zero_offset:
        packed = packed + _ONES[scheme.bits]
    first = rows.start - wide.start
    values = unpack_words(packed, scheme.bits)[:, first : first + rows.size].T.contiguous()
    if scheme.has_zeros:
        return zero_points(values, scheme.bits)
    if not bool((values == 1 << (scheme.bits - 1)).all()):
        raise stored.error("qzeros", "zero points differ, and config.json says sym: true; set it to false")
    return None
