"""compressed-tensors: `pack-quantized` (int4 and int8 in int32), `int-quantized` (int8) and `float-quantized` (FP8).

Packed codes and zero points are unsigned: value + 2^(bits - 1) (`compressors/pack_quantized/helpers.py`); codes are
packed along the inputs, zero points along the outputs.
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
    row_values,
    signed,
    unpack_words,
    words,
    zero_points,
)
from workers.quant.weight import QuantizedWeight


def read_packed(stored: StoredMatrix, scheme: QuantScheme, rows: Span, columns: Span) -> QuantizedWeight:
    """Return rows and columns of a matrix of the format pack-quantized.

    Raises:
        CheckpointError: groups of several sizes.
        ValueError: the columns cut groups to less than 16, or are a part of inputs in the order of activation.
    """
    bits, group = scheme.bits, group_size(scheme, stored.columns)
    count = 32 // bits
    order = activation_order(stored, "weight_g_idx", group)
    wide = Span(0, stored.columns) if order is not None else outward(columns, math.lcm(group, count), stored.columns)
    codes = codes_of_bytes(stored.read("weight_packed", slice(*rows), words(wide, count)))
    codes = signed(codes[:, : wide.size * bits // 8], bits)
    if order is not None:
        codes = reorder(codes, order, bits)
    groups = words(wide, group)
    scales = row_values(stored, "weight_scale", scheme, rows, groups)
    zeros = None
    if scheme.has_zeros:
        all_rows = outward(rows, count, stored.rows)
        packed = stored.read("weight_zero_point", words(all_rows, count), groups)
        first = rows.start - all_rows.start
        values = unpack_words(packed.T, bits)[:, first : first + rows.size].T.contiguous()
        zeros = zero_points(values, bits)
    weight = QuantizedWeight("int4" if bits == 4 else "int8", group, codes, scales, zeros, order)
    return weight.columns(columns.start - wide.start, columns.stop - wide.start)


def read_bytes(
    stored: StoredMatrix, scheme: QuantScheme, rows: Span, columns: Span, scale: str = "weight_scale"
) -> QuantizedWeight:  # fmt: skip
    """Return rows and columns of a matrix with one code a byte: int8 or FP8.

    Raises:
        ValueError: the columns cut groups to less than 16.
    """
    group = group_size(scheme, stored.columns)
    wide = outward(columns, group, stored.columns)
    groups = words(wide, group)
    codes = stored.read("weight", slice(*rows), slice(*wide)).view(torch.uint8)
    zeros = row_values(stored, "weight_zero_point", scheme, rows, groups) if scheme.has_zeros else None
    weight = QuantizedWeight(
        "float8_e4m3" if scheme.is_float else "int8", group, codes,
        row_values(stored, scale, scheme, rows, groups), zeros,
    )  # fmt: skip
    return weight.columns(columns.start - wide.start, columns.stop - wide.start)
