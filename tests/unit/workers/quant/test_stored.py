"""Ranges of whole steps, and bytes of int32."""

from __future__ import annotations

import torch

from protos.model.quant.scheme import QuantScheme
from protos.stage.messages import Span
from workers.quant.stored import group_size, outward, unpack_words, words


def test_ranges() -> None:
    assert outward(Span(3, 9), 8, 20) == (0, 16)
    assert outward(Span(8, 16), 8, 20) == (8, 16)
    assert outward(Span(17, 20), 8, 20) == (16, 20)
    assert words(Span(16, 20), 8) == slice(2, 3)
    assert group_size(QuantScheme("fp8", 8, group=128), 96) == 96
    assert group_size(QuantScheme("fp8", 8), 96) == 96


def test_words() -> None:
    packed = torch.tensor([[0x76543210, -1]], dtype=torch.int32)
    assert unpack_words(packed, 4).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7] + [15] * 8]
    assert unpack_words(packed, 8).tolist() == [[0x10, 0x32, 0x54, 0x76] + [255] * 4]
