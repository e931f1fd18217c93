"""bfloat16: our error against float32 is that of transformers' own bfloat16, and flips only near ties."""

from __future__ import annotations

import gzip
from functools import cache

import pytest
import torch

from cluster.text.tokenizer import TextTokenizer
from tests.support.data.checkpoints import NEEDLE
from tests.support.fakes.pipeline import Pipeline
from tests.support.oracles.checks import run
from tests.support.oracles.transformers import Oracle, random_prompt, relative_error

ALLOWED = 1.5  # times transformers' own error
PROMPTS = 32


@cache
def oracle(dtype: torch.dtype) -> Oracle:
    return Oracle(NEEDLE, dtype)


@cache
def prompts() -> tuple[tuple[int, ...], ...]:
    """Passages of many lengths: half of them text, half random tokens."""
    book = gzip.decompress((NEEDLE / "book.txt.gz").read_bytes()).decode("utf-8")[:200_000]
    ids = TextTokenizer.open(NEEDLE).encode(book)
    passages = [tuple(ids[1000 * index : 1000 * index + 40 + 13 * index]) for index in range(PROMPTS // 2)]
    noise = [tuple(random_prompt(40 + 13 * index, 4096, seed=index)) for index in range(PROMPTS // 2)]
    return (*passages, *noise)


@cache
def errors_of_transformers() -> tuple[torch.Tensor, float]:
    """Relative error per prompt, and the mean over prompts of the largest absolute error of a logit."""
    exact = torch.stack([oracle(torch.float32).logits(prompt, 1)[0] for prompt in prompts()])
    rough = torch.stack([oracle(torch.bfloat16).logits(prompt, 1)[0] for prompt in prompts()])
    return relative_error(rough, exact), float((rough - exact).abs().amax(dim=1).mean())


@pytest.mark.parametrize(("stages", "ranks", "chunk"), [(1, 1, 4096), (1, 1, 64), (2, 2, 256)])
def test_the_error_is_that_of_transformers(stages: int, ranks: int, chunk: int) -> None:
    with Pipeline(NEEDLE, stages, ranks, chunk=chunk, pages=1024, seqs=64).keep_logits() as exact:
        wanted = torch.cat([exact.logits(result) for result in run(exact, prompts(), 1)])
    with Pipeline(NEEDLE, stages, ranks, chunk=chunk, pages=1024, seqs=64, dtype=torch.bfloat16).keep_logits() as rough:
        found = torch.cat([rough.logits(result) for result in run(rough, prompts(), 1)])
    ours, theirs = relative_error(found, wanted), errors_of_transformers()[0]
    assert float(ours.mean()) <= ALLOWED * float(theirs.mean())
    assert float(ours.median()) <= ALLOWED * float(theirs.median())


@pytest.mark.parametrize(("stages", "ranks"), [(1, 1), (2, 2)])
def test_tokens_differ_only_near_ties(stages: int, ranks: int) -> None:
    count = 64
    error = errors_of_transformers()[1]
    chosen = [*prompts()[:4], *prompts()[-4:]]
    with Pipeline(NEEDLE, stages, ranks, chunk=256, pages=512, dtype=torch.bfloat16) as pipeline:
        results = run(pipeline, chosen, count)
    flips = 0
    for prompt, result in zip(chosen, results, strict=True):
        # float32 along the tokens that bfloat16 chose, so that one flip does not hide what comes after it
        exact = oracle(torch.float32).logits([*prompt, *result.token_ids[:-1]], count)
        picked = exact.gather(1, torch.tensor(result.token_ids)[:, None])[:, 0]
        gaps = exact.amax(dim=1) - picked
        flips += int((gaps > 0).sum())
        assert float(gaps.max()) <= ALLOWED * error
    assert flips <= count * len(chosen) // 50


@pytest.mark.parametrize(("stages", "ranks", "chunk"), [(1, 1, 4096), (2, 2, 64)])
def test_an_int8_cache_costs_little(stages: int, ranks: int, chunk: int) -> None:
    """The error of 8 bits a value is that of bfloat16 weights and activations, and the chosen tokens are the same."""
    with Pipeline(
        NEEDLE, stages, ranks, chunk=chunk, pages=1024, seqs=64, kv_dtype=torch.int8
    ).keep_logits() as pipeline:
        results = run(pipeline, prompts(), 1)
        found = torch.cat([pipeline.logits(result) for result in results])
    exact = torch.stack([oracle(torch.float32).logits(prompt, 1)[0] for prompt in prompts()])
    error = relative_error(found, exact)
    assert 0 < float(error.mean()) <= float(errors_of_transformers()[0].mean())
    gaps = exact.amax(dim=1) - exact.gather(1, found.argmax(dim=1, keepdim=True))[:, 0]
    assert float(gaps.max()) <= ALLOWED * errors_of_transformers()[1]
