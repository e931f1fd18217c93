"""Matrices of compressed-tensors are read as they were packed, and as that library reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from protos.model.quant.scheme import Format, QuantScheme
from protos.stage.messages import Span
from tests.support.quant.reading import SIZES, check_regions, store
from workers.quant.registry import read_matrix


@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("group", [0, 16, 32, 128])
def test_packed_values(rows: int, columns: int, bits: int, has_zeros: bool, group: int) -> None:
    scheme = QuantScheme("pack-quantized", bits, group=group, has_zeros=has_zeros)
    check_regions(scheme, *store(scheme, rows, columns, torch.bfloat16))


@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_in_the_order_of_activation(bits: int) -> None:
    scheme = QuantScheme("pack-quantized", bits, group=32, ordered=True)
    check_regions(scheme, *store(scheme, 40, 96, shuffled=True), columns=False)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize(("form", "group"), [("", 0), ("row", 0), ("scalar", 0), ("", 16), ("", 128)])
@pytest.mark.parametrize("form_of", ["int8", "int8 with zeros", "fp8"])
def test_bytes(rows: int, columns: int, form: str, group: int, form_of: str) -> None:
    if form == "scalar" and form_of.endswith("zeros"):
        form = "row"  # zero points with one scale of a whole matrix are not a strategy
    is_float = form_of == "fp8"
    kind: Format = "float-quantized" if is_float else "int-quantized"
    scheme = QuantScheme(kind, 8, is_float=is_float, group=group, has_zeros=form_of.endswith("zeros"))
    check_regions(scheme, *store(scheme, rows, columns, torch.float32, form=form))


def test_blocks() -> None:
    scheme = QuantScheme("float-quantized", 8, is_float=True, group=64, block_rows=32)
    check_regions(scheme, *store(scheme, 136, 272, torch.bfloat16))


CASES: list[tuple[Format, dict[str, Any]]] = [
    ("pack-quantized", {"num_bits": bits, "strategy": strategy, "symmetric": symmetric})
    for bits in (4, 8)
    for strategy in ("group", "channel")
    for symmetric in (True, False)
]
CASES += [
    ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": True}),
    ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    ("int-quantized", {"num_bits": 8, "strategy": "group", "symmetric": True}),
    ("float-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": True, "type": "float"}),
    ("float-quantized", {"num_bits": 8, "strategy": "tensor", "symmetric": True, "type": "float"}),
    ("float-quantized", {"num_bits": 8, "strategy": "block", "symmetric": True, "type": "float"}),
]


@pytest.mark.parametrize(("rows", "columns"), [(40, 96), (136, 256)])
@pytest.mark.parametrize(("form", "args"), CASES, ids=str)
def test_the_library_reads_the_same(form: Format, args: dict[str, Any], rows: int, columns: int) -> None:
    pytest.importorskip("compressed_tensors", reason="comes with the test extra")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    group = 32 if args["strategy"] == "group" else 128 if args["strategy"] == "block" else 0
    blocks = 128 if args["strategy"] == "block" else 0
    if blocks and rows % blocks:
        rows, columns = 256, 384  # the library wants whole blocks
    scheme = QuantScheme(
        form, args["num_bits"], is_float="type" in args, group=group, block_rows=blocks,
        has_zeros=not args["symmetric"],
    )  # fmt: skip
    shape = "scalar" if args["strategy"] == "tensor" else ""
    made, stored = store(scheme, rows, columns, torch.float32, form=shape)
    more = {"group_size": group} if args["strategy"] == "group" else {"block_structure": [128, 128]} if blocks else {}
    library_scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args, **more))
    name = "naive-quantized" if form in ("int-quantized", "float-quantized") else form
    library = BaseCompressor.get_value_from_registry(name)
    theirs = library.decompress(dict(stored.tensors), library_scheme)["weight"]
    ours = read_matrix(stored, scheme, Span(0, rows), Span(0, columns)).dequantize(torch.float32)
    assert torch.equal(ours, made.values)
    assert torch.equal(ours, theirs.float())
