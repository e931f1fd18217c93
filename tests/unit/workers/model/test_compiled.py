"""The compiled products, experts and row operations against float64, on every instruction set this CPU has."""

import pytest
import torch
import torch.nn.functional as F

from protos.stage.messages import Span
from tests.support.data import packing
from workers.kernels.abi import Path
from workers.kernels.build import load, paths
from workers.model import compiled, moe, rope
from workers.model.layers import add_rms_norm, inverse_rms, linear, rms_norm
from workers.model.moe import route, run_experts

EXPERTS, TOP_K = 8, 3
BF16, CPU = torch.bfloat16, torch.device("cpu")
SIZES = (1, 2, 17, 67, 193)
BEST = compiled.path()

pytestmark = pytest.mark.skipif(BEST is None, reason=f"no compiled kernels: {load().reason or 'this CPU has no AVX2'}")


@pytest.fixture(autouse=True, params=paths() or [Path.PORTABLE], ids=lambda path: path.name.lower())
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "path", lambda: request.param)


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(BF16)


def packed(weight: torch.Tensor, pairs: bool = False) -> torch.Tensor:
    out = packing.packed(weight, pairs)
    assert out.shape != weight.shape
    return out


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square error, as a part of the root mean square of what is wanted."""
    return float((got.double() - wanted).norm() / wanted.norm())


def expert_weights(hidden: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return random(EXPERTS, 2 * width, hidden, scale=hidden**-0.5), random(EXPERTS, hidden, width, scale=width**-0.5)


def exact_experts(
    x: torch.Tensor, experts: torch.Tensor, scores: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, local: Span
) -> torch.Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for expert in range(*local):
        token, slot = (experts == expert).nonzero(as_tuple=True)
        gate, up = (x[token].double() @ gate_up[expert - local.start].double().T).chunk(2, dim=1)
        rows = (F.silu(gate) * up) @ down[expert - local.start].double().T
        out.index_add_(0, token, rows * scores[token, slot, None].double())
    return out


@pytest.mark.parametrize(("shape", "pairs"), [((16, 32), False), ((48, 96), False), ((3, 64, 96), True)])
def test_packing_keeps_every_value(shape: tuple[int, ...], pairs: bool):
    weight = random(*shape)
    assert torch.equal(packing.unpacked(packed(weight, pairs)), weight)
    assert packing.unpacked(weight) is weight


def test_packing_by_parts():
    weight = random(80, 64)
    whole, parts = packed(weight), torch.empty(5, 2, 16, 16, 2, dtype=BF16)
    for start, stop in ((0, 1), (1, 17), (17, 48), (48, 80)):
        compiled.pack_rows(parts, start, weight[start:stop], False)
    assert torch.equal(whole, parts)


@pytest.mark.parametrize(
    ("shape", "pairs"),
    [((15, 32), False), ((16, 31), False), ((64, 48), False), ((8, 32, 32), True), ((8, 48, 32), False)],
)
def test_other_sizes_stay_plain(shape: tuple[int, ...], pairs: bool):
    assert compiled.packed_shape(shape, BF16, CPU, pairs) == shape
    assert packing.packed(weight := random(*shape), pairs) is weight
    assert compiled.packed_shape((8, 64, 64), torch.float32, CPU, pairs) == (8, 64, 64)


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize(("outputs", "depth", "bias"), [(16, 32, True), (272, 544, False), (272, 544, True)])
def test_linear(tokens: int, outputs: int, depth: int, bias: bool):
    x, weight = random(tokens, depth + 5)[:, :depth], random(outputs, depth, scale=depth**-0.5)
    added = random(outputs) if bias else None
    wanted = x.double() @ weight.double().T + (added.double() if bias else 0.0)
    got = linear(x, packed(weight), added)
    assert error(got, wanted) < 1.5 * max(error(F.linear(x, weight, added), wanted), 1e-3)
    for row in (0, tokens // 2, tokens - 1):
        assert torch.equal(linear(x[row : row + 1], packed(weight), added)[0], got[row])


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize(("hidden", "width"), [(32, 32), (288, 160)])
def test_experts(tokens: int, hidden: int, width: int):
    gate_up, down = expert_weights(hidden, width)
    x, local = random(tokens, hidden), Span(0, EXPERTS)
    experts, scores = route(x, random(EXPERTS, hidden), TOP_K, True)
    wanted = exact_experts(x, experts, scores, gate_up, down, local)
    own = packed(gate_up, True), packed(down)
    got = run_experts(x, experts, scores, *own, local)
    assert error(got, wanted) < 1.5 * error(run_experts(x, experts, scores, gate_up, down, local), wanted)
    for row in (0, tokens // 2, tokens - 1):
        one = slice(row, row + 1)
        assert torch.equal(run_experts(x[one], experts[one], scores[one], *own, local)[0], got[row])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("local", [Span(0, 3), Span(3, 8), Span(7, 8)])
def test_shards_of_experts(local: Span, threads: int):
    gate_up, down = expert_weights(64, 96)
    x = random(67, 64)
    experts, scores = route(x, random(EXPERTS, 64), TOP_K, False)
    own = slice(*local)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = run_experts(x, experts, scores, packed(gate_up[own], True), packed(down[own]), local)
    finally:
        torch.set_num_threads(before)
    wanted = exact_experts(x, experts, scores, gate_up[own], down[own], local)
    assert error(got, wanted) < 6e-3
    foreign = ((experts < local.start) | (experts >= local.stop)).all(dim=1)
    assert foreign.any()
    assert not got[foreign].any()


@pytest.mark.parametrize("tokens", [1, 600])
def test_all_tokens_at_one_expert(tokens: int, monkeypatch: pytest.MonkeyPatch):
    gate_up, down = expert_weights(512, 32)
    x, experts, scores = random(tokens, 512), torch.full((tokens, 1), 7), torch.rand(tokens, 1)
    wanted = exact_experts(x, experts, scores, gate_up, down, Span(0, EXPERTS))
    own = packed(gate_up, True), packed(down)
    whole = run_experts(x, experts, scores, *own, Span(0, EXPERTS))
    assert error(whole, wanted) < 6e-3
    monkeypatch.setattr(moe, "_STEP_TOKENS", 199)
    assert torch.equal(run_experts(x, experts, scores, *own, Span(0, EXPERTS)), whole)


def test_large_gates_neither_overflow_nor_vanish():
    gate_up, down = torch.zeros(1, 64, 32, dtype=BF16), torch.zeros(1, 32, 32, dtype=BF16)
    gates = torch.tensor([-3e38, -200.0, -80.0, -1.0, 0.0, 1.0, 80.0, 200.0, 1e38]).to(BF16)
    gate_up[0, : len(gates), 0], gate_up[0, 32 : 32 + len(gates), 0], down[0] = gates, 1.0, torch.eye(32)
    x, one = torch.eye(1, 32, dtype=BF16), torch.ones(1, 1)
    got = run_experts(x, one.long() - 1, one, packed(gate_up, True), packed(down), Span(0, 1))
    wanted = F.silu(gates.double())
    torch.testing.assert_close(got[0, : len(gates)].double(), wanted, atol=1e-30, rtol=1 / 128)


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("hidden", [16, 272])
def test_rms_norm(tokens: int, hidden: int):
    x, weight = random(tokens, hidden + 3, scale=4.0)[:, :hidden], random(hidden)
    wide = x.double()
    wanted = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    torch.testing.assert_close(rms_norm(x, weight, 1e-6).double(), wanted, atol=1e-9, rtol=1 / 255)
    assert torch.equal(rms_norm(x[-1:], weight, 1e-6)[0], rms_norm(x, weight, 1e-6)[-1])


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("hidden", [16, 272])
@pytest.mark.parametrize("strided", [False, True])
def test_rms_norm_of_a_sum(tokens: int, hidden: int, strided: bool):
    x, weight = random(tokens, hidden + 3, scale=4.0)[:, :hidden], random(hidden)
    delta = random(tokens, 2 * hidden)[:, ::2] if strided else random(tokens, hidden)
    kept, wanted = x.clone(), x + delta
    total, normed = add_rms_norm(x, delta, weight, 1e-6)
    assert torch.equal(total, wanted)
    assert torch.equal(normed, rms_norm(wanted, weight, 1e-6))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize(("dim", "normed", "apart", "constant"), [(128, 1, 0, 0), (96, 0, 1, 0), (32, 1, 1, 1)])
def test_norm_and_rotation(tokens: int, dim: int, normed: bool, apart: bool, constant: bool):
    heads = 3
    whole = random(tokens, heads + 2, dim, scale=3.0)
    x, weight = whole[:, 1 : 1 + heads], torch.rand(heads, dim) + 0.5 if normed else None
    angles = torch.rand(1 if constant else tokens, 1, dim // 2)
    cos, sin = (table.expand(tokens, -1, -1) for table in (angles.cos(), angles.sin()))
    wide = x.double()
    if weight is not None:
        wide = wide * inverse_rms(wide, 1e-6) * weight.double()
    left, right = wide.chunk(2, dim=-1)
    wanted = torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
    fallback = rope.norm_and_rotate_(x.float().clone(), rope.CosSin(cos, sin), weight, 1e-6)
    torch.testing.assert_close(fallback.double(), wanted, atol=1e-5, rtol=1e-5)
    out, kept = torch.empty(tokens, heads, dim, dtype=BF16) if apart else x, whole.clone()
    assert compiled.supports_norm_rotate(x)
    got = compiled.norm_rotate(x, cos, sin, weight, 1e-6, out)
    assert got is out
    torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1 / 255)
    assert torch.equal(whole[:, 0], kept[:, 0])
    assert torch.equal(whole[:, -1], kept[:, -1])


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize(("count", "top_k", "normalise"), [(1, 1, True), (8, 8, False), (60, 4, False), (128, 8, True)])
def test_routing(tokens: int, count: int, top_k: int, normalise: bool):
    logits = random(tokens, count, scale=3.0)
    logits[:, count // 2] = logits[:, 0]  # equal ones: the first wins
    experts, weights = compiled.route(logits, top_k, normalise)
    order = logits.float().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    assert torch.equal(experts, order)
    wanted = torch.softmax(logits.double(), -1).gather(1, order)
    wanted = wanted / wanted.sum(-1, keepdim=True) if normalise else wanted
    torch.testing.assert_close(weights.double(), wanted, atol=1e-7, rtol=1e-5)
