"""Experts in Triton against their definition: routing, sorting, products with awkward distributions, combining."""

from __future__ import annotations

import pytest
import torch

from protos.stage.messages import Span
from tests.support.oracles.experts import run_experts_reference
from workers.kernels.triton import experts as module
from workers.kernels.triton.experts import Tiling, prefers_library, route, run_experts, sort_entries
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


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 128, 8), (17, 6, 6), (67, 60, 4)])
def test_routing_is_the_top_of_the_softmax(tokens: int, experts: int, top_k: int, normalise: bool) -> None:
    torch.manual_seed(tokens)
    logits = torch.randn(tokens, experts + 4)[:, :experts] * 3
    chosen, weights = route(logits, top_k, normalise)
    wanted, ids = torch.softmax(logits, -1).topk(top_k)
    assert torch.equal(chosen, ids)
    torch.testing.assert_close(weights, wanted / wanted.sum(-1, keepdim=True) if normalise else wanted)


def test_of_equal_experts_the_lowest_is_chosen_and_no_number_is_last() -> None:
    logits = torch.zeros(2, 12)
    logits[0, [7, 3, 9]] = 1.0
    logits[1, 0] = torch.nan
    chosen, weights = route(logits, 4, True)
    assert chosen[0].tolist() == [3, 7, 9, 0]
    assert chosen[1].tolist() == [0, 1, 2, 3]  # the softmax is not a number anywhere
    assert weights[1].isnan().all()


@pytest.mark.parametrize(("tokens", "experts", "top_k", "first", "local"), [
    (1, 128, 8, 0, 128), (17, 8, 2, 0, 8), (193, 128, 8, 0, 128), (67, 128, 8, 40, 24), (400, 5, 3, 1, 3),
])  # fmt: skip
def test_sorting_is_stable(tokens: int, experts: int, top_k: int, first: int, local: int) -> None:
    torch.manual_seed(tokens)
    chosen = torch.rand(tokens, experts).topk(top_k).indices
    got = sort_entries(chosen, first, local)
    flat = chosen.flatten() - first
    flat = torch.where((flat >= 0) & (flat < local), flat, local)
    totals = torch.bincount(flat, minlength=local + 1)[:local]
    order = flat.argsort(stable=True)[: int(totals.sum())]
    assert got.totals.tolist() == totals.tolist()
    assert got.order[: len(order)].tolist() == order.tolist()
    places = torch.full((len(flat),), -1)
    places[order] = torch.arange(len(order))
    assert got.places.tolist() == places.tolist()


@pytest.mark.parametrize("library", [False, True], indirect=True)
@pytest.mark.parametrize("tokens", [1, 17, 67])
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
    x, (chosen, weights) = torch.randn(9, 32), route(torch.randn(9, 128), 8, True)
    got = run_experts(x, chosen, weights, gate_up, down, 0, AMPERE, SMALL)
    torch.testing.assert_close(
        got, run_experts_reference(x, chosen, weights, gate_up, down, Span(0, 128)), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("expert", [0, 7])
def test_all_rows_at_one_expert(expert: int) -> None:
    gate_up, down = weights_of(8, 32, 48)
    x, chosen, weights = torch.randn(50, 32), torch.full((50, 1), expert), torch.rand(50, 1)
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
    assert not prefers_library(many, 128, torch.float32, HOPPER)
    assert not prefers_library(64 * 8, 128, half, HOPPER)
    assert Tiling.of(8, 128, half, True, HOPPER).rows == 16
    assert Tiling.of(4096, 64, half, True, HOPPER).rows == 64
    assert Tiling.of(many, 128, half, True, HOPPER)[:2] == (128, 128)
    assert Tiling.of(many, 128, half, True, AMPERE)[:2] == (128, 64)
