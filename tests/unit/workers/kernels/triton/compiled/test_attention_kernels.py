"""What attention and staging kernels take on GPUs: registers without spills, shared memory, the matrix instructions."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

import triton.language as tl

from tests.support.triton_compile import SHARED_LIMIT, Compiled, compile_kernel
from workers.kernels.triton import dense_attention, entries, sparse_attention, staging, tiles

CAPABILITIES = (
    pytest.param(80, marks=pytest.mark.slow, id="sm_80"),
    pytest.param(90, id="sm_90"),
    pytest.param(100, marks=pytest.mark.slow, id="sm_100"),
)
DIMS = (pytest.param(64, marks=pytest.mark.slow), 128)
QUERIES = {
    f"{side}{part}": kind
    for side in ("intra", "succ", "inter")
    for part, kind in (("", "*bf16"), ("_row", "i32"), ("_head", "i32"))
}
ROWS = {
    "scales": "*fp32",
    "out": "*bf16",
    "out_row": "i32",
    "start": "i32",
    "length": "i32",
    "tiles": "i32",
    "last_block": "i32",
}
LAYOUT = {"head_rows": "i32", "group": "i32"}


def sides(capability: int, keys: int, dim: int) -> dict[str, str]:
    kind = f"tensordesc<bf16[{keys},{dim}]>" if capability >= 90 else "*bf16"
    return dict.fromkeys(("keys", "values"), kind)


def multiples(signature: dict[str, str]) -> tuple[str, ...]:
    """Strides and row counts are multiples of 16 with heads of 64 and 128 values."""
    named = ("_row", "_head", "room", "head_rows")
    return tuple(name for name, kind in signature.items() if name.endswith(named) and kind[0] != "*")


def check_attention(kernel: Compiled, capability: int) -> None:
    if capability == 80:  # without descriptors addresses take registers: a few of them spill
        assert kernel.stack <= 64
        assert kernel.count("LDL", "STL") <= 48
    else:
        assert kernel.stack == 0
        assert kernel.count("LDL", "STL") == 0
    assert kernel.shared <= SHARED_LIMIT[capability]
    own = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[capability]
    assert kernel.count(own) > 0
    assert kernel.count("HMMA", "HGMMA", "UTCHMMA") == kernel.count(own)
    assert (kernel.count("UTMALDG") > 0) == (capability >= 90)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_sparse_attention(capability: int, tile: int, dim: int) -> None:
    columns = {f"column_{name}": kind for name, kind in sides(capability, 64, dim).items()}
    signature = {
        **QUERIES, **columns, **sides(capability, 64, dim), **ROWS, "order": "*i32", "head_tiles": "*i32",
        "entries": "*i32", "ends": "*i32", "room": "i32", **LAYOUT,
    }  # fmt: skip
    constants = {"M": tile, "N": 64, "D": dim, "TMA": capability >= 90, "DOT": tl.bfloat16}
    options = sparse_attention.launch_options(tile, divmod(capability, 10))
    kernel = compile_kernel(
        sparse_attention.sparse_attention_kernel, capability, signature, constants, multiples=multiples(signature),
        **options,
    )  # fmt: skip
    check_attention(kernel, capability)
    if tile == 64 and capability == 90:  # two thread blocks fit a multiprocessor
        assert kernel.registers * 128 * 2 <= 65536
        assert (kernel.shared + 1024) * 2 <= 228 << 10


@pytest.mark.parametrize(
    "flagged", [pytest.param(False, marks=pytest.mark.slow, id="all heads"), pytest.param(True, id="dense heads")]
)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_dense_attention(capability: int, dim: int, flagged: bool) -> None:
    keys = dense_attention.block_keys(divmod(capability, 10))
    signature = {
        **QUERIES, **sides(capability, keys, dim), **ROWS, "succ_start": "i32", "intra_start": "i32", **LAYOUT,
        **({"head_tiles": "*i32"} if flagged else {}),
    }  # fmt: skip
    constants: dict[str, Any] = {"M": 128, "N": keys, "D": dim, "TMA": capability >= 90, "DOT": tl.bfloat16}
    constants |= {} if flagged else {"head_tiles": None}
    kernel = compile_kernel(
        dense_attention.dense_attention_kernel, capability, signature, constants, multiples=multiples(signature),
        **dense_attention.OPTIONS[keys],
    )  # fmt: skip
    check_attention(kernel, capability)


@pytest.mark.parametrize("cache", ["bf16", "i8", "fp8e4nv"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_staging(capability: int, cache: str) -> None:
    if cache == "fp8e4nv" and capability == 80:
        pytest.skip("Ampere has no fp8")
    scaled = cache != "bf16"
    signature = {
        "side": f"*{cache}", "side_head": "i64", "scale_head": "i64" if scaled else "i32", "page_slots": "*i32",
        "target": "*bf16", "stop": "i32", "head_rows": "i32", **({"scales": "*fp32"} if scaled else {}),
    }  # fmt: skip
    constants = {"P": 64, "N": 64, "D": 128} | ({} if scaled else {"scales": None})
    kernel = compile_kernel(staging.stage_kernel, capability, signature, constants, multiples=multiples(signature))
    assert kernel.stack == 0
    assert kernel.registers <= 64


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_gathering_of_columns(capability: int) -> None:
    signature = {
        **dict.fromkeys(("column_keys", "column_values", "keys", "values"), "*bf16"), "columns": "*i32",
        "column_stride": "i32", "num_columns": "*i32", "order": "*i32", "head_tiles": "*i32", "room": "i32", **LAYOUT,
    }  # fmt: skip
    kernel = compile_kernel(
        staging.gather_columns_kernel, capability, signature, {"M": 128, "N": 64, "D": 128},
        multiples=multiples(signature),
    )  # fmt: skip
    assert kernel.stack == 0
    assert kernel.registers <= 128


@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_entries(capability: int, tile: int) -> None:
    pointers = ("blocks", "counts", "num_blocks", "bitmap", "columns", "num_columns", "order", "entries", "ends")
    constants = {"M": tile, "N": 64, "NB": 128, "NC": 16}
    names = [name for name in entries.entries_kernel.arg_names if name not in constants]
    signature = dict.fromkeys(names, "i32") | dict.fromkeys(pointers, "*i32")
    signature |= {"head_tiles": "*i32", "visited": "*i64"}
    kernel = compile_kernel(entries.entries_kernel, capability, signature, constants)
    assert kernel.stack == 0
    assert kernel.registers <= 128


@pytest.mark.parametrize("second", [64, 128])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_choice_of_tiles(capability: int, second: int) -> None:
    """Two sizes of tiles, and one."""
    constants = {"FIRST": 128, "SECOND": second, "BLOCK": 256}
    names = [name for name in tiles.weigh_kernel.arg_names if name not in constants]
    lists = [f"{side}_{what}" for side in ("first", "second") for what in ("blocks", "counts", "numbers")]
    signature = dict.fromkeys(names, "i32") | dict.fromkeys([*lists, "head_tiles", "num_columns"], "*i32")
    kernel = compile_kernel(
        tiles.weigh_kernel, capability, signature | {"work": "*i64", "visited": "*i64"}, constants
    )  # fmt: skip
    assert kernel.stack == 0
    signature = {"order": "*i32", "work": "*i64", "heads": "i32"}
    assert compile_kernel(tiles.order_kernel, capability, signature, {"HEADS": 32}).stack == 0
