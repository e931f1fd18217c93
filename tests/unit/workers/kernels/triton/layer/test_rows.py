"""Residual and norm, and SwiGLU, against their PyTorch twins."""

from __future__ import annotations

import pytest
import torch

from workers.kernels.triton.layer import rows as module
from workers.model import layers

EPS = 1e-6


@pytest.mark.parametrize(("rows", "width", "dtype"), [
    (1, 2048, torch.float32), (17, 1000, torch.bfloat16), (67, 48, torch.float32),
])  # fmt: skip
def test_residual_and_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows + width)
    x = torch.randn(rows, width + 8).to(dtype)[:, :width]
    delta, weight = torch.randn(rows, width).to(dtype), torch.rand(width).to(dtype)
    bound = {"atol": 1e-6, "rtol": 2e-6} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 2e-2}
    wanted = x + delta
    same, normed = module.add_rms_norm(x, None, weight, EPS)
    assert same is x
    torch.testing.assert_close(normed, layers.rms_norm(x, weight, EPS), **bound)
    total, normed = module.add_rms_norm(x, delta, weight, EPS)
    torch.testing.assert_close(total, wanted, **bound)
    torch.testing.assert_close(normed, layers.rms_norm(total, weight, EPS), **bound)


@pytest.mark.parametrize(("rows", "width"), [(1, 1030), (67, 24)])
def test_swiglu(rows: int, width: int) -> None:
    gate_up = torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(rows)) * 3
    torch.testing.assert_close(module.swiglu(gate_up), layers.swiglu(gate_up.clone()), atol=2e-6, rtol=2e-6)
