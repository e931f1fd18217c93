"""The choice of experts against the softmax, and the sort of entries against argsort."""

from __future__ import annotations

import pytest
import torch

from workers.kernels.triton.layer.routing import route, sort_entries


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
