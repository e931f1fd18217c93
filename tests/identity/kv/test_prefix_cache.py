"""A cached prefix changes nothing: at every page boundary, in every layout, and when pages do not lie together."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from protos.model.config_json import load_model_spec
from protos.model.spec import DualChunkSpec, SparseSpec
from tests.identity.conftest import Checkpoints, Oracles
from tests.support.data.specs import generation_spec
from tests.support.fakes.pipeline import Pipeline
from tests.support.oracles.checks import NEW_TOKENS, check_against, check_same, run, three_prompts
from tests.support.oracles.transformers import TOLERANCE, random_prompt, relative_error

PAGE = 16
PAGES = 8
VOCAB = 256
FIRST = random_prompt(PAGES * PAGE, VOCAB, seed=1)


def sharing(pages: int, total: int) -> list[int]:
    """A prompt that shares exactly `pages` pages with FIRST."""
    rest = random_prompt(total - pages * PAGE, VOCAB, seed=1000 * total + pages)
    if rest and pages < PAGES:
        rest[0] = (FIRST[pages * PAGE] + 1) % VOCAB
    return FIRST[: pages * PAGE] + rest


@pytest.mark.parametrize(
    ("stages", "ranks", "chunk", "total"),
    [(1, 1, 256, PAGES * PAGE), (1, 1, 17, PAGES * PAGE + 1), (2, 2, 64, PAGES * PAGE + 5), (2, 1, 16, PAGES * PAGE)],
)
def test_every_page_boundary(
    stages: int, ranks: int, chunk: int, total: int, checkpoint: Checkpoints, oracle: Oracles
) -> None:
    folder = checkpoint("qwen3_moe")
    with Pipeline(folder, stages, ranks, chunk=chunk, pages=256, page_size=PAGE).keep_logits() as pipeline:
        (first,) = run(pipeline, [FIRST], 1)
        assert first.cached_tokens == 0
        for pages in range(PAGES + 1):
            prompt = sharing(pages, total)
            (result,) = run(pipeline, [prompt], 8)
            assert result.cached_tokens == min(pages, (total - 1) // PAGE) * PAGE
            check_same(pipeline, result, oracle(folder).greedy(prompt, 8))


@pytest.mark.parametrize("family", ["qwen3_moe_yarn", "llama_bias_llama3"])
def test_the_same_prompts_again(family: str, checkpoint: Checkpoints, oracle: Oracles) -> None:
    folder = checkpoint(family)
    with Pipeline(folder, 2, 1, chunk=64, page_size=PAGE).keep_logits() as pipeline:
        prompts = three_prompts(pipeline.spec.vocab_size)
        check_against(pipeline, oracle(folder), prompts)
        again = run(pipeline, prompts)
        for prompt, result in zip(prompts, again, strict=True):
            assert result.cached_tokens == (len(prompt) - 1) // PAGE * PAGE
            check_same(pipeline, result, oracle(folder).greedy(prompt, NEW_TOKENS))


def test_a_prefix_that_is_being_computed_is_waited_for(checkpoint: Checkpoints, oracle: Oracles) -> None:
    folder = checkpoint("qwen3_moe")
    prompts = [sharing(pages, PAGES * PAGE + 3) for pages in (8, 8, 3, 5)]
    prompts[1] = [*prompts[1][:-1], (prompts[1][-1] + 1) % VOCAB]
    with Pipeline(folder, 2, 2, chunk=32, page_size=PAGE, pages=256).keep_logits() as pipeline:
        results = run(pipeline, prompts, 8)
        assert [result.cached_tokens for result in results] == [0, 8 * PAGE, 3 * PAGE, 5 * PAGE]
        for prompt, result in zip(prompts, results, strict=True):
            check_same(pipeline, result, oracle(folder).greedy(prompt, 8))


def test_the_next_turn_of_a_conversation(checkpoint: Checkpoints, oracle: Oracles) -> None:
    folder = checkpoint("qwen3_moe")
    with Pipeline(folder, 1, 2, chunk=48, page_size=PAGE).keep_logits() as pipeline:
        (first,) = run(pipeline, [FIRST], 37)
        turn = [*FIRST, *first.token_ids, *random_prompt(21, VOCAB, seed=2)]
        (second,) = run(pipeline, [turn], 16)
        assert second.cached_tokens == PAGES * PAGE
        check_same(pipeline, second, oracle(folder).greedy(turn, 16))


def test_pages_that_do_not_lie_together(checkpoint: Checkpoints, oracle: Oracles) -> None:
    folder, pages = checkpoint("qwen3_moe"), 31
    short = [random_prompt(PAGE + 1, VOCAB, seed=100 + index) for index in range(pages - 1)]
    prompt = random_prompt(11 * PAGE + 3, VOCAB, seed=3)
    with Pipeline(folder, 2, 1, chunk=50, page_size=PAGE, pages=pages).keep_logits() as pipeline:
        for other in [*short, *short[::2]]:  # every second page is used again, so the others are evicted first
            run(pipeline, [other], 1)
        (result,) = run(pipeline, [prompt], 24)
        used = [page for plan in pipeline.plans for part in plan.slices for page in part.new_pages
                if part.prompt_len == len(prompt)]  # fmt: skip
        assert sum(after != before + 1 for before, after in pairwise(used)) >= 10
        check_same(pipeline, result, oracle(folder).greedy(prompt, 24))


# --- neighbours of nearly equal lengths, under dual chunk attention ---------------------------------------------------

DUAL = DualChunkSpec(96, 32, original_max_position_embeddings=48)  # chunks begin every 64 tokens
SPARSE = SparseSpec(100, cell=64, last_q=8)
BEGINNING = random_prompt(190, VOCAB, seed=1)
LENGTHS = (200, 201, 203, 204, 207, 211)
PINNED = max(LENGTHS)


def prompts() -> list[list[int]]:
    return [[*BEGINNING, *random_prompt(length - len(BEGINNING), VOCAB, seed=length)] for length in LENGTHS]


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
