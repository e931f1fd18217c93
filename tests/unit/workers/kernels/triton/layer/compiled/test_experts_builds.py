"""Experts compiled for GPUs: tiles that fit registers and shared memory, and matrix units of each generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.triton_compile import SHARED_LIMIT, Compiled, compile_kernel
from workers.kernels.triton.layer import experts, routing
from workers.kernels.triton.layer.experts import Tiling

HIDDEN, INTER, EXPERTS, TOP_K = 2048, 768, 128, 8  # of Qwen3-30B-A3B
UNITS = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    ("tokens", "capability"), [(1, 80), (1, 90), (1024, 90), (32768, 80), (32768, 90), (32768, 100)]
)
def test_products(tokens: int, gated: bool, capability: int) -> None:
    import triton.language as tl

    tiling = Tiling.of(tokens * TOP_K, EXPERTS, torch.bfloat16, gated, divmod(capability, 10))
    depth, width = (HIDDEN, INTER) if gated else (INTER, HIDDEN)
    types = dict.fromkeys(("x", "weight", "out"), "*bf16") | {"order": "*i32", "totals": "*i32", "experts": "i32"}
    constants = {
        "x_stride": depth, "TOP_K": TOP_K, "DEPTH": depth, "WIDTH": width, "GATED": gated, "ROWS": tiling.rows,
        "COLUMNS": tiling.columns, "STEP": tiling.step, "BLOCK": EXPERTS, "DOT": tl.bfloat16,
    }  # fmt: skip
    sizes = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    built = compile_kernel(experts.grouped_kernel, capability, types, constants, **sizes)
    assert built.stack == 0
    assert built.shared <= SHARED_LIMIT[capability]
    assert built.count("HMMA" if tiling.rows < 64 else UNITS[capability])
    assert built.count("LDGSTS") >= 16


def build(name: str, types: str, constants: dict[str, Any], warps: int = 4) -> Compiled:
    """Compile a kernel for sm_90; `types` are those of its parameters in order."""
    kernel = getattr(routing, f"{name}_kernel")
    return compile_kernel(
        kernel, 90, dict(zip(kernel.arg_names, types.split(), strict=False)), constants, num_warps=warps
    )


@pytest.mark.parametrize(("single", "count", "block"), [(True, 128, 128), (False, 128, 128), (False, 32, 512)])
def test_sorting(single: bool, count: int, block: int) -> None:
    constants = {"COUNT": count, "BLOCK": block}
    types = "*i64 *i32 *i32 *i32 *i32 i32 i32 i32 i32"
    assert build("place", types, constants | {"SINGLE": single}, 8).stack == 0
    assert build("count", "*i64 *i32 i32 i32 i32 i32", constants).stack == 0
    assert build("scan", "*i32 *i32 i32", {"SCANNED": 1024}).stack == 0
