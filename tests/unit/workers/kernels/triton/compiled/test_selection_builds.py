"""What the selection kernels take on GPUs: no spills, shared memory, and few exchanges between threads."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

import triton.language as tl

from tests.support.triton_compile import SHARED_LIMIT, Compiled, compile_kernel
from workers.kernels.triton.sparse import adaptive, device_lists, estimate, recall, selection
from workers.kernels.triton.sparse.cells import TileShape
from workers.sparse.cuda import MAX_LAST_Q, tile_shape

CAPABILITIES = (
    pytest.param(80, marks=pytest.mark.slow, id="sm_80"),
    pytest.param(90, id="sm_90"),
    pytest.param(100, marks=pytest.mark.slow, id="sm_100"),
)
TILES = TileShape()
INTEGERS, FLOATS = "*i32", "*fp32"
SAMPLED = {"queries": "*bf16", "scales": FLOATS, "keys": "*bf16", "cells": INTEGERS, "key_head": "i64"}
SIZES = {"HEADS": 32, "GROUP": 8, "DIM": 128, "DOT": tl.bfloat16}
KEPT = {"scores": FLOATS, "cells": INTEGERS, "width": "i32", "thresholds": INTEGERS, "quotas": INTEGERS}
MULTIPLES = {"width", "key_head", "num_words"}


def build(
    kernel: Any, capability: int, types: dict[str, str], constants: dict[str, Any], warps: int = TILES.warps,
    maxnreg: int | None = None,
) -> Compiled:  # fmt: skip
    types = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    built = compile_kernel(
        kernel, capability, types, constants, num_warps=warps, maxnreg=maxnreg, multiples=tuple(MULTIPLES & set(types))
    )
    assert built.stack == 0
    assert built.count("LDL", "STL") == 0
    assert built.shared <= SHARED_LIMIT[capability]
    return built


def check_products(built: Compiled, capability: int) -> None:
    own = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[capability]
    assert built.count(own) > 0


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_log_sum_exps(capability: int) -> None:
    types = {**SAMPLED, "partial": FLOATS, "chunks": INTEGERS}
    constants = {**SIZES, "ROWS": 64, "SHARED": TILES.shared, "BLOCK": TILES.block}
    built = build(estimate.lse_kernel, capability, types, constants)
    check_products(built, capability)
    assert built.count("LDGSTS") > 0  # keys are copied ahead
    assert built.count("SHFL") <= 36


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow, id="sm_80"), 90])
def test_the_most_sampled_rows(capability: int) -> None:
    """They fit shared memory; whether registers spill is left open."""
    shape = tile_shape(MAX_LAST_Q)
    constants = {**SIZES, "ROWS": MAX_LAST_Q, "BLOCK": shape.block}
    skipped = {"SKIP_COLUMNS": 0, "SKIP_OFFSETS": 0}
    kernels: list[tuple[Any, dict[str, Any], int]] = [
        (estimate.lse_kernel, {"SHARED": shape.shared}, shape.warps),
        (estimate.sums_kernel, {"SHARED": shape.shared_sums, **skipped}, shape.warps),
        (recall.overlap_kernel, {"ADAPTIVE": False, **skipped}, 4),
    ]
    types = {
        **SAMPLED, "chunks": INTEGERS, "offsets": FLOATS, "scratch": "*fp16", "lse": FLOATS,
        "partial": FLOATS, "offset_words": INTEGERS, "totals": INTEGERS, "done": INTEGERS,
    }  # fmt: skip
    for kernel, more, warps in kernels:
        sizes, names = constants | more, kernel.arg_names
        types["columns"] = INTEGERS if kernel is recall.overlap_kernel else FLOATS
        own = {name: types.get(name, "i32") for name in names if name not in sizes}
        built = compile_kernel(kernel, capability, own, sizes, num_warps=warps, multiples=tuple(MULTIPLES & set(own)))
        assert built.shared <= SHARED_LIMIT[capability]


@pytest.mark.parametrize("forced", [(0, 0), (30, 128)])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_sums(capability: int, forced: tuple[int, int]) -> None:
    """A tile of 128 x 64 probabilities takes at most 24 shuffles a thread, those between items included."""
    types = {
        **SAMPLED, "columns": FLOATS, "offsets": FLOATS, "scratch": "*fp16", "lse": FLOATS, "chunks": INTEGERS,
    }  # fmt: skip
    constants = {**SIZES, "ROWS": 64, "SHARED": TILES.shared_sums, "BLOCK": TILES.block}
    constants |= {"SKIP_COLUMNS": forced[0], "SKIP_OFFSETS": forced[1]}
    built = build(estimate.sums_kernel, capability, types, constants)
    check_products(built, capability)
    assert built.count("SHFL") <= 24


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_held_out_rows(capability: int) -> None:
    types = {
        **SAMPLED, "partial": FLOATS, "positions": INTEGERS, "offset_words": INTEGERS, "column_words": INTEGERS,
        "chunks": INTEGERS,
    }  # fmt: skip
    built = build(recall.held_out_kernel, capability, types, {**SIZES, "ROWS": 32, "SHARED": TILES.shared})
    check_products(built, capability)
    assert built.count("SHFL") <= 36


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_pairs_kept_twice(capability: int) -> None:
    types = {
        **SAMPLED, "partial": FLOATS, "offset_words": INTEGERS, "columns": INTEGERS, "totals": INTEGERS, "lse": FLOATS,
        "done": INTEGERS,
    }  # fmt: skip
    constants = {**SIZES, "ROWS": 64, "BLOCK": TILES.block, "ADAPTIVE": False, "SKIP_COLUMNS": 0, "SKIP_OFFSETS": 0}
    check_products(build(recall.overlap_kernel, capability, types, constants, warps=4), capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_thresholds_and_lists(capability: int) -> None:
    sizes = {"HEADS": 32, "FORCED": 100, "BLOCK": selection._BLOCK}
    built = build(selection.threshold_kernel, capability, {**KEPT, "counts": INTEGERS}, sizes, selection._WARPS)
    assert built.count("ATOMG", "RED") == 0
    types = {**KEPT, "words": INTEGERS, "indices": INTEGERS, "totals": INTEGERS, "masses": FLOATS, "done": INTEGERS}
    build(selection.compact_kernel, capability, types, {**sizes, "ADAPTIVE": False, "LISTED": True}, selection._WARPS)
    names = (
        "bitmap", "blocks", "counts", "num_blocks", "num_columns", "nears", "fars", "ends", "words", "totals",
        "column_totals", "dense", "cells",
    )  # fmt: skip
    constants = {"HEADS": 32, "TILE": 128, "BLOCK": 1024}
    warps, registers = device_lists.OPTIONS["num_warps"], device_lists.OPTIONS["maxnreg"]
    build(device_lists.lists_kernel, capability, dict.fromkeys(names, INTEGERS), constants, warps, registers)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_adaptive_budgets(capability: int) -> None:
    state = {
        **dict.fromkeys(("thresholds", "quotas", "lengths", "done", "cells"), INTEGERS), "columns": FLOATS,
        "groups": FLOATS, **dict.fromkeys(("sums", "base", "kept", "goal"), "*fp64"),
    }  # fmt: skip
    build(adaptive.propose_kernel, capability, state, {"HEADS": 32, "BLOCK": adaptive._BLOCK})
    types = {**state, "words": INTEGERS, "totals": INTEGERS, "masses": FLOATS}
    build(adaptive.groups_kernel, capability, types, {"HEADS": 32, "FORCED": 2, "BLOCK": adaptive._BLOCK}, warps=4)
