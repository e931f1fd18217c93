"""Blocks in the internal layout: exact where the type allows it, within the stated bound elsewhere."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from tests.support.gguf_files import random_blocks
from workers.quant.gguf.blocks import KINDS, Unpacked, unpack
from workers.quant.gguf.convert import to_weight

LOSSLESS = {"Q4_0", "Q5_0", "Q8_0"}


def largest_in_group(values: np.ndarray, group: int) -> np.ndarray:
    largest = np.abs(values.reshape(len(values), -1, group)).max(-1, keepdims=True)
    return np.broadcast_to(largest, (*largest.shape[:2], group)).reshape(values.shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 0.01, 1e-6])
def test_error_is_within_the_bound(kind: str, scale: float) -> None:
    data = random_blocks(Kind[kind], (64, 1024), seed=5, scale=scale)
    reference = gguf.dequantize(data, Kind[kind])
    unpacked = unpack(kind, torch.from_numpy(data))
    largest = largest_in_group(reference, unpacked.group)
    exact = to_weight(unpacked, exact=True).dequantize(torch.float32).numpy()
    rounded = to_weight(unpacked).dequantize(torch.float32).numpy()
    if kind in LOSSLESS:
        assert np.array_equal(exact, reference)
        assert np.array_equal(rounded, reference)
    assert (np.abs(exact - reference) <= 2.0**-21 * largest + 1e-30).all()
    tiny = 0.0 if scale > 0.001 else 64 * 2.0**-25  # scales without all digits of float16
    assert (np.abs(rounded - reference) <= 2.0**-9 * largest + 2.0**-24 + tiny).all()


@pytest.mark.parametrize(
    ("kind", "layout", "group", "ratio"),
    [
        ("Q4_0", "int4", 32, 1.0), ("Q4_1", "int4", 32, 1.0), ("Q4_K", "int4", 32, 160 / 144),
        ("Q5_0", "int8", 32, 34 / 22), ("Q5_1", "int8", 32, 36 / 24), ("Q8_0", "int8", 32, 1.0),
        ("Q5_K", "int8", 32, 288 / 176), ("Q6_K", "int8", 16, 288 / 210),
    ],
)  # fmt: skip
def test_layout_and_size(kind: str, layout: str, group: int, ratio: float) -> None:
    data = random_blocks(Kind[kind], (8, 512))
    weight = to_weight(unpack(kind, torch.from_numpy(data)))
    assert (weight.kind, weight.group, weight.shape) == (layout, group, (8, 512))
    assert weight.nbytes == pytest.approx(ratio * data.nbytes)
    assert weight.scales.dtype == torch.float16
    assert weight.order is None


@pytest.mark.parametrize("bits", [4, 5])
@pytest.mark.parametrize("exact", [False, True])
def test_groups_without_a_scale_keep_their_minimum(bits: int, exact: bool) -> None:
    codes = torch.arange(64, dtype=torch.uint8).view(1, 64) % 16
    scales = torch.tensor([[0.0, 2.0**-24]], dtype=torch.float16)
    minima = torch.tensor([[-0.5, 0.25]], dtype=torch.float16)
    values = to_weight(Unpacked(codes, scales, minima, bits), exact).dequantize(torch.float32)
    assert values[0, :32].tolist() == [-0.5] * 32
    assert values[0, 32:].tolist() == pytest.approx([0.25] * 32, abs=1e-6)
    nothing = to_weight(Unpacked(codes, scales * 0, minima * 0, bits), exact).dequantize(torch.float32)
    assert not nothing.any()
