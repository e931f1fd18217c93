"""Prefill on CUDA devices against the functions that CPUs use, and how often keys and values are staged for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from protos.model.spec import DualChunkSpec, ModelSpec
from protos.stage.messages import SampleSpec, SamplingParams, SequenceSlice, StepPlan
from workers.attention import cuda
from workers.bench.model import benchmark_spec
from workers.kernels.triton.layer import calls
from workers.kv.paged import PagedKV
from workers.model.device import prefill
from workers.model.weights import dummy_shard, whole_model
from workers.runner.model_runner import ModelRunner
from workers.transport.collectives import Collectives

PAGE, PAGES, CPU = 16, 32, torch.device("cpu")
PLAIN = replace(
    benchmark_spec(layers=2), vocab_size=97, hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    num_experts=0, intermediate_size=64,
)  # fmt: skip
CHUNKS = DualChunkSpec(chunk_size=96, local_size=16, original_max_position_embeddings=64)  # begin 80 tokens apart
IDS = torch.randint(3, 97, (300,), generator=torch.Generator().manual_seed(1)).tolist()
GREEDY = SampleSpec(SamplingParams(), 0)


def part(sequence: int, start: int, stop: int, pages: list[int]) -> SequenceSlice:
    """Rows of a sequence, the last of which are sampled."""
    known, needed = -(-start // PAGE), -(-stop // PAGE)
    return SequenceSlice(sequence, start, stop - start, 40, IDS[start:stop], pages[known:needed], needed, GREEDY)


def run(spec: ModelSpec, first_pages: list[int]) -> torch.Tensor:
    """Read a long prompt in two steps, in the second beside two short ones: one of few rows, and one that decodes."""
    shard = whole_model(spec)
    kv = PagedKV(2, 2, 16, PAGES, PAGE, torch.float32)
    runner = ModelRunner(spec, shard, dummy_shard(spec, shard, torch.float32, CPU), kv, Collectives(), CPU)
    runner.execute(StepPlan(1, (part(1, 0, 63, first_pages), part(3, 0, 1, [31]))))
    slices = part(1, 63, 193, first_pages), part(2, 0, 40, [30, 17, 29]), part(3, 1, 2, [31])
    logits = runner.execute(StepPlan(2, slices), keep_logits=True).logits
    assert logits is not None
    return logits


@pytest.mark.parametrize(
    ("spec", "first_pages"),
    [(PLAIN, [*range(15, 2, -1)]), (replace(PLAIN, dual_chunk=CHUNKS), [*range(3, 16)])],
    ids=["plain, staged", "chunks, in place"],
)
def test_a_sequence_is_staged_once_a_layer(
    spec: ModelSpec, first_pages: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = run(spec, first_pages)
    monkeypatch.setattr(calls, "supports", lambda device: True)
    monkeypatch.setattr(cuda, "supports_lists", lambda *types: True)
    staged, stage, read, attend = [], cuda.stage, [], prefill.attend
    monkeypatch.setattr(cuda, "stage", lambda kv, table, stop: staged.append(stop) or stage(kv, table, stop))
    monkeypatch.setattr(prefill, "attend", lambda q, kv, *rest: read.append(rest[1].length) or attend(q, kv, *rest))
    got = run(spec, first_pages)
    assert staged == [193, 193], "once in each of two layers: one piece, or one a DCA chunk"
    assert read == [63, 63, 40, 40], "rows that are too few read the pages"
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
