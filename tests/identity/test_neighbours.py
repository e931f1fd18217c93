"""Other requests change no answer: under dual chunk attention, prompts with one beginning and nearly equal lengths."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from protos.model.config_json import load_model_spec
from protos.model.spec import DualChunkSpec, SparseSpec
from tests.identity.conftest import Checkpoints
from tests.support.data.specs import generation_spec
from tests.support.fakes.pipeline import Pipeline
from tests.support.oracles.transformers import TOLERANCE, random_prompt, relative_error

PAGE = 16
DUAL = DualChunkSpec(96, 32, original_max_position_embeddings=48)  # chunks begin every 64 tokens
SPARSE = SparseSpec(100, cell=64, last_q=8)
BEGINNING = random_prompt(190, 256, seed=1)
LENGTHS = (200, 201, 203, 204, 207, 211)
PINNED = max(LENGTHS)


def prompts() -> list[list[int]]:
    return [[*BEGINNING, *random_prompt(length - len(BEGINNING), 256, seed=length)] for length in LENGTHS]


def logits(pipeline: Pipeline, asked: list[list[int]], pinned_len: int) -> tuple[list[torch.Tensor], list[int]]:
    """Submit prompts together; returns the logits of their tokens, and how many tokens each has adopted."""
    results = pipeline.generate(*[generation_spec(prompt, 3, pinned_len=pinned_len) for prompt in asked])
    return [pipeline.logits(result) for result in results], [result.cached_tokens for result in results]


@pytest.mark.parametrize("sparse", [None, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("pinned_len", [0, PINNED], ids=["plain prompts", "questions of a job"])
def test_a_prompt_alone_and_among_neighbours(
    sparse: SparseSpec | None, pinned_len: int, checkpoint: Checkpoints
) -> None:
    folder = checkpoint("qwen3_moe")
    spec = replace(load_model_spec(folder), dual_chunk=DUAL, sparse=sparse)

    def pipeline() -> Pipeline:
        return Pipeline(folder, 1, 1, chunk=64, pages=512, page_size=PAGE, spec=spec).keep_logits()

    alone = []
    for prompt in prompts():
        with pipeline() as one:
            alone.append(logits(one, [prompt], pinned_len)[0][0])
    order = list(range(len(LENGTHS)))
    for seed in range(2):
        random.Random(seed).shuffle(order)
        with pipeline() as one:
            for together in (order[:1], order[1:4], order[4:]):
                found, cached = logits(one, [prompts()[index] for index in together], pinned_len)
                for index, rows in zip(together, found, strict=True):
                    assert float(relative_error(rows, alone[index]).max()) <= TOLERANCE
                is_shared = pinned_len > 0 and together != order[:1]
                assert [tokens > 0 for tokens in cached] == [is_shared] * len(together)
