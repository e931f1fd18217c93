"""The layout of quantised weights against its formula in float64, at sizes that nothing divides."""

from __future__ import annotations

import pytest
import torch

from workers.quant.weight import (
    Kind,
    QuantizedWeight,
    RowStack,
    empty_like,
    pack_nibbles,
    plain,
    unpack_nibbles,
)

SIZES = [(1, 2, 16), (3, 16, 16), (5, 30, 16), (7, 34, 32), (17, 128, 128), (13, 254, 128), (4, 66, 66)]  # N, K, group


def make(
    kind: Kind, rows: int, depth: int, group: int, *, zeros: bool = False, experts: int = 0, order: bool = False
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(rows * 1000 + depth)
    leading = (experts,) if experts else ()
    groups = -(-depth // group)
    if kind == "float8_e4m3":
        values = torch.randn(*leading, rows, depth, generator=generator)
        codes = values.to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        width = depth // 2 if kind == "int4" else depth
        codes = torch.randint(0, 256, (*leading, rows, width), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(*leading, rows, groups, generator=generator) + 0.1).half()
    shift = torch.randint(0, 16, scales.shape, generator=generator)
    zero = (shift.to(torch.uint8) if kind == "int4" else (shift * 9 - 70).to(torch.int8)) if zeros else None
    shuffled = [torch.randperm(depth, generator=generator).int() for _ in range(max(1, experts))]
    ordered = (torch.stack(shuffled) if experts else shuffled[0]) if order else None
    return QuantizedWeight(kind, group, codes, scales, zero, ordered)


def formula(weight: QuantizedWeight) -> torch.Tensor:
    """`scale * (code - zero)` one by one in float64, of a weight without experts."""
    rows, depth = weight.shape
    out = torch.empty(rows, depth, dtype=torch.float64)
    default = 8 if weight.kind == "int4" else 0
    for n in range(rows):
        for j in range(depth):
            if weight.kind == "int4":
                code: float = int(weight.codes[n, j // 2]) >> (4 * (j % 2)) & 15
            elif weight.kind == "int8":
                code = (int(weight.codes[n, j]) + 128) % 256 - 128
            else:
                code = float(weight.codes.view(torch.float8_e4m3fn)[n, j])
            zero = default if weight.zeros is None else float(weight.zeros[n, j // weight.group])
            k = j if weight.order is None else int(weight.order[j])
            out[n, k] = float(weight.scales[n, j // weight.group]) * (code - zero)
    return out


CASES: list[tuple[Kind, bool]] = [
    ("int4", False), ("int4", True), ("int8", False), ("int8", True), ("float8_e4m3", False),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "depth", "group"), SIZES)
@pytest.mark.parametrize(("kind", "zeros"), CASES)
@pytest.mark.parametrize("order", [False, True])
def test_dequantize_is_the_formula(kind: Kind, zeros: bool, rows: int, depth: int, group: int, order: bool) -> None:
    weight = make(kind, rows, depth, group, zeros=zeros, order=order)
    expected = formula(weight)
    assert torch.equal(weight.dequantize(torch.float32), expected.float())
    assert torch.equal(weight.dequantize(torch.bfloat16), expected.float().bfloat16())
    assert weight.shape == (rows, depth)


def test_large_matrices_are_dequantised_in_blocks() -> None:
    weight = make("int4", 700, 2048, 128, zeros=True)
    whole = torch.cat([weight.rows(slice(row, row + 1)).dequantize(torch.float32) for row in range(700)])
    assert torch.equal(weight.dequantize(torch.float32), whole)


@pytest.mark.parametrize(("kind", "zeros"), CASES)
@pytest.mark.parametrize("order", [False, True])
def test_experts_are_split(kind: Kind, zeros: bool, order: bool) -> None:
    weight = make(kind, 6, 40, 16, zeros=zeros, experts=5, order=order)
    whole = weight.dequantize(torch.float32)
    shards = weight.split([1, 0, 4])
    assert [shard.shape for shard in shards] == [(1, 6, 40), (0, 6, 40), (4, 6, 40)]
    assert torch.equal(torch.cat([shard.dequantize(torch.float32) for shard in shards]), whole)
    assert torch.equal(weight[3].dequantize(torch.float32), whole[3])
    assert sum(shard.nbytes for shard in shards) == weight.nbytes
    assert shards[2].codes.data_ptr() == weight[1].codes.data_ptr()  # no copy


@pytest.mark.parametrize(("kind", "zeros"), CASES)
@pytest.mark.parametrize(
    ("group", "start", "stop", "smaller"),
    [(128, 0, 128, 128), (128, 128, 300, 128), (128, 64, 192, 64), (128, 32, 300, 32), (300, 6, 34, 28), (32, 0, 2, 2)],
)
def test_columns_keep_their_values(kind: Kind, zeros: bool, group: int, start: int, stop: int, smaller: int) -> None:
    weight = make(kind, 3, 300, group, zeros=zeros)
    if (start, stop) == (0, 2):
        with pytest.raises(ValueError, match="inputs 0 to 2 of 300: cut the groups of 32 to 2"):
            weight.columns(start, stop)
        return
    part = weight.columns(start, stop)
    assert part.group == smaller
    assert torch.equal(part.dequantize(torch.float32), weight.dequantize(torch.float32)[:, start:stop])
    both = [weight.rows(slice(1, 3)).columns(start, stop), part.rows(slice(1, 3))]
    assert torch.equal(both[0].dequantize(torch.float32), both[1].dequantize(torch.float32))


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(ValueError, match=r"desc_act\): not split"):
        make("int4", 3, 64, 16, order=True).columns(0, 32)
    with pytest.raises(ValueError, match="cut a byte"):
        make("int4", 3, 64, 64).columns(1, 32)
    weight = make("int4", 3, 64, 16, order=True)
    assert weight.columns(0, 64) is weight


@pytest.mark.parametrize("change", ["scales", "zeros", "order", "codes", "group"])
def test_parts_that_do_not_fit_are_refused(change: str) -> None:
    good = make("int4", 3, 64, 16)
    parts = {"codes": good.codes, "scales": good.scales, "zeros": None, "order": None, "group": 16}
    parts |= {
        "scales": {"scales": good.scales[:, :3]}, "zeros": {"zeros": torch.zeros(3, 3, dtype=torch.uint8)},
        "order": {"order": torch.arange(63)}, "codes": {"codes": good.codes.int()}, "group": {"group": 0},
    }[change]  # fmt: skip
    with pytest.raises(ValueError, match=change):
        QuantizedWeight("int4", **parts)  # type: ignore[arg-type]


def test_stacks_and_plain_tensors() -> None:
    one, two = make("int4", 3, 64, 16), make("int8", 5, 64, 64)
    three = torch.randn(2, 64)
    stack = RowStack((one, two, three))
    assert stack.shape == (10, 64)
    assert stack.nbytes == one.nbytes + two.nbytes + three.nbytes
    expected = torch.cat([one.dequantize(torch.float32), two.dequantize(torch.float32), three])
    assert torch.equal(plain(stack, torch.float32), expected)
    assert plain(three, torch.bfloat16) is three
    assert one.layout != two.layout


def test_nibbles_and_empty_weights() -> None:
    codes = torch.randint(0, 16, (3, 10), dtype=torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)
    assert pack_nibbles(torch.tensor([[1, 2]], dtype=torch.uint8)).tolist() == [[0x21]]
    weight = make("int4", 3, 64, 16, zeros=True, order=True)
    made = empty_like(weight, (4, 7, 64))
    assert made.shape == (4, 7, 64)
    assert made.layout == weight.layout
