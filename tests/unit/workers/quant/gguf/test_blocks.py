"""Every block type against the reference library, bit by bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from protos.model.gguf.file import READ
from tests.support.gguf_files import random_blocks
from workers.quant.gguf.blocks import KINDS, unpack


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns", "scale"), [(1, 256, 1.0), (37, 768, 0.01), (2, 1024, 1e-6)])
def test_values_are_the_references(kind: str, rows: int, columns: int, scale: float) -> None:
    data = random_blocks(Kind[kind], (rows, columns), seed=rows, scale=scale)
    unpacked = unpack(kind, torch.from_numpy(data))
    assert np.array_equal(unpacked.dequantize().numpy(), gguf.dequantize(data, Kind[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_of_a_type_appears(kind: str) -> None:
    unpacked = unpack(kind, torch.from_numpy(random_blocks(Kind[kind], (64, 1024))))
    assert len(unpacked.codes.unique()) == 2**unpacked.bits
    assert unpacked.group == (16 if kind == "Q6_K" else 32)
    assert (unpacked.codes.dtype == torch.uint8) == (unpacked.minima is not None)
    assert str(unpacked.bits) == kind[1]


def test_sizes_are_those_of_the_file() -> None:
    sizes = {kind.name: kind.size for kind in READ.values() if kind.elements > 1}
    assert {kind: size for kind, (size, _) in KINDS.items()} == sizes
