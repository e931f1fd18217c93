"""Stored KV changes nothing: written in one layout, read in another, dense or sparse; damage costs nothing but time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cluster.engine.outputs import Generation
from protos.model.config_json import load_model_spec
from protos.model.grid import last_cut
from protos.model.spec import DualChunkSpec, HeadBudget, ModelSpec, SparseSpec
from tests.identity.conftest import Checkpoints
from tests.support.data.specs import generation_spec
from tests.support.fakes.kv_memory import KvMemory
from tests.support.fakes.pipeline import Pipeline
from tests.support.oracles.transformers import TOLERANCE, random_prompt, relative_error

FAMILY, PAGE, BLOCK, VOCAB = "qwen3_moe", 16, 32, 256
DUAL = DualChunkSpec(208, 64, original_max_position_embeddings=128)  # chunks begin every 144 tokens
SPARSE = SparseSpec(threshold=100, last_q=32, cell=64, uniform=HeadBudget(36, 108))
ADAPTIVE = SparseSpec(threshold=100, last_q=16, cell=48)
SPECS = {
    "dense": (None, None), "dual chunk": (DUAL, None), "sparse": (None, SPARSE), "both": (DUAL, SPARSE),
    "adaptive": (DUAL, ADAPTIVE),
}  # fmt: skip
LENGTHS = (67, 193, 300)
NEW = 6


def make_spec(checkpoint: Checkpoints, kind: str) -> ModelSpec:
    dual, sparse = SPECS[kind]
    return replace(load_model_spec(checkpoint(FAMILY)), dual_chunk=dual, sparse=sparse)


def prompts() -> list[list[int]]:
    return [random_prompt(length, VOCAB, seed=length) for length in LENGTHS]


def pipeline(checkpoint: Checkpoints, spec: ModelSpec, layout: tuple[int, int], memory: KvMemory | None) -> Pipeline:
    return Pipeline(checkpoint(FAMILY), *layout, chunk=100, pages=96, page_size=PAGE, spec=spec, memory=memory)


def run(made: Pipeline) -> tuple[list[Generation], list[torch.Tensor]]:
    with made.keep_logits():
        results = [made.generate(generation_spec(prompt, NEW))[0] for prompt in prompts()]
    return results, [made.logits(result) for result in results]


def loadable(spec: ModelSpec, length: int) -> int:
    """Tokens that the last block that is stored of a prompt lets it go on after."""
    stable = last_cut(spec, length, length) // BLOCK * BLOCK
    return last_cut(spec, min(stable, (length - 1) // PAGE * PAGE), length)


def check(
    found: tuple[list[Generation], list[torch.Tensor]], truth: tuple[list[Generation], list[torch.Tensor]]
) -> None:
    for result, rows, expected, expected_rows in zip(*found, *truth, strict=True):
        assert result.token_ids == expected.token_ids
        assert float(relative_error(rows, expected_rows).max()) <= TOLERANCE


@pytest.mark.parametrize("kind", SPECS)
def test_what_one_layout_stores_another_one_reads(kind: str, checkpoint: Checkpoints) -> None:
    spec = make_spec(checkpoint, kind)
    truth = run(pipeline(checkpoint, spec, (1, 1), None))
    memory = KvMemory()
    first = run(pipeline(checkpoint, spec, (2, 2), memory))
    check(first, truth)
    assert [result.cached_tokens for result in first[0]] == [0, 0, 0]
    for layout in ((2, 2), (1, 4), (1, 1)):
        again = run(pipeline(checkpoint, spec, layout, memory))
        check(again, truth)
        assert [result.cached_tokens for result in again[0]] == [loadable(spec, length) for length in LENGTHS]


@pytest.mark.parametrize("kind", ["dense", "both"])
def test_in_one_layout_every_bit_is_the_same(kind: str, checkpoint: Checkpoints) -> None:
    spec, memory = make_spec(checkpoint, kind), KvMemory()
    first = run(pipeline(checkpoint, spec, (1, 1), memory))
    for dtype in (None, torch.int8):
        memory = KvMemory()
        made = [Pipeline(checkpoint(FAMILY), 1, 1, chunk=64, pages=96, page_size=PAGE, spec=spec, memory=memory,
                         kv_dtype=dtype) for _ in range(2)]  # fmt: skip
        before, after = run(made[0]), run(made[1])
        assert [result.token_ids for result in before[0]] == [result.token_ids for result in after[0]]
        assert any(result.cached_tokens for result in after[0])
        if dtype is None:
            check(after, first)


@pytest.mark.parametrize("kind", ["dense", "both"])
@pytest.mark.parametrize("damaged", [0, 1, 3, 8])
def test_damage_changes_nothing_but_speed(kind: str, damaged: int, checkpoint: Checkpoints) -> None:
    spec, memory = make_spec(checkpoint, kind), KvMemory()
    truth = run(pipeline(checkpoint, spec, (2, 1), memory))
    keys = list(memory.pieces)
    memory.damaged = {keys[damaged % len(keys)]}
    made = pipeline(checkpoint, spec, (1, 2), memory)
    again = run(made)
    check(again, truth)
    assert made.store.stats.damaged_blocks >= 1
    cached = [result.cached_tokens for result in again[0]]
    assert cached != [loadable(spec, length) for length in LENGTHS]
    memory.damaged = set()
    healed = run(pipeline(checkpoint, spec, (2, 2), memory))
    check(healed, truth)
    assert [result.cached_tokens for result in healed[0]] == [loadable(spec, length) for length in LENGTHS]


def test_a_document_serves_questions_of_one_scale_after_a_restart(checkpoint: Checkpoints) -> None:
    spec, memory = make_spec(checkpoint, "both"), KvMemory()
    document = random_prompt(288, VOCAB, seed=1)
    questions = [[*document, *random_prompt(count, VOCAB, seed=count)] for count in (5, 9, 13)]
    asked = [generation_spec(question, NEW, pinned_len=320) for question in questions]
    with pipeline(checkpoint, spec, (1, 1), None) as one:
        truth = [one.generate(item)[0] for item in asked]
    for turn, layout in enumerate(((2, 1), (1, 2), (2, 2))):
        with pipeline(checkpoint, spec, layout, memory) as one:
            (result,) = one.generate(asked[turn])
        assert result.token_ids == truth[turn].token_ids
        assert result.cached_tokens == (288 if turn else 0)
