"""What joining parts of attention takes on GPUs."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from tests.support.triton_compile import compile_kernel
from workers.kernels.triton import merge


@pytest.mark.parametrize("parts", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "capability",
    [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)],
)
def test_it_needs_few_registers(capability: int, parts: int) -> None:
    constants = {"PARTS": parts, "ROWS": 16, "DIM": 128, "WIDTH": 128}
    names = [name for name in merge.merge_parts_kernel.arg_names if name not in constants]
    pointers = {name: "*bf16" for name in names if name.startswith(("merged", "out_"))}
    pointers |= {
        name: "*fp32" for name in names if name.startswith("lse_") and "row" not in name and "head" not in name
    }
    signature = dict.fromkeys(names, "i32") | pointers
    strides = tuple(name for name in names if name.startswith(("row_", "head_")))
    kernel = compile_kernel(merge.merge_parts_kernel, capability, signature, constants, multiples=strides, num_warps=4)
    assert kernel.stack == 0
    assert kernel.registers <= 128
    assert kernel.count("LDL", "STL") == 0
