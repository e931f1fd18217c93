"""The tensors that store one quantised matrix: names, shapes and types.

Legend: `N` rows (outputs), `K` columns (inputs), `G` groups of a row.
"""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

from protos.model.quant.scheme import QuantScheme

FLOATS = ("F16", "BF16", "F32")
_CODES = ("I8", "F8_E4M3")
# stored beside quantised matrices for activations and KV, which are not quantised that way here
_UNUSED = ("input_scale", "input_zero_point", "output_scale", "q_scale", "k_scale", "v_scale", "kv_scale")


class Part(NamedTuple):
    """One tensor of a matrix; its name is that of the module, a dot, and this one."""

    name: str
    shapes: tuple[tuple[int, ...], ...]  # those it may have
    dtypes: tuple[str, ...]
    optional: bool = False


def parts_of(scheme: QuantScheme, rows: int, columns: int) -> list[Part]:
    """Return the tensors of a matrix `[N, K]`, the one with the codes first."""
    words = 32 // scheme.bits  # codes of an int32
    groups = scheme.groups_of(columns)
    packed_rows, packed_columns = -(-rows // words), -(-columns // words)
    if scheme.format == "gptq":
        return [
            Part("qweight", ((packed_columns, rows),), ("I32",)),
            Part("qzeros", ((groups, packed_rows),), ("I32",)),
            Part("scales", ((groups, rows),), FLOATS),
            Part("g_idx", ((columns,),), ("I32",), optional=not scheme.ordered),
        ]
    if scheme.format == "awq":
        return [
            Part("qweight", ((columns, packed_rows),), ("I32",)),
            Part("qzeros", ((groups, packed_rows),), ("I32",)),
            Part("scales", ((groups, rows),), FLOATS),
        ]
    if scheme.format == "pack-quantized":
        return [
            Part("weight_packed", ((rows, packed_columns),), ("I32",)),
            Part("weight_scale", _scale_shapes(scheme, rows, groups), FLOATS),
            Part("weight_shape", ((2,),), ("I64", "I32"), optional=True),
            Part("weight_zero_point", ((packed_rows, groups),), ("I32",), optional=not scheme.has_zeros),
            Part("weight_g_idx", ((columns,),), ("I32",), optional=True),
        ]
    scale = "weight_scale_inv" if scheme.format == "fp8" and scheme.group else "weight_scale"
    shapes = _scale_shapes(scheme, rows, groups)
    parts = [Part("weight", ((rows, columns),), _CODES[1:] if scheme.is_float else _CODES[:1])]
    parts.append(Part(scale, shapes, FLOATS))
    if scheme.format == "int-quantized":
        parts.append(Part("weight_zero_point", shapes, ("I8",), optional=not scheme.has_zeros))
    return parts


def _scale_shapes(scheme: QuantScheme, rows: int, groups: int) -> tuple[tuple[int, ...], ...]:
    if scheme.block_rows:
        return ((-(-rows // scheme.block_rows), groups),)
    if scheme.group:
        return ((rows, groups),)
    return (rows, 1), (rows,), (1,), (1, 1), ()


def is_quantized(scheme: QuantScheme | None, module: str, stored: Container[str], dtype: str | None) -> bool:
    """Return whether a module's matrix is stored in parts; `dtype` is that of its `weight`, None for none."""
    if scheme is None:
        return False
    codes = parts_of(scheme, 1, 1)[0].name
    return dtype in _CODES if codes == "weight" else f"{module}.{codes}" in stored


def is_unused_part(name: str) -> bool:
    """Return whether a tensor belongs to the quantisation of activations or of KV."""
    return name.rpartition(".")[2] in _UNUSED
