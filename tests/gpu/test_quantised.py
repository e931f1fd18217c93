"""Products with quantised weights on a GPU, in bfloat16, against their definitions in float64 on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from protos.stage.messages import Span
from workers.bench.cases.experts import run_experts_reference
from workers.bench.cases.quantised import dequantised, random_weight, scaled_product_reference
from workers.kernels.triton.quant import calls, products
from workers.quant.weight import Kind, QuantizedWeight

KINDS = [("int4", 64), ("int8", 128), ("float8_e4m3", 128)]
BOUND = 1e-2  # of the largest value: results in bfloat16


def on_gpu(weight: QuantizedWeight) -> QuantizedWeight:
    return replace(weight, **{name: part.cuda() for name, part in weight.parts.items()})


def close(got: torch.Tensor, wanted: torch.Tensor, bound: float = BOUND) -> bool:
    return bool((got.double().cpu() - wanted.double()).abs().max() <= bound * wanted.double().abs().max())


@pytest.mark.parametrize("tokens", [1, 17, 193, 1024])
@pytest.mark.parametrize(("kind", "group"), KINDS)
def test_linear(kind: Kind, group: int, tokens: int) -> None:
    weight = random_weight(kind, (517, 1024), group, block_rows=128 if kind == "float8_e4m3" else 1)
    x = torch.randn(tokens, 1024).bfloat16()
    assert calls.supports(x.cuda(), on_gpu(weight))
    exact = x.double() @ dequantised(weight).T
    scaled = products.is_scaled(weight, torch.cuda.get_device_capability())
    wanted = scaled_product_reference(x, weight) if scaled else exact
    assert close(calls.linear(x.cuda(), on_gpu(weight), None), wanted)
    assert close(products.linear(x.cuda(), on_gpu(weight), None, (8, 0)), exact)  # weights alone as codes


@pytest.mark.parametrize("tokens", [1, 67, 2048])
@pytest.mark.parametrize(("kind", "group"), KINDS)
def test_experts(kind: Kind, group: int, tokens: int) -> None:
    experts, hidden, inter = 8, 256, 192
    gate_up = random_weight(kind, (experts, 2 * inter, hidden), group)
    down = random_weight(kind, (experts, hidden, inter), group, seed=1)
    x, weights = torch.randn(tokens, hidden).bfloat16(), torch.rand(tokens, 2)
    chosen = torch.rand(tokens, experts).topk(2).indices
    plain = [side.dequantize(torch.float32) for side in (gate_up, down)]
    wanted = run_experts_reference(x.float(), chosen, weights, *plain, Span(0, experts))
    got = calls.run_experts(x.cuda(), chosen.cuda(), weights.cuda(), on_gpu(gate_up), on_gpu(down), 0)
    scaled = products.is_scaled(gate_up, torch.cuda.get_device_capability())
    assert close(got, wanted, 0.1 if scaled else 2 * BOUND)  # activations of three bits of mantissa, twice
