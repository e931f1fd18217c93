"""Sampled tokens depend on prompt, parameters and seed, not on layout, chunks or company."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from protos.stage.messages import SamplingParams
from tests.identity.conftest import Checkpoints, Oracles
from tests.support.fakes.pipeline import Pipeline
from tests.support.oracles.checks import run, three_prompts
from workers.runner.sampler import gumbel_noise

COUNT = 32
SAMPLED = SamplingParams(temperature=0.8, seed=1234)
FILTERED = replace(SAMPLED, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.1)


@pytest.mark.parametrize("params", [SAMPLED, FILTERED], ids=["plain", "filtered"])
def test_layouts_chunks_and_company(params: SamplingParams, checkpoint: Checkpoints) -> None:
    folder = checkpoint("qwen3_moe")
    seen: list[list[tuple[int, ...]]] = []
    for stages, ranks, chunk in [(1, 1, 391), (1, 1, 17), (2, 1, 64), (1, 2, 256), (2, 2, 33)]:
        with Pipeline(folder, stages, ranks, chunk=chunk) as pipeline:
            together = run(pipeline, three_prompts(pipeline.spec.vocab_size), COUNT, params)
            seen.append([result.token_ids for result in together])
    with Pipeline(folder, 1, 1, chunk=64) as pipeline:
        alone = [run(pipeline, [p], COUNT, params)[0] for p in three_prompts(pipeline.spec.vocab_size)]
        seen.append([result.token_ids for result in alone])
    assert all(tokens == seen[0] for tokens in seen)


def test_the_seed_decides(checkpoint: Checkpoints) -> None:
    with Pipeline(checkpoint("qwen3_moe"), 1, 1, chunk=64) as pipeline:
        prompt = three_prompts(pipeline.spec.vocab_size)[0]
        seeds = [1234, 1234, 1235]
        first, again, other = (run(pipeline, [prompt], COUNT, replace(SAMPLED, seed=seed))[0] for seed in seeds)
    assert first.token_ids == again.token_ids
    assert first.token_ids != other.token_ids
    assert again.cached_tokens > 0  # neither does the cached prefix


def test_the_tokens_are_those_of_the_oracle_s_logits(checkpoint: Checkpoints, oracle: Oracles) -> None:
    folder = checkpoint("qwen3_moe")
    with Pipeline(folder, 2, 2, chunk=64) as pipeline:
        prompt = three_prompts(pipeline.spec.vocab_size)[0]
        (result,) = run(pipeline, [prompt], COUNT, SAMPLED)
    logits = oracle(folder).logits([*prompt, *result.token_ids[:-1]], COUNT)
    noise = torch.stack([gumbel_noise(SAMPLED.seed, index, logits.shape[1]) for index in range(COUNT)])
    assert tuple((logits.double() / SAMPLED.temperature + noise).argmax(dim=-1).tolist()) == result.token_ids
