"""AWQ matrices are read as they were packed."""

from __future__ import annotations

import pytest
import torch

from protos.model.quant.scheme import QuantScheme
from protos.stage.messages import Span
from tests.support.quant.reading import SIZES, check_regions, store
from tests.support.quant.stored_matrix import MatrixInMemory
from workers.quant import awq


@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("group", [0, 16, 32, 128])
def test_values(rows: int, columns: int, group: int) -> None:
    scheme = QuantScheme("awq", 4, group=group, has_zeros=True)
    check_regions(scheme, *store(scheme, rows, columns))


def test_the_order_of_the_outputs_in_an_int32() -> None:
    word = 0x76543210 - (1 << 32) if 0x76543210 >> 31 else 0x76543210
    tensors = {
        "qweight": torch.full((16, 1), word, dtype=torch.int32), "scales": torch.ones(1, 8, dtype=torch.float16),
        "qzeros": torch.zeros(1, 1, dtype=torch.int32),
    }  # fmt: skip
    scheme = QuantScheme("awq", 4, group=16, has_zeros=True)
    weight = awq.read(MatrixInMemory(8, 16, tensors), scheme, Span(0, 8), Span(0, 16))
    assert weight.dequantize(torch.float32)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
