"""Quantised weights in the order of the compiled products, and back."""

from __future__ import annotations

import pytest
import torch

from tests.support.data.packing import random_weight
from workers.quant.packed import PackedWeight, can_pack, empty_packed, pack
from workers.quant.weight import Kind, QuantizedWeight


def equal(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    parts, others = one.parts, other.parts
    same = all(torch.equal(part, others[name]) for name, part in parts.items())
    return same and parts.keys() == others.keys() and (one.kind, one.group) == (other.kind, other.group)


@pytest.mark.parametrize("kind", ["int4", "int8", "float8_e4m3"])
@pytest.mark.parametrize(
    ("shape", "pairs", "group"),
    [((16, 32), False, 32), ((48, 96), False, 64), ((64, 96), True, 16), ((3, 128, 64), True, 32)],
)
def test_nothing_is_lost(kind: Kind, shape: tuple[int, ...], pairs: bool, group: int) -> None:
    zeros = {"int4": torch.uint8, "int8": torch.float16, "float8_e4m3": None}[kind]
    weight = random_weight(kind, shape, group, zeros)
    packed = pack(weight, pairs)
    assert packed.shape == weight.shape
    assert packed.nbytes == weight.nbytes
    assert equal(packed.unpacked(), weight)
    assert torch.equal(packed.dequantize(torch.float32), weight.dequantize(torch.float32))


def test_where_codes_lie() -> None:
    codes = torch.arange(16 * 32).view(16, 32) % 251
    packed = pack(QuantizedWeight("int8", 32, codes.to(torch.uint8), torch.ones(16, 1)))
    lines = packed.codes.view(torch.uint8).view(16, 16, 2)
    assert lines[3, 5].tolist() == codes[5, 6:8].tolist()
    small = QuantizedWeight("int4", 32, (codes % 256)[:, :16].to(torch.uint8), torch.ones(16, 1))
    line = pack(small).codes.view(torch.uint8).view(8, 16, 2)[2, 5]
    wide = small.dequantize(torch.float32)[5, 8:12] + 8
    assert [int(line[0]) & 15, int(line[1]) & 15, int(line[0]) >> 4, int(line[1]) >> 4] == wide.tolist()


def test_rows_come_in_any_parts() -> None:
    weight = random_weight("int4", (96, 64), 32, torch.uint8)
    whole, parts = pack(weight, True), empty_packed(weight, weight.shape, True)
    for start, stop in ((0, 1), (1, 17), (17, 48), (48, 96)):
        parts.put(start, weight.rows(slice(start, stop)))
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scales, parts.scales)
    assert whole.zeros is not None
    assert parts.zeros is not None
    assert torch.equal(whole.zeros, parts.zeros)


def test_one_expert() -> None:
    weight = random_weight("int8", (3, 32, 64), 64)
    packed = pack(weight)
    one = packed[1]
    assert isinstance(one, PackedWeight)
    assert equal(one.unpacked(), weight[1])
    assert one.codes.data_ptr() == packed.codes[1].data_ptr()


@pytest.mark.parametrize(
    ("shape", "group", "pairs", "fits"),
    [
        ((16, 32), 32, False, True),
        ((16, 32), 128, False, True),  # one group
        ((16, 64), 8, False, False),
        ((24, 32), 32, False, False),
        ((16, 48), 48, False, False),
        ((2, 16, 32), 32, False, False),  # the depth of another product
        ((2, 96, 32), 32, True, False),
        ((2, 64, 32), 32, True, True),
    ],
)
def test_what_can_be_packed(shape: tuple[int, ...], group: int, pairs: bool, fits: bool) -> None:
    assert can_pack(random_weight("int8", shape, group), shape, pairs) == fits


def test_ordered_inputs_are_not_packed() -> None:
    weight = random_weight("int8", (16, 32), 32)
    ordered = QuantizedWeight("int8", 32, weight.codes, weight.scales, order=torch.arange(32, dtype=torch.int32))
    assert not can_pack(ordered, ordered.shape, False)
