"""The CUDA paths against their CPU twins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from protos.messages import SampleSpec, SamplingParams, SequenceSlice, ShardSpec, Span, StepPlan
from protos.model_config import load_model_spec
from protos.model_spec import ModelSpec
from workers.attention.flash import attend
from workers.attention.plan import dense_plan
from workers.attention.reference import attend_reference
from workers.kv_cache import BlockTable, PagedKV
from workers.model.moe import run_experts, run_experts_reference
from workers.model.weights import load_shard
from workers.model_runner import ModelRunner
from workers.transport.collectives import SingleShard

NEEDLE = Path(__file__).resolve().parents[2] / "configs" / "needle"
PAGE = 16


def whole_model(spec: ModelSpec) -> ShardSpec:
    return ShardSpec(
        0, 1, 0, 1, Span(0, spec.num_hidden_layers), Span(0, spec.num_attention_heads),
        Span(0, spec.num_key_value_heads), Span(0, spec.num_experts), Span(0, spec.intermediate_size),
        Span(0, spec.vocab_size),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("start", "rows"), [(0, 1), (0, 17), (64, 67), (1000, 193), (4095, 1)])
@pytest.mark.parametrize("shuffled", [False, True])
def test_attention(dtype: torch.dtype, start: int, rows: int, shuffled: bool) -> None:
    torch.manual_seed(start + rows)
    context = start + rows
    blocks = -(-context // PAGE)
    order = torch.randperm(blocks).tolist() if shuffled else list(range(blocks))
    table = BlockTable(PAGE)
    table.append(order)
    k, v = torch.randn(context, 2, 64), torch.randn(context, 2, 64)
    q = torch.randn(rows, 8, 64)
    kv = PagedKV(1, 2, 64, blocks, PAGE, dtype, "cuda")
    kv.write(0, table.runs(0, context), k.to("cuda", dtype), v.to("cuda", dtype))
    plan = dense_plan(start, rows, tile=64)
    got = attend(q.to("cuda", dtype), kv.keys(0), kv.values(0), table, plan, 0.125).float().cpu()
    expected = attend_reference(q.to(dtype).float(), k.to(dtype).float(), v.to(dtype).float(), start, plan, 0.125)
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    assert (got - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 17, 193])
def test_experts(dtype: torch.dtype, tokens: int) -> None:
    torch.manual_seed(tokens)
    x = torch.randn(tokens, 64).to(dtype)
    gate_up, down = (torch.randn(8, 256, 64) * 0.1).to(dtype), (torch.randn(8, 64, 128) * 0.1).to(dtype)
    experts = torch.stack([torch.randperm(8)[:2] for _ in range(tokens)])
    weights = torch.softmax(torch.randn(tokens, 2), -1)
    moved = [t.cuda() for t in (x, experts, weights, gate_up, down)]
    got = run_experts(*moved, Span(0, 8)).float().cpu()
    expected = run_experts_reference(x, experts, weights, gate_up, down, Span(0, 8)).float()
    assert (got - expected).abs().max() <= (1e-4 if dtype == torch.float32 else 2e-2) * expected.abs().max()


def test_whole_model_equals_cpu() -> None:
    """Needle checkpoint, float32, prefill in chunks of 193: logits on the GPU equal the CPU's."""
    torch.backends.cuda.matmul.allow_tf32 = False
    spec = load_model_spec(NEEDLE)
    shard = whole_model(spec)
    ids = torch.randint(5, spec.vocab_size, (1000,), generator=torch.Generator().manual_seed(7)).tolist()
    logits = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        weights = load_shard(NEEDLE, spec, shard, torch.float32, device)
        kv = PagedKV(spec.num_hidden_layers, spec.num_key_value_heads, spec.head_dim, 80, PAGE, torch.float32, device)
        runner = ModelRunner(spec, shard, weights, kv, SingleShard(), device)
        known = 0
        for step, start in enumerate(range(0, len(ids), 193), start=1):
            part = ids[start : start + 193]
            needed = -(-(start + len(part)) // PAGE)
            last = start + len(part) == len(ids)
            sample = SampleSpec(SamplingParams(), 0) if last else None
            piece = SequenceSlice(1, start, len(part), len(ids), part, range(known, needed), needed, sample)
            known = needed
            out = runner.execute(StepPlan(1, step, (piece,)), keep_logits=True)
        assert out.logits is not None
        logits.append(out.logits.cpu())
    assert (logits[0] - logits[1]).abs().max() <= 1e-4 * logits[0].abs().max()
