"""Quantised groups against the rule written out in float64, and their packing against the reader."""

from __future__ import annotations

import pytest
import torch

from workers.quant.quantize import quantize_matrix
from workers.quant.weight import unpack_nibbles

SIZES = [(1, 16, 16), (17, 96, 32), (67, 256, 128), (193, 80, 16)]  # N, K, group


def _matrix(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return (torch.randn(rows, columns, generator=generator) * 0.05).to(dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "columns", "group"), SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_codes_are_the_nearest(bits: int, rows: int, columns: int, group: int, dtype: torch.dtype) -> None:
    weight = _matrix(rows, columns, dtype)
    found = quantize_matrix(weight, bits, group)
    scales = found.scales.double().repeat_interleave(group, dim=1)
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    exact = weight.double()
    assert found.scales.dtype == dtype
    assert found.codes.min() >= low
    assert found.codes.max() <= high
    lost = (found.codes * scales - exact).abs()
    for other in (found.codes - 1, found.codes + 1):
        allowed = (other >= low) & (other <= high)
        further = (other * scales - exact).abs() - lost
        assert (further[allowed] >= -1e-6 * exact.abs().max()).all()
    assert found.squared_error == pytest.approx(float(lost.square().sum()), rel=1e-3)
    assert found.squared_sum == pytest.approx(float(exact.square().sum()), rel=1e-6)


def test_the_search_is_not_worse_than_the_largest_weight() -> None:
    """With 4 bits the chosen scales lose less than the one that just holds the largest weight."""
    weight = _matrix(67, 512, torch.float32)
    found = quantize_matrix(weight, 4, 128)
    groups = weight.unflatten(-1, (-1, 128))
    scale = groups.abs().amax(dim=-1, keepdim=True) / 7
    plain = float(((groups / scale).round() * scale - groups).square().sum())
    assert found.squared_error < 0.95 * plain


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_stay_zeros(bits: int) -> None:
    found = quantize_matrix(torch.zeros(3, 32), bits, 16)
    assert not found.codes.any()
    assert (found.squared_error, found.squared_sum) == (0.0, 0.0)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_words(bits: int) -> None:
    """Unsigned codes, the lowest first in an int32, as in compressed-tensors; the last word is filled up."""
    found = quantize_matrix(_matrix(5, 48), bits, 16)
    parts = found.packed(bits)
    count = 32 // bits
    assert parts["weight_packed"].dtype == torch.int32
    assert list(parts["weight_packed"].shape) == [5, 48 // count]
    values = parts["weight_packed"].view(torch.uint8)
    values = unpack_nibbles(values) if bits == 4 else values
    assert torch.equal(values.int() - (1 << bits - 1), found.codes.int())
    assert parts["weight_shape"].tolist() == [5, 48]
