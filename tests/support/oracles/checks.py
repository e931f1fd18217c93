"""What the tests of this package ask of a pipeline and compare."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.engine.outputs import Generation
from protos.stage.messages import SamplingParams, StepPlan
from tests.support.data.specs import generation_spec
from tests.support.fakes.pipeline import Pipeline
from tests.support.oracles.transformers import TOLERANCE, Oracle, Reference, random_prompt, relative_error

NEW_TOKENS = 64
LENGTHS = (67, 193, 131)  # multiples of no page and no chunk
GREEDY = SamplingParams()


def three_prompts(vocab: int) -> list[list[int]]:
    """Prompts of LENGTHS, fixed by the vocabulary."""
    return [random_prompt(length, vocab, seed=length) for length in LENGTHS]


def run(
    pipeline: Pipeline, prompts: Sequence[Sequence[int]], count: int = NEW_TOKENS, sampling: SamplingParams = GREEDY
) -> list[Generation]:
    """Submit all prompts at once and wait for `count` tokens of each."""
    return pipeline.generate(*[generation_spec(prompt, count, sampling) for prompt in prompts])


def check_same(pipeline: Pipeline, result: Generation, reference: Reference) -> None:
    """Tokens are identical and every row of logits is within the tolerance, as far as `result` goes."""
    count = len(result.token_ids)
    assert result.token_ids == reference.tokens[:count]
    error = relative_error(pipeline.logits(result), reference.logits[:count])
    assert float(error.max()) <= TOLERANCE, f"token {int(error.argmax())}: relative error {float(error.max()):.2e}"


def check_against(
    pipeline: Pipeline, oracle: Oracle, prompts: Sequence[Sequence[int]], count: int = NEW_TOKENS
) -> None:
    """Run the prompts together; all of them must continue as in transformers."""
    for prompt, result in zip(prompts, run(pipeline, prompts, count), strict=True):
        assert len(result.token_ids) == count
        check_same(pipeline, result, oracle.greedy(prompt, NEW_TOKENS))


def mixes_prefill_and_decode(plan: StepPlan) -> bool:
    """Whether a step computes a generated token of one request and prompt tokens of another."""
    decoding = any(part.start >= part.prompt_len for part in plan.slices)
    return decoding and any(part.start < part.prompt_len for part in plan.slices)
