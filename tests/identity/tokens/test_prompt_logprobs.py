"""Log-probabilities of prompts against transformers, over chunks, pages, stages and company."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from cluster.engine.outputs import Generation, GenerationSpec
from protos.stage.messages import SamplingParams
from tests.identity.conftest import Checkpoints, Oracles
from tests.support.data.specs import generation_spec
from tests.support.fakes.pipeline import Pipeline
from tests.support.oracles.transformers import Oracle

SIZES = (1, 2, 17, 67, 193)
BEST = 3


def specs(vocab: int) -> list[GenerationSpec]:
    draw = random.Random(11)
    prompts = [[draw.randrange(vocab) for _ in range(size)] for size in SIZES]
    return [
        replace(generation_spec(prompt, 3, SamplingParams(logprobs=BEST)), prompt_logprobs=BEST) for prompt in prompts
    ]


def check(oracle: Oracle, result: Generation, spec: GenerationSpec) -> None:
    """Every token of prompt and answer, against the log-softmax of transformers' logits."""
    ids = [*spec.prompt, *result.token_ids]
    assert [one.token_id for one in result.prompt] == list(spec.prompt)
    assert (result.prompt[0].logprob, result.prompt[0].top) == (None, ())
    found = [*result.prompt[1:], *result.samples]
    wanted = torch.log_softmax(oracle.logits(ids[:-1], len(ids) - 1).double(), dim=-1)
    assert len(found) == len(wanted)
    for row, one in zip(wanted, found, strict=True):
        assert one.logprob is not None
        assert abs(one.logprob - float(row[one.token_id])) < 1e-4
        assert len(one.top) == BEST
        assert [best.logprob for best in one.top] == sorted((best.logprob for best in one.top), reverse=True)
        for best, value in zip(one.top, row.topk(BEST).values.tolist(), strict=True):
            assert abs(best.logprob - float(row[best.token_id])) < 1e-4
            assert abs(best.logprob - value) < 1e-4


@pytest.mark.parametrize(("stages", "ranks", "chunk"), [(1, 1, 256), (1, 1, 17), (2, 1, 67), (1, 2, 193), (2, 2, 64)])
def test_against_transformers(stages: int, ranks: int, chunk: int, checkpoint: Checkpoints, oracle: Oracles) -> None:
    folder = checkpoint("qwen3_moe")
    with Pipeline(folder, stages, ranks, chunk=chunk) as pipeline:
        wanted = specs(pipeline.spec.vocab_size)
        first = pipeline.generate(*wanted)
        plain = pipeline.generate(*(replace(one, prompt_logprobs=None) for one in wanted))
        again = pipeline.generate(*wanted, *(replace(one, prompt_logprobs=None) for one in wanted))
        resumed = pipeline.generate(*(
            replace(one, resume=result.samples[:1]) for one, result in zip(wanted, first, strict=True)
        ))  # fmt: skip
    for spec, result in zip(wanted, first, strict=True):
        check(oracle(folder), result, spec)
    assert [one.token_ids for one in plain] == [one.token_ids for one in first]
    assert all(not one.prompt for one in plain)
    assert [one.cached_tokens for one in first + again[: len(first)]] == [0] * 2 * len(first), "all is computed"
    for one, other, later in zip(first, again, resumed, strict=False):
        for index in range(len(one.prompt)):
            for found in (other, later):
                assert found.prompt[index].logprob == pytest.approx(one.prompt[index].logprob, abs=1e-4)
