"""Every format that is accepted has a reader."""

from __future__ import annotations

from typing import get_args

import pytest

from protos.model.quant.scheme import Format, QuantScheme
from tests.support.quant.reading import check_regions, store


@pytest.mark.parametrize("form", [form for form in get_args(Format) if form != "gguf"])  # read by blocks
def test_every_format_is_read(form: Format) -> None:
    bits = 4 if form in ("gptq", "awq", "pack-quantized") else 8
    is_float = form in ("fp8", "float-quantized")
    scheme = QuantScheme(form, bits, is_float=is_float, group=32, has_zeros=form == "awq", block_rows=8 * is_float)
    check_regions(scheme, *store(scheme, 40, 96))
