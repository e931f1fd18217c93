"""Norm, linear layers and the gated MLP against their definitions in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.support.data.packing import packed, random_weight
from workers.model import compiled
from workers.model.layers import gated_mlp, inverse_rms, linear, rms_norm, swiglu
from workers.quant.packed import pack
from workers.quant.weight import RowStack, Weight

SIZES = (1, 17, 67, 193)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", SIZES)
def test_rms_norm(tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens)
    x, weight = torch.randn(tokens, 193).to(dtype), torch.randn(193).to(dtype)
    wide = x.double()
    wanted = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    got = rms_norm(x, weight, 1e-6)
    assert got.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


def test_eps_bounds_the_inverse() -> None:
    assert inverse_rms(torch.zeros(1, 17), 1e-4).item() == pytest.approx(100.0)


@pytest.mark.skipif(compiled.path() is None, reason="no compiled kernels")
@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_biases_of_a_stack_are_added_before_rounding(tokens: int) -> None:
    torch.manual_seed(tokens)
    parts = [pack(random_weight("int4", (32, 64), 32)), pack(random_weight("int8", (16, 64), 16))]
    x, bias = torch.randn(tokens, 64, dtype=torch.bfloat16), torch.randn(48, dtype=torch.bfloat16)
    apart = [compiled.linear(x, part, own) for part, own in zip(parts, bias.split([32, 16]), strict=True)]
    assert torch.equal(linear(x, RowStack(tuple(parts)), bias), torch.cat(apart, dim=1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", SIZES)
def test_linear(tokens: int, bias: bool) -> None:
    torch.manual_seed(tokens)
    x, weight, added = torch.randn(tokens, 67), torch.randn(17, 67), torch.randn(17)
    wanted = x.double() @ weight.double().T + (added.double() if bias else 0)
    torch.testing.assert_close(linear(x, weight, added if bias else None).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", SIZES)
def test_gated_mlp(tokens: int) -> None:
    torch.manual_seed(tokens)
    x, gate_up, down = torch.randn(tokens, 17), torch.randn(134, 17), torch.randn(17, 67)
    gate, up = (x.double() @ gate_up.double().T).chunk(2, dim=1)
    wanted = (gate * gate.sigmoid() * up) @ down.double().T
    torch.testing.assert_close(gated_mlp(x, gate_up, down, None, None).double(), wanted, rtol=1e-4, atol=1e-3)


def test_swiglu_overwrites_its_first_half() -> None:
    x = torch.randn(17, 134)
    assert swiglu(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("tokens", SIZES)
def test_gated_mlp_with_biases(tokens: int) -> None:
    x, gate_up, down = torch.randn(tokens, 17), torch.randn(2 * 33, 17), torch.randn(17, 33)
    gate_up_bias, down_bias = torch.randn(66), torch.randn(17)
    gate, up = torch.nn.functional.linear(x.double(), gate_up.double(), gate_up_bias.double()).chunk(2, dim=-1)
    wanted = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down.double(), down_bias.double())
    got = gated_mlp(x, gate_up, down, gate_up_bias, down_bias)
    torch.testing.assert_close(got.double(), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(compiled.path() is None, reason="no compiled kernels")
@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("kind", ["plain", "int8", "down not packed"])
def test_packed_gated_mlp(tokens: int, kind: str) -> None:
    """An MLP packed as one expert, and one whose second matrix is not packed."""
    torch.manual_seed(tokens)
    x = torch.randn(tokens, 64).bfloat16()
    first, second = random_weight("int8", (2 * 96, 64), 32), random_weight("int8", (64, 96), 32)
    gate, up = first.dequantize(torch.float64).chunk(2)
    wide = x.double()
    wanted = (F.silu(wide @ gate.T) * (wide @ up.T)) @ second.dequantize(torch.float64).T
    down: Weight = second if kind == "down not packed" else pack(second)
    gate_up: Weight = pack(first, pairs=True)
    if kind == "plain":
        gate_up, down = packed(first.dequantize(torch.bfloat16), True), packed(second.dequantize(torch.bfloat16))
    got = gated_mlp(x, gate_up, down, None, None)
    assert float((got.double() - wanted).norm() / wanted.norm()) < 8e-3
    count = min(17, tokens)  # where rows are more than 16, AMX rounds weights in groups of 32
    rows = gated_mlp(x[-count:], gate_up, down, None, None)
    assert kind == "down not packed" or torch.equal(rows, got[-count:])
