"""Regions of quantised matrices are stored below each other, in stacks where they differ, or refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from protos.model.checkpoint import CheckpointError
from protos.stage.messages import Span
from tests.support.fakes.events import Events
from tests.unit.workers.quant.test_weight import make
from workers.kernels.upload import Uploads
from workers.model import compiled
from workers.model.quantized import Into, Region, load_experts, load_matrix
from workers.quant.packed import PackedWeight
from workers.quant.weight import QuantizedWeight, RowStack, Weight

CPU = torch.device("cpu")
TO_CPU = Into(CPU)


class Matrices:
    """Quantised matrices in memory; remembers how many rows were read at once."""

    def __init__(self, **weights: QuantizedWeight) -> None:
        self.weights = weights
        self.rows: list[int] = []

    def has(self, name: str) -> bool:
        return name in self.weights

    def keeps(self, regions: Sequence[Region], shape: Sequence[int], pairs: bool) -> bool:
        return True

    def read(self, name: str, rows: Span, columns: Span) -> QuantizedWeight:
        self.rows.append(rows.size)
        return self.weights[name].rows(slice(*rows)).columns(*columns)


def region(name: str, rows: int, row: int = 0, expert: int | None = None, columns: int = 64) -> Region:
    return Region(name, Span(0, rows), Span(0, columns), row, expert)


def plain(region: Region) -> torch.Tensor:
    return torch.full((region.rows.size, region.columns.size), 3.0)


def load(source: Matrices, *regions: Region, into: Into = TO_CPU) -> Weight:
    done: list[str] = []
    weight = load_matrix(source, regions, into, plain, lambda region: done.append(region.name))
    assert done == [region.name for region in regions]
    return weight


def wide(weight: Weight) -> torch.Tensor:
    assert not isinstance(weight, torch.Tensor)
    return weight.dequantize(torch.float32)


def test_equal_layouts_become_one_matrix() -> None:
    source = Matrices(q=make("int4", 10, 64, 32), k=make("int4", 6, 64, 32))
    weight = load(source, region("q", 10), Region("k", Span(1, 5), Span(0, 64), 10))
    assert isinstance(weight, QuantizedWeight)
    expected = torch.cat([wide(source.weights["q"]), wide(source.weights["k"])[1:5]])
    assert torch.equal(wide(weight), expected)


OTHERS: list[Callable[[], QuantizedWeight]] = [
    lambda: make("int8", 6, 64, 32), lambda: make("int4", 6, 64, 16), lambda: make("int4", 6, 64, 32, zeros=True),
    lambda: make("int4", 6, 64, 32, order=True),
]  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_other_layouts_become_a_stack(other: Callable[[], QuantizedWeight]) -> None:
    source = Matrices(q=make("int4", 10, 64, 32), k=other())
    weight = load(source, region("q", 10), region("k", 6, 10), region("v", 2, 16))
    assert isinstance(weight, RowStack)
    expected = torch.cat([wide(source.weights["q"]), wide(source.weights["k"]), torch.full((2, 64), 3.0)])
    assert torch.equal(wide(weight), expected)


def test_orders_that_differ_become_a_stack() -> None:
    source = Matrices(q=make("int4", 10, 64, 32, order=True), k=make("int4", 6, 64, 32, order=True))
    assert isinstance(load(source, region("q", 10), region("k", 6, 10)), RowStack)
    source = Matrices(q=source.weights["q"], k=source.weights["q"])
    assert isinstance(load(source, region("q", 10), region("k", 10, 10)), QuantizedWeight)


def test_large_matrices_are_read_in_chunks() -> None:
    source = Matrices(q=make("int4", 1000, 4096, 128, zeros=True))
    weight = load(source, region("q", 1000, columns=4096))
    assert max(source.rows) == 64
    assert torch.equal(wide(weight), wide(source.weights["q"]))


def test_parts_go_to_a_device_through_its_buffers() -> None:
    """Of every chunk: codes, scales and zero points; and the order of the inputs once."""
    events, source = Events(), Matrices(q=make("int4", 1000, 4096, 128, zeros=True, order=True))
    uploads = Uploads(1 << 20, events, kind="cpu", pin=False)
    weight = load(source, region("q", 1000, columns=4096), into=Into(CPU, uploads=uploads))
    assert torch.equal(wide(weight), wide(source.weights["q"]))
    assert events.calls.count(("record", 1)) + events.calls.count(("record", 2)) == 3 * -(-1000 // 64) + 1


def test_experts() -> None:
    source = Matrices(**{name: make("int4", 6, 64, 16, order=True) for name in ("g0", "u0")})
    source.weights |= {name: make("int4", 6, 64, 16, order=True) for name in ("g1", "u1")}
    regions = [region(f"{part}{e}", 6, 6 * (part == "u"), e) for e in range(2) for part in "gu"]
    weight = load_experts(source, (2, 12, 64), regions, TO_CPU, lambda region: None)
    assert torch.equal(wide(weight)[1], torch.cat([wide(source.weights["g1"]), wide(source.weights["u1"])]))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (make("int4", 6, 64, 32), "u0: quantised in another way"),
        (make("int4", 5, 64, 16, order=True), "u0: inputs in another order"),
        (None, "u0: stored plain beside quantised experts"),
    ],
)
def test_experts_that_differ_are_refused(other: QuantizedWeight | None, words: str) -> None:
    source = Matrices(g0=make("int4", 6, 64, 16, order=True))
    if other is not None:
        source.weights["u0"] = other
    rows = 6 if other is None else other.shape[0]
    with pytest.raises(CheckpointError, match=words):
        load_experts(
            source, (1, 12, 64), [region("g0", 6, 0, 0), region("u0", rows, 6, 0)], TO_CPU, lambda region: None
        )


@pytest.mark.skipif(compiled.path() is None, reason="no compiled kernels")
def test_packed_while_they_are_read() -> None:
    source = Matrices(q=make("int4", 1000, 4096, 128, zeros=True), k=make("int4", 24, 4096, 128, zeros=True))
    regions = region("q", 1000, columns=4096), region("k", 24, 1000, columns=4096)
    weight = load(source, *regions, into=Into(CPU, pack=True))
    assert isinstance(weight, PackedWeight)
    assert torch.equal(wide(weight), torch.cat([wide(source.weights["q"]), wide(source.weights["k"])]))
    whole = [source.weights[name].nbytes for name in "qk"]
    assert weight.nbytes == sum(whole)
    odd = load(source, region("k", 23, columns=4096), into=Into(CPU, pack=True))  # no whole strips
    assert isinstance(odd, QuantizedWeight)
    stack = load(Matrices(q=make("int4", 16, 64, 32), k=make("int8", 16, 64, 32)), region("q", 16), region("k", 16, 16),
                 into=Into(CPU, pack=True))  # fmt: skip
    assert isinstance(stack, RowStack)
    assert all(isinstance(part, PackedWeight) for part in stack.parts)


@pytest.mark.skipif(compiled.path() is None, reason="no compiled kernels")
def test_experts_packed_in_pairs() -> None:
    source = Matrices(**{f"{part}{e}": make("int8", 32, 64, 16) for part in "gu" for e in range(2)})
    source.weights["u1"] = make("int8", 40, 64, 16).rows(slice(8, 40))
    regions = [region(f"{part}{e}", 32, 32 * (part == "u"), e) for e in range(2) for part in "gu"]
    weight = load_experts(source, (2, 64, 64), regions, Into(CPU, True, True), lambda region: None)
    assert isinstance(weight, PackedWeight)
    assert weight.pairs
    assert torch.equal(wide(weight)[1], torch.cat([wide(source.weights["g1"]), wide(source.weights["u1"])]))


def test_a_shard_that_cuts_groups_is_refused() -> None:
    source = Matrices(q=make("int4", 6, 64, 32))
    with pytest.raises(CheckpointError, match="q: inputs 0 to 8 of 64: cut the groups of 32 to 8: lower expert_par"):
        load(source, Region("q", Span(0, 6), Span(0, 8)))
