"""The shipped checkpoint answers under 200 JSON schemas at temperature 1: every answer is JSON and validates."""

from __future__ import annotations

import json

import jsonschema
import pytest

from cluster.constraints.compiler import ConstraintCompiler
from cluster.engine.outputs import Generation, GenerationSpec
from cluster.scheduler.request import FinishReason
from cluster.text.prompts import build_document_prompts
from cluster.text.tokenizer import TextTokenizer
from cluster.tools.eval.haystack import build_haystack
from protos.jobs.constraint import Constraint
from protos.jobs.sampling import AnswerOptions, SamplingParams
from tests.support.data.checkpoints import NEEDLE
from tests.support.fakes.pipeline import Pipeline
from tests.support.json_schemas import SCHEMAS

pytest.importorskip("llguidance", reason="llguidance comes with the extra structured")
MAX_TOKENS = 1000
TOKENIZER = TextTokenizer.open(NEEDLE)


def prompt() -> list[int]:
    haystack = build_haystack(TOKENIZER, 307, 3, 1, NEEDLE)
    (ids,) = build_document_prompts(
        TOKENIZER, haystack.document, [haystack.needles[0].question], enable_thinking=None, max_model_len=1024
    )
    return list(ids)


def pipeline(stages: int) -> Pipeline:
    ends = (0, 2)
    compiler = ConstraintCompiler(TOKENIZER, TOKENIZER.vocab_size, ends)
    return Pipeline(NEEDLE, stages, 1, pages=1024, eos=ends, tokenizer=TOKENIZER, constraints=compiler)


def spec(schema: object, seed: int) -> GenerationSpec:
    options = AnswerOptions(
        MAX_TOKENS, SamplingParams(1.0, seed=seed),
        structured_outputs=Constraint("json_schema", json.dumps(schema)),
    )  # fmt: skip
    return GenerationSpec(prompt(), options)


def check(schema: dict, result: Generation) -> bool:
    """Validate an answer; returns whether it has ended: numbers and keys without a bound may go on."""
    if result.finish_reason is FinishReason.LENGTH:
        return False
    assert result.finish_reason is FinishReason.STOP
    value = json.loads(result.text)
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(value)
    return True


def run(schemas: list[dict], stages: int, seed: int) -> list[dict]:
    """Answer under each schema, eight at a time; returns the schemas whose answers have not ended."""
    with pipeline(stages) as running:
        results = [
            result
            for first in range(0, len(schemas), 8)
            for result in running.generate(*(spec(schema, seed) for schema in schemas[first : first + 8]))
        ]
    return [schema for schema, result in zip(schemas, results, strict=True) if not check(schema, result)]


def test_there_are_two_hundred() -> None:
    assert len(SCHEMAS) >= 200
    assert len({json.dumps(schema) for schema in SCHEMAS}) == len(SCHEMAS)


@pytest.mark.parametrize("stages", [1, 2])
def test_some(stages: int) -> None:
    assert run(SCHEMAS[5::40], stages, 1) == []


@pytest.mark.slow
def test_all() -> None:
    left = SCHEMAS
    for seed in range(5):
        left = run(left, 1, seed)
        assert len(left) < 5
    assert left == []


def test_others_of_the_batch_are_as_without() -> None:
    """A free answer beside constrained ones, which it runs ahead of, has the same tokens as alone."""
    free = GenerationSpec(prompt(), AnswerOptions(40, SamplingParams(1.0, seed=3)))
    for stages in (1, 2):
        with pipeline(stages) as running:
            (alone,) = running.generate(free)
            beside, *_ = running.generate(free, *(spec(schema, 1) for schema in SCHEMAS[:3]))
        assert beside.token_ids == alone.token_ids
