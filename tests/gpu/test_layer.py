"""The Triton kernels of a layer on a GPU, in bfloat16, against float32 on the CPU."""

from __future__ import annotations

import pytest
import torch

from protos.stage.messages import Span
from workers.attention.plan import AttentionPlan, Queries
from workers.bench.cases.attention import attend_reference
from workers.bench.cases.experts import run_experts_reference
from workers.kernels.triton.layer import calls
from workers.kv.paged import PagedKV, SlotRun
from workers.model.rope import CosSin, norm_and_rotate_

PAGE, DIM, HEADS, KV_HEADS = 64, 128, 32, 4
FP8 = torch.float8_e4m3fn
CACHES = [torch.bfloat16, torch.int8, FP8]


def close(got: torch.Tensor, wanted: torch.Tensor, bound: float) -> bool:
    return bool((got.float().cpu() - wanted.float()).abs().max() <= bound * wanted.float().abs().max())


def skip_if_too_old(cache: torch.dtype) -> None:
    if cache == FP8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 needs sm_89")


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("rows", [1, 17, 193])
def test_heads(rows: int, cache: torch.dtype) -> None:
    from workers.kernels.triton.layer.heads import store_heads

    skip_if_too_old(cache)
    torch.manual_seed(rows)
    qkv, norms = torch.randn(rows, HEADS + 2 * KV_HEADS, DIM).bfloat16(), torch.rand(HEADS + KV_HEADS, DIM) + 0.5
    turns = [CosSin(angles.cos(), angles.sin()) for angles in torch.rand(3, rows, 1, DIM // 2) * 6]
    mine, twin = PagedKV(1, KV_HEADS, DIM, 4, PAGE, cache, "cuda"), PagedKV(1, KV_HEADS, DIM, 4, PAGE, cache)
    moved = [(cos.cuda(), sin.cuda()) for cos, sin in turns]
    got = store_heads(qkv.cuda(), norms.cuda(), 1e-6, moved, torch.arange(3, 3 + rows).int().cuda(), mine.layer(0))
    rotated = [norm_and_rotate_(qkv[:, :-KV_HEADS].float(), turn, norms, 1e-6) for turn in turns]
    assert close(got, torch.stack(rotated)[:, :, :HEADS], 1e-2)
    twin.write(0, [SlotRun(3, rows)], rotated[0][:, HEADS:], qkv[:, -KV_HEADS:].float())
    for side in ("keys", "values"):
        codes, wanted = (getattr(one.layer(0), side)[:, 3 : 3 + rows].cpu().float() for one in (mine, twin))
        assert close(codes, wanted, 1e-2 if cache != FP8 else 0.08)
        if side == "values" and cache != torch.bfloat16:
            assert torch.equal(codes, wanted)  # the same inputs, so the same codes


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("distance", [0, 1024])
def test_decode(distance: int, cache: torch.dtype) -> None:
    from workers.kernels.triton.layer.decode import Rows, attend_rows, count_splits

    skip_if_too_old(cache)
    torch.manual_seed(1)
    lengths = [1, 64, 1025, 5000]
    pages = [-(-length // PAGE) for length in lengths]
    firsts = (torch.randperm(sum(pages)).int() * PAGE).split(pages)
    tables = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
    kv = PagedKV(1, KV_HEADS, DIM, sum(pages), PAGE, cache)
    kv.write(0, [SlotRun(0, sum(pages) * PAGE)], *torch.randn(2, sum(pages) * PAGE, KV_HEADS, DIM))
    layer = kv.layer(0)
    moved = type(layer)(*(None if side is None else side.cuda() for side in (
        layer.keys, layer.values, layer.key_scales, layer.value_scales
    )))  # fmt: skip
    for table, first in zip(tables, firsts, strict=True):
        table[: len(first)] = first
    q, scales = torch.randn(3 if distance else 1, len(lengths), HEADS, DIM).bfloat16(), torch.rand(len(lengths)) / 8
    count = torch.cuda.get_device_properties(0).multi_processor_count
    splits = count_splits(len(lengths), KV_HEADS, count, max(lengths))
    moved_rows = (side.cuda() for side in (tables, torch.arange(4).int(), torch.tensor(lengths).int(), scales))
    rows = Rows(*moved_rows, PAGE, distance, splits)
    got = attend_rows(q.cuda(), moved, rows)
    for row, length in enumerate(lengths):
        slots = (tables[row][:, None] + torch.arange(PAGE)).flatten()[:length].long()
        sides = ((layer.keys, layer.key_scales), (layer.values, layer.value_scales))
        k, v = (
            (side[:, slots].float() * (1.0 if steps is None else steps[:, slots, None])).transpose(0, 1)
            for side, steps in sides
        )
        queries = Queries(*(side[row : row + 1].float() for side in q))
        wanted = attend_reference(queries, k, v, AttentionPlan(length - 1, 1, distance), scales[row : row + 1])
        assert close(got[row], wanted[0], 2e-2)


@pytest.mark.parametrize("tokens", [1, 17, 193, 2048])
def test_experts(tokens: int) -> None:
    """From 64 rows an expert on, PyTorch's grouped product computes on sm_90."""
    torch.manual_seed(tokens)
    gate_up, down = (torch.randn(32, 256, 64) / 8).bfloat16(), (torch.randn(32, 64, 128) / 11).bfloat16()
    x, logits = torch.randn(tokens, 64).bfloat16(), torch.randn(tokens, 32)
    experts, weights = calls.route(logits.cuda(), 4, True)
    kept, wanted = torch.softmax(logits, -1).topk(4)
    assert torch.equal(experts.cpu(), wanted)
    assert close(weights, kept / kept.sum(-1, keepdim=True), 1e-5)
    got = calls.run_experts(x.cuda(), experts, weights, gate_up.cuda(), down.cuda(), 0)
    rows = slice(0, 200)
    expected = run_experts_reference(x[rows], wanted[rows], weights[rows].cpu(), gate_up, down, Span(0, 32))
    assert close(got[rows], expected, 2e-2)


def test_row_operations_and_the_greedy_choice() -> None:
    x, delta, weight = torch.randn(193, 2048).bfloat16(), torch.randn(193, 2048).bfloat16(), torch.rand(2048).bfloat16()
    total, normed = calls.add_rms_norm(x.cuda(), delta.cuda(), weight.cuda(), 1e-6)
    assert torch.equal(total.cpu(), x + delta)
    assert close(normed, torch.nn.functional.rms_norm((x + delta).float(), (2048,), weight.float(), 1e-6), 1e-2)
    gate, up = x.float().chunk(2, dim=1)
    assert close(calls.swiglu(x.cuda()), torch.nn.functional.silu(gate) * up, 1e-2)
    logits = torch.randn(3, 151_936)
    logits[1, [9, 70_000]] = 100.0
    logits[2, 5] = torch.inf
    tokens, finite = calls.choose_greedily(logits.cuda()).tolist()
    assert tokens[:2] == [int(logits[0].argmax()), 9]
    assert finite == [1, 1, 0]
