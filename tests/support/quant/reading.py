"""Whole matrices and regions of them, read from packed tensors and compared with what was packed."""

from __future__ import annotations

import torch

from protos.model.quant.parts import parts_of
from protos.model.quant.scheme import QuantScheme
from protos.stage.messages import Span
from tests.support.quant.checkpoints import Quantized, parts, quantize
from tests.support.quant.stored_matrix import MatrixInMemory
from workers.quant.registry import read_matrix

SIZES = [(8, 32), (40, 96), (24, 160), (136, 272)]
DTYPES = {torch.int32: "I32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int8: "I8"}
DTYPES |= {torch.float8_e4m3fn: "F8_E4M3", torch.int64: "I64"}


def random_matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)) * 0.05


def store(
    scheme: QuantScheme, rows: int, columns: int, dtype: torch.dtype = torch.float16, *, form: str = "",
    shuffled: bool = False,
) -> tuple[Quantized, MatrixInMemory]:  # fmt: skip
    """A random matrix, and its tensors, which are those that the format is said to have."""
    made = quantize(random_matrix(rows, columns), scheme, dtype, shuffled, form == "scalar")
    stored = MatrixInMemory(rows, columns, parts(made, scheme, form))
    expected = {part.name: part for part in parts_of(scheme, rows, columns)}
    assert set(stored.tensors) <= set(expected)
    for name, part in expected.items():
        assert part.optional or name in stored.tensors
        if name in stored.tensors:
            assert tuple(stored.tensors[name].shape) in part.shapes, name
            assert DTYPES[stored.tensors[name].dtype] in part.dtypes, name
    return made, stored


def check_regions(scheme: QuantScheme, made: Quantized, stored: MatrixInMemory, columns: bool = True) -> None:
    """Read all of it, rows at odd places, and columns that halve a group."""
    rows, depth = stored.rows, stored.columns
    whole = read_matrix(stored, scheme, Span(0, rows), Span(0, depth))
    assert torch.equal(whole.dequantize(torch.float32), made.values)
    regions = [(Span(3, rows - 1), Span(0, depth)), (Span(rows - 1, rows), Span(0, depth))]
    if columns:
        regions += [(Span(1, rows), Span(0, 16)), (Span(0, 5), Span(16, depth)), (Span(2, 3), Span(16, 32))]
    for one, other in regions:
        part = read_matrix(stored, scheme, one, other)
        assert part.shape == (one.size, other.size)
        assert torch.equal(part.dequantize(torch.float32), made.values[slice(*one), slice(*other)])
