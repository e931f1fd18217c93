"""Routing against its definition, grouped experts against one token and one expert at a time."""

import itertools

import pytest
import torch

from protos.stage.messages import Span
from workers.bench.cases.experts import run_experts_reference
from workers.model.moe import route, run_experts

HIDDEN, INTER, EXPERTS = 24, 16, 8
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def weights(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    gate_up = torch.randn(EXPERTS, 2 * INTER, HIDDEN) * HIDDEN**-0.5
    down = torch.randn(EXPERTS, HIDDEN, INTER) * INTER**-0.5
    return gate_up.to(dtype), down.to(dtype)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_routing_is_the_top_of_the_softmax(top_k: int, normalise: bool):
    x, router = torch.randn(17, HIDDEN), torch.randn(EXPERTS, HIDDEN)
    experts, scores = route(x, router, top_k, normalise)
    probabilities = torch.softmax(x @ router.T, -1)
    for row in range(17):
        best = sorted(range(EXPERTS), key=lambda e: -float(probabilities[row, e]))[:top_k]
        assert experts[row].tolist() == best
        wanted = probabilities[row, best]
        torch.testing.assert_close(scores[row], wanted / wanted.sum() if normalise else wanted)
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 67, 193])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_grouped_experts_equal_the_reference(tokens: int, top_k: int, dtype: torch.dtype):
    gate_up, down = weights(dtype)
    x = torch.randn(tokens, HIDDEN).to(dtype)
    experts, scores = route(x, torch.randn(EXPERTS, HIDDEN).to(dtype), top_k, True)
    local = Span(0, EXPERTS)
    got = run_experts(x, experts, scores, gate_up, down, local)
    wanted = run_experts_reference(x, experts, scores, gate_up, down, local)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), wanted.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("cuts", [(0, 4, 8), (0, 2, 4, 6, 8), (0, 1, 7, 8)])
@pytest.mark.parametrize("tokens", [1, 31])
def test_partial_sums_of_shards_add_up(tokens: int, cuts: tuple[int, ...]):
    gate_up, down = weights()
    x = torch.randn(tokens, HIDDEN)
    experts, scores = route(x, torch.randn(EXPERTS, HIDDEN), 2, True)
    whole = run_experts(x, experts, scores, gate_up, down, Span(0, EXPERTS))
    parts = torch.zeros_like(x)
    for low, high in itertools.pairwise(cuts):
        parts += run_experts(x, experts, scores, gate_up[low:high], down[low:high], Span(low, high))
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 13])
def test_tokens_without_a_local_expert_get_zeros(tokens: int):
    gate_up, down = weights()
    experts = torch.tensor([[0, 1]]).repeat(tokens, 1)
    scores = torch.full((tokens, 2), 0.5)
    out = run_experts(torch.randn(tokens, HIDDEN), experts, scores, gate_up[4:], down[4:], Span(4, 8))
    assert torch.equal(out, torch.zeros(tokens, HIDDEN))


def test_all_tokens_at_one_expert():
    gate_up, down = weights()
    x = torch.randn(50, HIDDEN)
    experts, scores = torch.full((50, 1), 7), torch.rand(50, 1)
    got = run_experts(x, experts, scores, gate_up, down, Span(0, EXPERTS))
    gate, up = (x @ gate_up[7].T).chunk(2, -1)
    wanted = scores * ((torch.nn.functional.silu(gate) * up) @ down[7].T)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_a_token_does_not_depend_on_its_neighbours():
    gate_up, down = weights()
    x = torch.randn(20, HIDDEN)
    experts, scores = route(x, torch.randn(EXPERTS, HIDDEN), 2, True)
    whole = run_experts(x, experts, scores, gate_up, down, Span(0, EXPERTS))
    for row in (0, 11, 19):
        alone = run_experts(x[row : row + 1], experts[row : row + 1], scores[row : row + 1], gate_up, down, Span(0, 8))
        torch.testing.assert_close(alone[0], whole[row], atol=1e-5, rtol=1e-5)
