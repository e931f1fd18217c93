"""Launches of products with quantised weights: FP8 in blocks of 128 x 128, 4 and 8 bits with groups of 128.

Legend: as in `shipped_layer`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from workers.bench.builds.limits import Limits, Shipped
from workers.bench.builds.shipped_layer import EXPERTS, HIDDEN, INTER, TOP_K
from workers.quant.weight import Kind, QuantizedWeight

_GROUP = 128
_KERNEL, _ROWS_KERNEL = "quantised_product_kernel", "quantise_rows_kernel"
_FEW = Limits(units="some", copies=8)  # rows of an expert, below the tiles of newer units
_MANY = Limits(units="own", copies=8)


def shipped_quant() -> Iterator[Shipped]:
    """Yield dense and expert products of a step of one token, of some, and of many."""
    for kind in ("float8_e4m3", "int8", "int4"):
        for tokens, limits in ((1, _FEW), (1024, _MANY), (32768, _MANY)):
            kernels = {_KERNEL: limits}
            if kind == "float8_e4m3":
                kernels[_ROWS_KERNEL] = Limits(registers=128)
            yield Shipped(f"{kind} products, {tokens} tokens", partial(_products, kind, tokens), kernels)


def _weight(kind: Kind, *shape: int) -> QuantizedWeight:
    *leading, depth = shape
    groups = -(-depth // _GROUP)
    return QuantizedWeight(
        kind,
        _GROUP,
        torch.empty(*leading, depth // 2 if kind == "int4" else depth, dtype=torch.uint8, device="meta"),
        torch.empty(*leading, groups, dtype=torch.bfloat16, device="meta"),
        torch.empty(*leading, groups, dtype=torch.uint8, device="meta") if kind == "int4" else None,
    )


def _products(kind: Kind, tokens: int, capability: int) -> None:
    """Launch a dense product and those of experts."""
    from workers.kernels.triton.quant.products import linear, run_experts

    major_minor = (capability // 10, capability % 10)
    x = torch.empty(tokens, HIDDEN, dtype=torch.bfloat16, device="meta")
    linear(x, _weight(kind, 2 * INTER, HIDDEN), None, major_minor)
    chosen = torch.empty(tokens, TOP_K, dtype=torch.int64, device="meta")
    gate_up, down = _weight(kind, EXPERTS, 2 * INTER, HIDDEN), _weight(kind, EXPERTS, HIDDEN, INTER)
    run_experts(x, chosen, torch.empty(tokens, TOP_K, device="meta"), gate_up, down, 0, major_minor)
