"""Products with quantised weights against float64, with awkward sizes, groups and distributions of entries."""

from __future__ import annotations

import pytest
import torch

from protos.stage.messages import Span
from workers.bench.cases.experts import run_experts_reference
from workers.bench.cases.quantised import dequantised, random_weight, scaled_product_reference
from workers.kernels.triton.quant.products import group_step, is_scaled, linear, run_experts, takes
from workers.quant.weight import Kind

AMPERE, HOPPER = (8, 0), (9, 0)
TOLERANCE = 2e-6  # of the largest result, in float32


def check(got: torch.Tensor, wanted: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert got.isfinite().all()
    assert (got.double() - wanted.double()).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("kind", "tokens", "outputs", "depth", "group"),
    [
        ("int4", 1, 33, 64, 16),
        ("int4", 17, 17, 192, 128),
        ("int4", 35, 32, 130, 128),
        ("int8", 17, 40, 67, 32),
        ("int8", 3, 35, 48, 48),
        ("int8", 1, 32, 193, 512),
    ],
)
def test_weights_of_4_and_8_bits(kind: Kind, tokens: int, outputs: int, depth: int, group: int, zeros: bool) -> None:
    weight = random_weight(kind, (outputs, depth), group, zeros=zeros)
    x, bias = torch.randn(tokens, depth + 3)[:, :depth], torch.randn(outputs)
    check(linear(x, weight, bias, HOPPER), x.double() @ dequantised(weight).T + bias)
    check(linear(x, weight, None, AMPERE), x.double() @ dequantised(weight).T)


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_inputs_in_the_order_of_activations(kind: Kind) -> None:
    weight = random_weight(kind, (33, 160), 32, zeros=True, ordered=True)
    x = torch.randn(17, 160)
    check(linear(x, weight, None, HOPPER), x.double() @ dequantised(weight).T)


def test_every_code_of_e4m3_is_read_by_its_bits() -> None:
    weight = random_weight("float8_e4m3", (2, 128), 128)
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    codes[codes % 128 == 127] = 0  # not a number
    weight.codes.copy_(codes)
    weight.scales.fill_(1.0)
    got = linear(torch.eye(128), weight, None, AMPERE)
    assert torch.equal(got.T, codes.view(torch.float8_e4m3fn).float())
    weight.codes[0, 0] = 127
    assert linear(torch.eye(128), weight, None, AMPERE).isnan().any()


@pytest.mark.parametrize(
    ("tokens", "outputs", "depth", "group"), [(1, 130, 256, 128), (17, 33, 193, 128), (19, 40, 300, 512)]
)
def test_scaled_products(tokens: int, outputs: int, depth: int, group: int) -> None:
    """Codes on both sides; what quantising the activations costs is bounded beside."""
    weight = random_weight("float8_e4m3", (outputs, depth), group, block_rows=128)
    x = torch.randn(tokens, depth) * torch.logspace(-1, 1, depth)
    exact = x.double() @ dequantised(weight).T
    scaled = linear(x, weight, None, HOPPER)
    check(scaled, scaled_product_reference(x, weight))
    assert 1e-4 < (scaled - exact).norm() / exact.norm() < 4e-2  # three bits of mantissa: a step is 1 / 8, and random
    check(linear(x, weight, None, AMPERE), exact)


@pytest.mark.parametrize("outliers", [1.0, 30.0])
@pytest.mark.parametrize("depth", [768, 2048])
def test_what_scaled_activations_cost(depth: int, outliers: float) -> None:
    """Against float64, beside the product of the same weights in bfloat16."""
    torch.manual_seed(1)  # 0 is that of the weights
    weight = random_weight("float8_e4m3", (256, depth), 128, block_rows=128)
    x = (torch.randn(64, depth) * torch.where(torch.rand(depth) < 0.01, outliers, 1.0)).bfloat16()
    exact = x.double() @ dequantised(weight).T
    plain = x @ weight.dequantize(torch.bfloat16).T
    assert 1e-2 < (scaled_product_reference(x, weight) - exact).norm() / exact.norm() < 3e-2
    assert 1e-3 < (plain.double() - exact).norm() / exact.norm() < 3e-3


@pytest.mark.parametrize(
    ("kind", "group", "hidden", "inter", "capability"),
    [
        ("int4", 32, 72, 40, AMPERE),
        ("int8", 64, 72, 72, HOPPER),
        ("float8_e4m3", 128, 136, 40, AMPERE),
        ("float8_e4m3", 128, 136, 136, HOPPER),
    ],
)
def test_experts(kind: Kind, group: int, hidden: int, inter: int, capability: tuple[int, int]) -> None:
    """The last group and the last tile are parts of one; only e4m3 asks what the device is capable of."""
    experts, tokens = 5, 19
    gate_up = random_weight(kind, (experts, 2 * inter, hidden), group, zeros=kind != "float8_e4m3")
    down = random_weight(kind, (experts, hidden, inter), group, seed=1)
    x, weights = torch.randn(tokens, hidden), torch.rand(tokens, 2)
    chosen = torch.rand(tokens, experts).topk(2).indices
    chosen[chosen == 3] = 2  # one is empty
    plain = [side.dequantize(torch.float32) for side in (gate_up, down)]
    wanted = run_experts_reference(x, chosen, weights, *plain, Span(0, experts))
    got = run_experts(x, chosen, weights, gate_up, down, 0, capability)
    if is_scaled(gate_up, capability):
        assert 1e-4 < (got - wanted).norm() / wanted.norm() < 8e-2
    else:
        check(got, wanted, 1e-5)
    parts = [
        run_experts(x, chosen, weights, gate_up[low:high], down[low:high], low, capability)
        for low, high in ((0, 2), (2, 5))
    ]
    check(parts[0] + parts[1], got, 1e-5)


def test_scaled_experts_are_scaled_products() -> None:
    gate_up = random_weight("float8_e4m3", (1, 2 * 136, 130), 128)
    down = random_weight("float8_e4m3", (1, 130, 136), 128, seed=1)
    x, one = torch.randn(17, 130), torch.zeros(17, 1, dtype=torch.int64)
    got = run_experts(x, one, torch.ones(17, 1), gate_up, down, 0, HOPPER)
    gate, up = scaled_product_reference(x, gate_up[0]).chunk(2, 1)
    hidden = (torch.nn.functional.silu(gate) * up).float()
    check(got, scaled_product_reference(hidden, down[0]), 2e-2)  # a hidden value may round to the code beside


def test_experts_with_inputs_in_an_order_of_their_own() -> None:
    gate_up = random_weight("int4", (3, 64, 64), 32, ordered=True)
    down = random_weight("int4", (3, 64, 32), 32, ordered=True, seed=1)
    x, chosen, weights = torch.randn(9, 64), torch.randint(0, 3, (9, 1)), torch.rand(9, 1)
    plain = [side.dequantize(torch.float32) for side in (gate_up, down)]
    wanted = run_experts_reference(x, chosen, weights, *plain, Span(0, 3))
    check(run_experts(x, chosen, weights, gate_up, down, 0, HOPPER), wanted, 1e-5)


def test_bfloat16() -> None:
    """The interpreter truncates results to bfloat16, so two roundings' worth of difference is asked for."""
    weight = random_weight("int4", (33, 192), 64, zeros=True)
    x = torch.randn(17, 192).bfloat16()
    check(linear(x, weight, None, HOPPER), x.double() @ dequantised(weight).T, 2e-2)


def test_no_tokens() -> None:
    weight = random_weight("int8", (2, 16, 32), 16)
    x = torch.ones(0, 32)
    assert linear(x, weight[0], None, HOPPER).shape == (0, 16)
    nobody = torch.ones(0, 1)
    down = random_weight("int8", (2, 32, 8), 16)
    assert run_experts(x, nobody.long(), nobody, weight, down, 0, HOPPER).shape == (0, 32)


def test_which_kernel() -> None:
    fp8 = random_weight("float8_e4m3", (2, 256), 128)
    assert is_scaled(fp8, HOPPER)
    assert is_scaled(fp8, (8, 9))
    assert not is_scaled(fp8, AMPERE)
    assert is_scaled(random_weight("float8_e4m3", (2, 256), 256), HOPPER)
    assert not is_scaled(random_weight("float8_e4m3", (2, 256), 64), HOPPER)
    assert not is_scaled(random_weight("int8", (2, 256), 128), HOPPER)
    assert takes(random_weight("int8", (2, 96), 48))
    assert not takes(random_weight("int8", (2, 96), 24))
    assert group_step(random_weight("int8", (2, 96), 48)) == 16
