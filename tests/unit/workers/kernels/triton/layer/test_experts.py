"""The weighted sum of experts against its definition, with awkward distributions of entries."""

from __future__ import annotations

import pytest
import torch

from protos.stage.messages import Span
from workers.bench.cases.experts import run_experts_reference
from workers.kernels.triton.layer import experts as module
from workers.kernels.triton.layer.experts import Tiling, prefers_library, run_experts
from workers.kernels.triton.layer.routing import route
from workers.model.moe import run_experts as twin

AMPERE, HOPPER = (8, 0), (9, 0)
SMALL = (Tiling(16, 32, 16, 4, 2), Tiling(16, 32, 32, 4, 2))


@pytest.fixture
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether PyTorch's grouped product is used, which takes any type on a CPU."""
    monkeypatch.setattr(module, "prefers_library", lambda *_: request.param)
    return bool(request.param)


def weights_of(experts: int, hidden: int, inter: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(experts)
    return torch.randn(experts, 2 * inter, hidden) * hidden**-0.5, torch.randn(experts, hidden, inter) * inter**-0.5


@pytest.mark.parametrize(
    ("tokens", "library"), [(1, False), (17, False), (17, True), (67, False)], indirect=["library"]
)
def test_experts(tokens: int, library: bool) -> None:
    gate_up, down = weights_of(7, 48, 40)
    x = torch.randn(tokens, 56)[:, :48]
    chosen, weights = torch.rand(tokens, 7).topk(2).indices, torch.rand(tokens, 2)
    got = run_experts(x, chosen, weights, gate_up, down, 0, HOPPER)
    wanted = run_experts_reference(x, chosen, weights, gate_up, down, Span(0, 7))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got, twin(x, chosen, weights, gate_up, down, Span(0, 7)), atol=1e-5, rtol=1e-5)


def test_eight_of_128_of_which_many_are_empty() -> None:
    gate_up, down = weights_of(128, 32, 16)
    x, (chosen, weights) = torch.randn(3, 32), route(torch.randn(3, 128), 8, True)
    got = run_experts(x, chosen, weights, gate_up, down, 0, AMPERE, SMALL)
    torch.testing.assert_close(
        got, run_experts_reference(x, chosen, weights, gate_up, down, Span(0, 128)), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("expert", [0, 7])
def test_all_rows_at_one_expert(expert: int) -> None:
    gate_up, down = weights_of(8, 32, 48)
    x, chosen, weights = torch.randn(35, 32), torch.full((35, 1), expert), torch.rand(35, 1)
    got = run_experts(x, chosen, weights, gate_up, down, 0, AMPERE, SMALL)
    wanted = run_experts_reference(x, chosen, weights, gate_up, down, Span(0, 8))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("library", [False, True], indirect=True)
def test_partial_sums_of_shards_add_up_and_tokens_without_experts_get_zeros(library: bool) -> None:
    gate_up, down = weights_of(8, 32, 16)
    x, chosen, weights = torch.randn(21, 32), torch.rand(21, 8).topk(2).indices, torch.rand(21, 2)
    chosen[5] = torch.tensor([6, 7])
    parts = [
        run_experts(x, chosen, weights, gate_up[low:high], down[low:high], low, HOPPER)
        for low, high in ((0, 1), (1, 6), (6, 8))
    ]
    assert not parts[0][5].any()
    assert not parts[1][5].any()
    wanted = run_experts_reference(x, chosen, weights, gate_up, down, Span(0, 8))
    torch.testing.assert_close(parts[0] + parts[1] + parts[2], wanted, atol=1e-5, rtol=1e-5)
    nothing = run_experts(x, torch.zeros_like(chosen), weights, gate_up[4:], down[4:], 4, HOPPER)
    assert torch.equal(nothing, torch.zeros_like(x))


def test_bfloat16() -> None:
    """The interpreter truncates results to bfloat16, so only two roundings' worth of difference is asked for."""
    gate_up, down = (side.bfloat16() for side in weights_of(4, 32, 16))
    x, chosen, weights = torch.randn(17, 32).bfloat16(), torch.rand(17, 4).topk(2).indices, torch.rand(17, 2)
    got = run_experts(x, chosen, weights, gate_up, down, 0, AMPERE, SMALL).float()
    wanted = run_experts_reference(x, chosen, weights, gate_up, down, Span(0, 4)).float()
    assert (got - wanted).abs().max() <= 2e-2 * wanted.abs().max()


def test_which_product() -> None:
    many, half = 32768 * 8, torch.bfloat16
    assert prefers_library(many, 128, half, HOPPER)
    assert not prefers_library(many, 128, half, AMPERE)
    assert prefers_library(many, 128, half, (10, 3))
    assert not prefers_library(many, 128, half, (12, 0))  # where PyTorch's is a loop on the host
    assert not prefers_library(many, 128, torch.float32, HOPPER)
    assert not prefers_library(64 * 8, 128, half, HOPPER)
    assert Tiling.of(8, 128, half, True, HOPPER).rows == 16
    assert Tiling.of(4096, 64, half, True, HOPPER).rows == 64
    assert Tiling.of(many, 128, half, True, HOPPER)[:2] == (128, 128)
    for capability in (AMPERE, (12, 0)):
        assert Tiling.of(many, 128, half, True, capability)[:2] == (128, 64)
