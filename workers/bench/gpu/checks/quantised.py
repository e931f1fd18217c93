"""Stage `checks`, quantised weights: codes of activations, and products of dense matrices and of experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from protos.stage.messages import Span
from workers.bench.cases.experts import run_experts_reference
from workers.bench.cases.quantised import (
    dequantised,
    quantise_rows_reference,
    random_weight,
    scaled_product_reference,
)
from workers.bench.gpu.checks.kernels import Worst
from workers.bench.gpu.context import Case, Context
from workers.bench.gpu.journal import Line
from workers.kernels.device import capability
from workers.quant.weight import KINDS, Kind, QuantizedWeight

_GROUP = 128
_REHEARSED = (9, 0)  # the compute capability whose path a rehearsal takes


def cases() -> Iterator[Case]:
    """Yield the cases."""
    yield Case("checks", "codes of activations", _rows)
    for kind in KINDS:
        yield Case("checks", f"products {kind}", partial(_products, kind))
        yield Case("checks", f"experts {kind}", partial(_experts, kind))


def _capability(context: Context) -> tuple[int, int]:
    return _REHEARSED if context.rehearsal else capability(context.device)


def _moved(weight: QuantizedWeight, context: Context) -> QuantizedWeight:
    return replace(weight, **{name: part.to(context.device) for name, part in weight.parts.items()})


def _weight(kind: Kind, shape: tuple[int, ...], seed: int = 0) -> QuantizedWeight:
    is_float = kind == "float8_e4m3"
    return random_weight(kind, shape, _GROUP, zeros=not is_float, block_rows=_GROUP if is_float else 1, seed=seed)


def _rows(context: Context) -> Line:
    """Compare codes and scales, which must be those of PyTorch's conversion."""
    from workers.kernels.triton.quant.products import ADA
    from workers.kernels.triton.quant.rows import quantise_rows

    if _capability(context) < ADA:
        return {"ok": None, "why": "e4m3 needs sm_89"}
    worst = Worst()
    for tokens, depth in ((3, 193),) if context.rehearsal else ((1, 128), (67, 193), (1024, 2048)):
        make = torch.Generator().manual_seed(depth)
        x = (torch.randn(tokens, depth, generator=make) * torch.logspace(-6, 6, depth)).to(context.dtype)
        codes, scales = quantise_rows(x.to(context.device))
        wanted, steps = quantise_rows_reference(x)
        worst.equal((tokens, depth, "scales"), scales, steps)
        worst.equal((tokens, depth, "codes"), codes.float(), wanted.float())
    return worst.line()


def _products(kind: Kind, context: Context) -> Line:
    """Compare with float64; where activations are codes too, with the product of these codes."""
    from workers.kernels.triton.quant.products import is_scaled, linear

    worst = Worst()
    outputs, depth = (33, 160) if context.rehearsal else (517, 1024)
    for tokens in (17,) if context.rehearsal else (1, 17, 193, 1024):
        weight = _weight(kind, (outputs, depth))
        x = torch.randn(tokens, depth, generator=torch.Generator().manual_seed(tokens)).to(context.dtype)
        got = linear(x.to(context.device), _moved(weight, context), None, _capability(context))
        if is_scaled(weight, _capability(context)):
            wanted = scaled_product_reference(x, weight)
            twin = wanted.to(context.dtype)
        else:
            wanted = x.double() @ dequantised(weight).T
            twin = (x.float() @ weight.dequantize(context.dtype).float().T).to(context.dtype)
        worst.compare(tokens, got, twin, wanted)
    return worst.line()


def _experts(kind: Kind, context: Context) -> Line:
    """Compare with exact experts; the twin quantises and rounds activations where the kernels do."""
    from workers.kernels.triton.quant.products import run_experts

    worst, count, top_k = Worst(), 4, 2
    hidden, inter = (160, 96) if context.rehearsal else (512, 384)
    gate_up, down = _weight(kind, (count, 2 * inter, hidden)), _weight(kind, (count, hidden, inter), 1)
    plain_up, plain_down = (side.dequantize(torch.float32) for side in (gate_up, down))
    for tokens in (9,) if context.rehearsal else (1, 67, 512):
        make = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, hidden, generator=make).to(context.dtype)
        chosen = torch.rand(tokens, count, generator=make).topk(top_k).indices
        weights = torch.rand(tokens, top_k, generator=make)
        moved, ids, shares = (one.to(context.device) for one in (x, chosen, weights))
        matrices = _moved(gate_up, context), _moved(down, context)
        got = run_experts(moved, ids, shares, *matrices, 0, _capability(context))
        few = slice(0, 64)
        wanted = run_experts_reference(x[few].float(), chosen[few], weights[few], plain_up, plain_down, Span(0, count))
        worst.compare(tokens, got[few], _rounded(context, x[few], chosen[few], weights[few], gate_up, down), wanted)
    return worst.line()


def _rounded(
    context: Context, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, gate_up: QuantizedWeight,
    down: QuantizedWeight,
) -> torch.Tensor:  # fmt: skip
    """Compute experts as the kernels do, each of them on all tokens."""
    from workers.kernels.triton.quant.products import is_scaled

    def product(rows: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
        if is_scaled(weight, _capability(context)):
            return scaled_product_reference(rows, weight)
        return rows.double() @ weight.dequantize(context.dtype).double().T

    out = torch.zeros(x.shape, dtype=torch.float64)
    for expert in range(down.shape[0]):
        gate, up = product(x, gate_up[expert]).chunk(2, 1)
        rows = product((F.silu(gate) * up).to(context.dtype), down[expert]).to(context.dtype)
        share = torch.where(chosen == expert, weights, 0.0).sum(1, keepdim=True)
        out += share.double() * rows.double()
    return out.to(context.dtype)
