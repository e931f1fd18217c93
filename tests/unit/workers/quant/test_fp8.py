"""FP8 matrices with scales of blocks, rows and whole matrices are read as they were packed."""

from __future__ import annotations

import pytest
import torch

from protos.model.quant.scheme import QuantScheme
from tests.support.quant.reading import SIZES, check_regions, store


@pytest.mark.parametrize(("rows", "columns"), [*SIZES, (300, 384)])
@pytest.mark.parametrize("block", [(128, 128), (32, 64), (1, 32)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks(rows: int, columns: int, block: tuple[int, int], dtype: torch.dtype) -> None:
    scheme = QuantScheme("fp8", 8, is_float=True, group=block[1], block_rows=block[0])
    check_regions(scheme, *store(scheme, rows, columns, dtype))


@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("form", ["", "row", "scalar"])
def test_without_blocks(rows: int, columns: int, form: str) -> None:
    scheme = QuantScheme("fp8", 8, is_float=True)
    check_regions(scheme, *store(scheme, rows, columns, torch.float32, form=form))
