"""Heads of a layer, compiled for GPUs: registers, no stack, little shared memory; divisions as on a CPU."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.triton_compile import compile_kernel, compile_to_ptx
from workers.kernels.triton.layer import heads
from workers.kernels.triton.quant import rows as quantised_rows

HEADS: dict[str, Any] = {
    "HEADS": 32, "KV_HEADS": 4, "DIM": 128, "HALF": 64, "ROTATIONS": 3, "NORM": True,
}  # fmt: skip
POINTERS = ("cos", "sin", "cos_succ", "sin_succ", "cos_inter", "sin_inter", "norms", "key_scales", "value_scales")
STRIDES = (
    "row_stride", "copy_stride", "intra_stride", "succ_stride", "inter_stride", "key_stride", "value_stride",
    "key_scale_stride", "value_scale_stride", "tokens",
)  # fmt: skip


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("cache", "limit"), [("bf16", 0), ("i8", 127), ("fp8e4nv", 448)])
def test_heads(cache: str, limit: int, capability: int) -> None:
    if cache == "fp8e4nv" and capability < 89:
        pytest.skip("e4m3 needs sm_89")
    types = dict.fromkeys(POINTERS, "*fp32") | dict.fromkeys(STRIDES, "i32") | {"slots": "*i32", "eps": "fp32"}
    types |= {"qkv": "*bf16", "q_out": "*bf16", "keys": f"*{cache}", "values": f"*{cache}"}
    constants = HEADS | {"ROWS": 16, "LIMIT": limit}
    built = compile_kernel(heads.store_heads_kernel, capability, types, constants)
    assert built.stack == 0
    assert built.registers <= 128
    assert built.shared <= 4096


def test_scales_of_codes_are_rounded_as_on_a_cpu() -> None:
    """A division that is off by a last bit moves values between two codes to the other one."""
    types = dict.fromkeys(POINTERS, "*fp32") | dict.fromkeys(STRIDES, "i32") | {"slots": "*i32", "eps": "fp32"}
    types |= {"qkv": "*bf16", "q_out": "*bf16", "keys": "*i8", "values": "*i8"}
    constants = HEADS | {"ROWS": 16, "LIMIT": 127, "NORM": False}
    ptx = compile_to_ptx(heads.store_heads_kernel, 90, types, constants)
    assert "div.rn.f32" in ptx
    assert "div.full.f32" not in ptx
    types = {"x": "*bf16", "codes": "*fp8e4nv", "scales": "*fp32"} | dict.fromkeys(
        ("x_stride", "depth", "groups"), "i32"
    )
    ptx = compile_to_ptx(quantised_rows.quantise_rows_kernel, 90, types, {"GROUPS": 16, "GROUP": 128})
    assert "div.rn.f32" in ptx
    assert "div.full.f32" not in ptx
