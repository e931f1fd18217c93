"""Decode attention compiled for GPUs: within the limits of what is shipped."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.triton_compile import compile_kernel
from workers.bench.builds.limits import violations
from workers.bench.builds.shipped_layer import DECODE
from workers.kernels.triton.layer import decode

FLOATS = ("key_scales", "value_scales", "scales", "partial", "sums")
STRIDES = ("rotation_stride", "key_scale_stride", "value_scale_stride", "table_stride", "distance", "splits")
SLOTS = 1 << 20


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("cache", "kind", "limit"), [("bf16", "bf16", 0), ("int8", "i8", 127), ("fp8", "fp8e4nv", 448)]
)
def test_attention(cache: str, kind: str, limit: int, capability: int) -> None:
    if cache == "fp8" and capability < 89:
        pytest.skip("e4m3 needs sm_89")
    import triton.language as tl

    types = dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(STRIDES, "i32")
    types |= dict.fromkeys(("tables", "places", "lengths"), "*i32")
    types |= {"q": "*bf16", "keys": f"*{kind}", "values": f"*{kind}"}
    constants: dict[str, Any] = {
        "row_stride": 4096, "head_stride": 128, "key_stride": SLOTS * 128, "value_stride": SLOTS * 128,
        "GROUP": 8, "ROWS": 16, "DIM": 128, "WIDTH": 128, "PAGE": 64, "BLOCK": 64, "ROTATIONS": 3, "LIMIT": limit,
        "DOT": tl.bfloat16,
    }  # fmt: skip
    options = decode.launch_options(limit)
    built = compile_kernel(decode.attend_splits_kernel, capability, types, constants, **options)
    assert violations(built, DECODE[cache], capability) == []
    assert built.count("HMMA") >= 32
    assert built.count("F2F") == 0  # a conversion at a quarter of the rate at which e4m3 comes from memory
