"""The needle checkpoint by the kernels of CUDA devices: sparse prefill in chunks, then decoding, as on a CPU."""

from __future__ import annotations

import gzip
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from protos.model.config_json import load_model_spec
from protos.model.spec import DualChunkSpec, HeadBudget, ModelSpec, SparseSpec
from protos.stage.messages import CellReport, SampleSpec, SamplingParams, SequenceSlice, StepPlan
from tests.support.paths import NEEDLE
from workers.attention import compiled as compiled_attention
from workers.attention import cuda
from workers.attention.attend import attend
from workers.kernels.triton.layer import calls, experts
from workers.kv.paged import PagedKV
from workers.model import sparse_prefill
from workers.model.weights import load_shard, whole_model
from workers.runner.model_runner import ModelRunner, StepOutput
from workers.sparse import vertical_slash
from workers.sparse.estimate import Estimate
from workers.transport.collectives import Collectives

PAGE, CPU, PAGES = 16, torch.device("cpu"), 64
CHUNKS = (0, 128, 384)  # where steps of the prompt begin
SPARSE = SparseSpec(threshold=256, last_q=32, cell=128, uniform=HeadBudget(40, 100))
DUAL_CHUNK = DualChunkSpec(chunk_size=160, local_size=32, original_max_position_embeddings=128)
SENTENCE = " The secret code of quiet harbor is 40712."


def ids() -> tuple[list[int], list[int]]:
    """Return the tokens of a prompt, a page of the book with one needle, and those of its answer."""
    tokenizer = Tokenizer.from_file(str(NEEDLE / "tokenizer.json"))
    book = gzip.decompress((NEEDLE / "book.txt.gz").read_bytes()).decode()[:1500]
    at = book.index("\n", 500)
    text = f"{book[:at]}\n{SENTENCE.strip()}{book[at:]}\nQuestion: What is the secret code of quiet harbor?\nAnswer:"
    prompt = tokenizer.encode(text).ids
    return prompt, tokenizer.encode(text + SENTENCE).ids[len(prompt) :]


def run(spec: ModelSpec) -> tuple[list[StepOutput], list[int]]:
    """Read the prompt in chunks and then decode its answer; returns what was sampled, and the answer."""
    prompt, answer = ids()
    shard = whole_model(spec)
    weights = load_shard(NEEDLE, spec, shard, torch.float32, CPU)
    kv = PagedKV(shard.layers.size, spec.num_key_value_heads, spec.head_dim, PAGES, PAGE, torch.float32)
    runner = ModelRunner(spec, shard, weights, kv, Collectives(), CPU)
    tokens, bounds = prompt + answer, [*CHUNKS, *range(len(prompt), len(prompt) + len(answer))]
    outputs = []
    for number, (start, stop) in enumerate(pairwise(bounds), 1):
        known, needed = -(-start // PAGE), -(-stop // PAGE)
        pages = [PAGES - 1 - page for page in range(known, needed)]
        sample = SampleSpec(SamplingParams(), 0) if stop >= len(prompt) else None
        part = SequenceSlice(1, start, stop - start, len(prompt), tokens[start:stop], pages, needed, sample)
        outputs.append(runner.execute(StepPlan(number, (part,)), keep_logits=True))
    return outputs, answer


def attend_as_the_kernels(q: Any, kv: Any, table: Any, plan: Any, scales: Any, visited: Any = None) -> torch.Tensor:
    return attend(q, kv, table, cuda.executed_plan(plan), scales, visited)


def reports(outputs: list[StepOutput]) -> list[CellReport]:
    return sorted((one for out in outputs for one in out.cells), key=lambda one: (one.layer, one.start))


@pytest.mark.parametrize("dual_chunk", [None, DUAL_CHUNK], ids=["plain", "chunks"])
def test_logits(dual_chunk: DualChunkSpec | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and reports are equal, logits within 1e-4 of the largest; and the code is found."""
    spec = replace(load_model_spec(NEEDLE), sparse=SPARSE, dual_chunk=dual_chunk)
    monkeypatch.setattr(compiled_attention, "supports", lambda q, kv: False)
    monkeypatch.setattr(vertical_slash, "_backend", lambda cell, keys: Estimate)
    with monkeypatch.context() as twin:
        twin.setattr(sparse_prefill, "attend", attend_as_the_kernels)  # over the same pairs
        wanted, answer = run(spec)
    monkeypatch.setattr(experts.Tiling, "of", lambda *sizes: experts.Tiling(16, 128, 128, 4, 2))  # interpreted sooner
    monkeypatch.setattr(calls, "supports", lambda device: True)
    monkeypatch.setattr(cuda, "supports_lists", lambda *types: True)
    got, _ = run(spec)
    assert [out.tokens for out in got] == [out.tokens for out in wanted]
    assert [token for out in got for token in out.tokens] == answer
    for mine, other in zip(got, wanted, strict=True):
        if other.logits is not None:
            assert mine.logits is not None
            assert (mine.logits - other.logits).abs().max() <= 1e-4 * other.logits.abs().max()
    assert len(reports(got)) == spec.num_hidden_layers * len({one.start for one in reports(got)}) >= 16
    for found, expected in zip(reports(got), reports(wanted), strict=True):
        assert found.density == pytest.approx(expected.density)
    assert any(share < 0.9 for one in reports(got) for share in one.density)
