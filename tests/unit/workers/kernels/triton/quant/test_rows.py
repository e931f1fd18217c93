"""Activations in e4m3 against PyTorch's conversion, value by value."""

from __future__ import annotations

import math

import pytest
import torch

from workers.bench.cases.quantised import quantise_rows_reference
from workers.kernels.triton.quant.rows import quantise_rows


@pytest.mark.parametrize("depth", [1, 17, 128, 193, 2304])
@pytest.mark.parametrize("tokens", [1, 3])
def test_codes_and_scales(tokens: int, depth: int) -> None:
    torch.manual_seed(depth)
    x = (torch.randn(tokens, depth + 5) * torch.logspace(-6, 6, depth + 5))[:, :depth]
    codes, scales = quantise_rows(x)
    wanted, steps = quantise_rows_reference(x)
    assert torch.equal(scales, steps)
    assert torch.equal(codes.float(), wanted.float())


def test_zeros_and_what_is_not_finite() -> None:
    x = torch.ones(3, 256)
    x[0] = 0
    x[1, 5], x[2, 200] = math.inf, math.nan
    codes, scales = quantise_rows(x)
    assert not codes[0].float().any()
    assert scales[0].tolist() == [0.0, 0.0]
    assert scales.isfinite().tolist() == [[True, True], [False, True], [True, False]]
    assert codes.float().isfinite().all()


def test_no_rows() -> None:
    assert quantise_rows(torch.ones(0, 130)).scales.shape == (0, 2)
