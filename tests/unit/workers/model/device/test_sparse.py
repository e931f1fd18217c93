"""Sparse prefill of a whole model by the kernels of CUDA devices against the functions that CPUs use."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from protos.model.spec import DualChunkSpec, HeadBudget, ModelSpec, SparseSpec
from protos.stage.messages import CellReport, SampleSpec, SamplingParams, SequenceSlice, StepPlan
from workers.attention import compiled as compiled_attention
from workers.attention import cuda
from workers.attention.attend import attend
from workers.bench.model import benchmark_spec
from workers.kernels.triton.layer import calls
from workers.kv.paged import PagedKV
from workers.model import sparse_prefill
from workers.model.weights import dummy_shard, whole_model
from workers.runner.model_runner import ModelRunner
from workers.sparse import vertical_slash
from workers.sparse.estimate import Estimate
from workers.transport.collectives import Collectives

PAGE, CPU, PAGES, LENGTH = 16, torch.device("cpu"), 64, 449
SPARSE = SparseSpec(threshold=32, last_q=17, cell=128, uniform=HeadBudget(10, 100))
PLAIN = replace(
    benchmark_spec(layers=1), vocab_size=97, hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    num_experts=0, intermediate_size=64, sparse=SPARSE,
)  # fmt: skip
CHUNKS = DualChunkSpec(chunk_size=96, local_size=32, original_max_position_embeddings=64)
IDS = torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(1)).tolist()
GREEDY = SampleSpec(SamplingParams(), 0)


def part(sequence: int, start: int, stop: int) -> SequenceSlice:
    """Rows of a prompt whose pages lie in descending order; the last ones are sampled."""
    known, needed = -(-start // PAGE), -(-stop // PAGE)
    pages = [32 * sequence - 1 - page for page in range(known, needed)]
    ids, sample = IDS[sequence - 1][start:stop], GREEDY if stop == LENGTH else None
    return SequenceSlice(sequence, start, stop - start, LENGTH, ids, pages, needed, sample)


def run(spec: ModelSpec) -> tuple[torch.Tensor, list[CellReport]]:
    """Read two prompts: cells of one, then cells of both in one step; returns the last logits, and all reports."""
    shard = whole_model(spec)
    kv = PagedKV(1, 2, 16, PAGES, PAGE, torch.float32)
    runner = ModelRunner(spec, shard, dummy_shard(spec, shard, torch.float32, CPU), kv, Collectives(), CPU)
    plans = [
        StepPlan(1, (part(1, 0, 256),)),
        StepPlan(2, (part(1, 256, LENGTH), part(2, 0, 128))),
    ]
    outputs = [runner.execute(plan, keep_logits=True) for plan in plans]
    logits = outputs[-1].logits
    assert logits is not None
    return logits, [report for out in outputs for report in out.cells]


def attend_as_the_kernels(q: Any, kv: Any, table: Any, plan: Any, scales: Any, visited: Any = None) -> torch.Tensor:
    return attend(q, kv, table, cuda.executed_plan(plan), scales, visited)


def watch_scales(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Note for every cell whether attention takes scales that were moved to the device before the layers.

    A copy of pageable memory waits for the device, in every layer and cell.
    """
    moved: list[torch.Tensor] = []
    seen: list[bool] = []
    attend_lists = cuda.attend_lists

    def move(host: torch.Tensor, device: torch.device) -> torch.Tensor:
        moved.append(host.clone())
        return moved[-1]

    def watch(q: Any, staged: Any, plan: Any, scales: Any, lists: Any, out: Any) -> Any:
        seen.append(any(scales.each is one for one in moved))
        return attend_lists(q, staged, plan, scales, lists, out)

    monkeypatch.setattr(cuda, "moved", move)
    monkeypatch.setattr(cuda, "attend_lists", watch)
    return seen


@pytest.mark.parametrize("spec", [PLAIN, replace(PLAIN, dual_chunk=CHUNKS)], ids=["plain", "chunks"])
def test_sparse_prefill(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_attention, "supports", lambda q, kv: False)
    monkeypatch.setattr(vertical_slash, "_backend", lambda cell, keys: Estimate)
    with monkeypatch.context() as twin:
        twin.setattr(sparse_prefill, "attend", attend_as_the_kernels)
        wanted, reports = run(spec)
    monkeypatch.setattr(calls, "supports", lambda device: True)
    monkeypatch.setattr(cuda, "supports_lists", lambda *types: True)
    seen = watch_scales(monkeypatch)
    got, found = run(spec)
    assert seen == [True] * len(found)
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()

    def order(report: CellReport) -> tuple[int, int, int]:
        return report.sequence, report.layer, report.start

    assert len(found) == len(reports) >= 5
    for mine, other in zip(sorted(found, key=order), sorted(reports, key=order), strict=True):
        assert (order(mine), mine.length, list(mine.dense)) == (order(other), other.length, list(other.dense))
        assert mine.density == pytest.approx(list(other.density))
        assert mine.estimated_recall == pytest.approx(list(other.estimated_recall), abs=3e-4)
        assert mine.held_out_recall == pytest.approx(list(other.held_out_recall), abs=1e-4)
    assert any(share < 1 for report in found for share in report.density)
