"""The greedy choice against argmax."""

from __future__ import annotations

import math

import pytest
import torch

from workers.kernels.triton.layer.greedy import choose_greedily


@pytest.mark.parametrize("width", [5, 4096, 9000])
def test_the_greatest_logit_wins_and_of_equal_ones_the_lowest_id(width: int) -> None:
    torch.manual_seed(width)
    logits = torch.randn(3, width + 3)[:, :width]
    logits[1, [width - 1, width // 2, 3]] = 9.0
    logits[2] = -5.0
    tokens, finite = choose_greedily(logits)
    assert tokens.tolist() == [int(logits[0].argmax()), min(3, width // 2), 0]
    assert finite.tolist() == [1, 1, 1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_told(value: float) -> None:
    logits = torch.zeros(2, 5000)
    logits[1, 4500] = value
    tokens, finite = choose_greedily(logits)
    assert finite.tolist() == [1, 0]
    assert ((tokens >= 0) & (tokens < 5000)).all()
    logits[:] = math.nan
    assert choose_greedily(logits)[1].tolist() == [0, 0]
