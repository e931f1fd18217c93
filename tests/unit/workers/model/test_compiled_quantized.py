"""The compiled products and experts with quantised weights against float64, on every instruction set of this CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from protos.stage.messages import Span
from tests.support.data.packing import random_weight
from tests.unit.workers.model.test_compiled import error, exact_experts, random
from workers.kernels.abi import Path
from workers.kernels.build import load, paths
from workers.model import compiled
from workers.model.layers import linear
from workers.model.moe import route, run_experts
from workers.quant.packed import pack
from workers.quant.weight import Kind, QuantizedWeight, RowStack

BEST = compiled.path()
EXPERTS, TOP_K = 8, 3
# kind, group, type of zero points, type of scales: what GPTQ, AWQ, compressed-tensors, FP8 and GGUF files hold
LAYOUTS = [
    ("int4", 32, None, torch.float16),
    ("int4", 128, None, torch.bfloat16),
    ("int4", 64, torch.uint8, torch.float16),
    ("int4", 32, torch.float16, torch.float16),
    ("int4", 16, torch.uint8, torch.float32),
    ("int4", 512, torch.uint8, torch.float16),  # more than a slice of K
    ("int4", 4096, torch.float16, torch.float16),
    ("int8", 32, None, torch.float16),
    ("int8", 4096, None, torch.float32),
    ("int8", 128, torch.int8, torch.bfloat16),
    ("int8", 32, torch.float16, torch.float16),
    ("int8", 16, None, torch.float16),
    ("float8_e4m3", 128, None, torch.bfloat16),
    ("float8_e4m3", 4096, None, torch.float32),
]

pytestmark = pytest.mark.skipif(BEST is None, reason=f"no compiled kernels: {load().reason or 'this CPU has no AVX2'}")


@pytest.fixture(autouse=True, params=paths() or [Path.PORTABLE], ids=lambda path: path.name.lower())
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "path", lambda: request.param)


def bound(x: torch.Tensor, weight: QuantizedWeight, wanted: torch.Tensor) -> float:
    """Return the error allowed: that of PyTorch's product with weights rounded to bfloat16, or that of the result."""
    return 1.5 * max(error(F.linear(x, weight.dequantize(torch.bfloat16)), wanted), 2e-3)


def some_rows(row: int, tokens: int, group: int) -> slice:
    """Return rows whose results do not depend on the others of `tokens`, and which have `row`: as few as can be.

    On AMX weights in groups below 128 are rounded in calls of more than 16 rows alone.
    """
    least = 17 if compiled.path() == Path.AMX and group < 128 and tokens > 16 else 1
    first = min(row, tokens - least)
    return slice(first, first + least)


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 67, 193])
@pytest.mark.parametrize(("kind", "group", "zeros", "scale"), LAYOUTS)
def test_linear(tokens: int, kind: Kind, group: int, zeros: torch.dtype | None, scale: torch.dtype) -> None:
    x, weight = random(tokens, 549)[:, :544], random_weight(kind, (272, 544), group, zeros, scale)
    wanted = x.double() @ weight.dequantize(torch.float64).T
    own = pack(weight)
    got = linear(x, own)
    assert error(got, wanted) < bound(x, weight, wanted)
    for row in (0, tokens // 2, tokens - 1):
        some = some_rows(row, tokens, group)
        assert torch.equal(linear(x[some], own), got[some])


@pytest.mark.parametrize("kind", ["int4", "int8", "float8_e4m3"])
def test_one_strip_with_bias(kind: Kind) -> None:
    x, weight, bias = random(3, 32), random_weight(kind, (16, 32), 32), random(16)
    wanted = x.double() @ weight.dequantize(torch.float64).T + bias.double()
    assert error(linear(x, pack(weight), bias), wanted) < 4e-3


def test_every_code_of_float8() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(1, 2)
    weight = QuantizedWeight("float8_e4m3", 32, codes, torch.ones(16, 1))
    for rows in (1, 16):
        x = torch.eye(16, 32, dtype=torch.bfloat16)[:rows]
        got = linear(x, pack(weight)).double()
        values = codes[:, :16].contiguous().view(torch.float8_e4m3fn).double()
        for row in range(rows):
            ours, theirs = got[row], values[:, row]
            nan = values.isnan().any(dim=1)  # 0 times NaN: the whole sum
            assert torch.equal(ours[~nan], theirs[~nan])
            assert ours[nan].isnan().all()


@pytest.mark.parametrize("tokens", [1, 16, 17, 193])
@pytest.mark.parametrize(("kind", "group", "zeros", "scale"), LAYOUTS)
def test_experts(tokens: int, kind: Kind, group: int, zeros: torch.dtype | None, scale: torch.dtype) -> None:
    hidden, width = 288, 160
    gate_up = random_weight(kind, (EXPERTS, 2 * width, hidden), group, zeros, scale)
    down = random_weight(kind, (EXPERTS, hidden, width), group, zeros, scale, seed=1)
    x, local = random(tokens, hidden), Span(0, EXPERTS)
    experts, scores = route(x, random(EXPERTS, hidden), TOP_K, True)
    wide = [weight.dequantize(torch.float64) for weight in (gate_up, down)]
    wanted = exact_experts(x, experts, scores, *wide, local)
    own = pack(gate_up, True), pack(down)
    got = run_experts(x, experts, scores, *own, local)
    plain = run_experts(x, experts, scores, gate_up, down, local)
    assert error(got, wanted) < 1.5 * max(error(plain, wanted), 4e-3)
    for row in (0, tokens // 2, tokens - 1):
        some = some_rows(row, tokens, group)
        assert torch.equal(run_experts(x[some], experts[some], scores[some], *own, local), got[some])


def test_one_of_the_two_is_not_packed() -> None:
    gate_up, down = random_weight("int4", (2, 64, 64), 32), random_weight("int4", (2, 64, 32), 32)
    x, scores = random(5, 64), torch.full((5, 2), 0.5)
    experts = torch.tensor([[0, 1]]).expand(5, 2)
    whole = run_experts(x, experts, scores, gate_up, down, Span(0, 2))
    assert torch.equal(run_experts(x, experts, scores, pack(gate_up, True), down, Span(0, 2)), whole)
    one = slice(0, 1)
    assert torch.equal(
        run_experts(x[one], experts[one], scores[one], pack(gate_up, True), down, Span(0, 2)),
        run_experts(x[one], experts[one], scores[one], gate_up, down, Span(0, 2)),
    )


def test_plain_and_quantised_experts_in_one_layer() -> None:
    gate_up, down = random_weight("int8", (2, 64, 64), 32), random(2, 64, 32)
    x, scores = random(5, 64), torch.full((5, 2), 0.5)
    experts = torch.tensor([[0, 1]]).expand(5, 2)
    wanted = exact_experts(x, experts, scores, gate_up.dequantize(torch.float64), down, Span(0, 2))
    got = run_experts(x, experts, scores, pack(gate_up, True), compiled.packed(down), Span(0, 2))
    assert error(got, wanted) < 6e-3


def test_stack_of_layouts() -> None:
    parts = [random_weight("int4", (32, 64), 32), random_weight("int8", (16, 64), 16)]
    x, bias = random(5, 64), random(64)
    stack = RowStack((pack(parts[0]), pack(parts[1]), random(16, 64)))
    wanted = x.double() @ stack.dequantize(torch.float64).T + bias.double()
    assert stack.shape == (64, 64)
    assert error(linear(x, stack, bias), wanted) < 6e-3
