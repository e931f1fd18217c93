"""The CUDA paths against reference implementations on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from protos.model.config_json import load_model_spec
from protos.model.spec import ModelSpec
from protos.stage.messages import SampleSpec, SamplingParams, SequenceSlice, ShardSpec, Span, StepPlan
from tests.support.paths import NEEDLE
from workers.attention import flash as flash_module
from workers.attention.flash import flash, supports_flash_attn
from workers.attention.plan import AttentionPlan, Queries, Selection
from workers.attention.torch_backend import attend
from workers.bench.cases.attention import attend_reference
from workers.bench.cases.experts import run_experts_reference
from workers.kv.paged import PagedKV, PageTable, quantise
from workers.model.moe import run_experts
from workers.model.weights import load_shard
from workers.runner.model_runner import ModelRunner
from workers.transport.collectives import Collectives

PAGE = 16


def whole_model(spec: ModelSpec) -> ShardSpec:
    return ShardSpec(
        0, 1, 0, 1, Span(0, spec.num_hidden_layers), Span(0, spec.num_attention_heads),
        Span(0, spec.num_key_value_heads), Span(0, spec.num_experts), Span(0, spec.intermediate_size),
        Span(0, spec.vocab_size),
    )  # fmt: skip


@pytest.mark.parametrize("cache", ["the same", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("start", "rows", "distance"), [
    (0, 1, 0), (0, 17, 0), (64, 67, 0), (1000, 193, 0), (4095, 1, 0), (1536, 193, 512), (1535, 1, 512), (600, 17, 512),
])  # fmt: skip
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("shuffled", [False, True])
def test_attention(
    dtype: torch.dtype, start: int, rows: int, distance: int, shuffled: bool, sparse: bool, cache: str
) -> None:
    torch.manual_seed(start + rows)
    context = start + rows
    pages = -(-context // PAGE)
    order = torch.randperm(pages).tolist() if shuffled else list(range(pages))
    table = PageTable(PAGE)
    table.append(order)
    k, v = torch.randn(2, context, 2, 64).to(dtype)
    q = torch.randn(3, rows, 8, 64).to(dtype)
    kv = PagedKV(1, 2, 64, pages, PAGE, torch.int8 if cache == "int8" else dtype, "cuda")
    kv.write(0, table.runs(0, context), k.cuda(), v.cuda())
    if cache == "int8":
        k, v = ((small * scales[..., None]).to(dtype) for small, scales in (quantise(k), quantise(v)))
    near = Selection(np.array([[0, 70], [200, 263]], np.int32), np.arange(0, context, 7, dtype=np.int32))
    plan = AttentionPlan(start, rows, distance, (near,) * 8 if sparse else None)
    scales = torch.linspace(0.1, 0.15, rows) if dtype == torch.float32 else torch.full((rows,), 0.125)
    got = attend(Queries(*q.cuda()), kv.layer(0), table, plan, scales).float().cpu()
    expected = attend_reference(Queries(*q.float()), k.float(), v.float(), plan, scales)
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    assert (got - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("kernel", ["flash-attn", "PyTorch"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [1, 17, 67, 193])
def test_fused_kernels(rows: int, causal: bool, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel == "PyTorch":
        monkeypatch.setattr(flash_module, "supports_flash_attn", lambda device, dtype, dim: False)
    elif not supports_flash_attn(torch.device("cuda"), torch.bfloat16, 64):
        pytest.skip("flash-attn (the extra `cuda`) is not installed, or this GPU is too old for it")
    torch.manual_seed(rows)
    q, (k, v) = torch.randn(rows, 8, 64).bfloat16(), torch.randn(2, 2, rows if causal else 1000, 64).bfloat16()
    out, lse = flash(q.cuda(), k.cuda(), v.cuda(), causal, 0.125)
    logits = torch.einsum("qhd,hkd->hqk", q.double(), k.double().repeat_interleave(4, dim=0)) * 0.125
    if causal:
        logits = logits.masked_fill(torch.ones(rows, rows, dtype=torch.bool).triu(1), -torch.inf)
    expected = torch.einsum("hqk,hkd->qhd", logits.softmax(-1), v.double().repeat_interleave(4, dim=0))
    assert (out.double().cpu() - expected).abs().max() <= 2e-2 * expected.abs().max()
    assert (lse.double().cpu() - logits.logsumexp(-1).T).abs().max() <= 1e-2


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
    pytest.importorskip("safetensors", reason="a checkpoint is read")
    torch.backends.cuda.matmul.allow_tf32 = False
    spec = load_model_spec(NEEDLE)
    shard = whole_model(spec)
    ids = torch.randint(5, spec.vocab_size, (1000,), generator=torch.Generator().manual_seed(7)).tolist()
    logits = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        weights = load_shard(NEEDLE, spec, shard, torch.float32, device)
        kv = PagedKV(spec.num_hidden_layers, spec.num_key_value_heads, spec.head_dim, 80, PAGE, torch.float32, device)
        runner = ModelRunner(spec, shard, weights, kv, Collectives(), device)
        known = 0
        for step, start in enumerate(range(0, len(ids), 193), start=1):
            part = ids[start : start + 193]
            needed = -(-(start + len(part)) // PAGE)
            last = start + len(part) == len(ids)
            sample = SampleSpec(SamplingParams(), 0) if last else None
            piece = SequenceSlice(1, start, len(part), len(ids), part, range(known, needed), needed, sample)
            known = needed
            out = runner.execute(StepPlan(step, (piece,)), keep_logits=True)
        assert out.logits is not None
        logits.append(out.logits.cpu())
    assert (logits[0] - logits[1]).abs().max() <= 1e-4 * logits[0].abs().max()
