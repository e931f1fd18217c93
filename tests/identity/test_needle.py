"""The shipped checkpoint equals transformers: as shipped, saved again by transformers, plain and stretched by YaRN."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.text.prompts import build_document_prompts
from cluster.text.tokenizer import TextTokenizer
from cluster.tools.eval.haystack import Haystack, build_haystack, is_right
from protos.model.config_json import load_model_spec
from tests.identity.conftest import Oracles
from tests.support.data.checkpoints import NEEDLE, saved_by_transformers
from tests.support.fakes.pipeline import Pipeline
from tests.support.oracles.checks import check_same, run
from tests.support.oracles.transformers import Oracle

NEW_TOKENS = 64
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LONG = 4800  # beyond the native window of 4096


def prompts_of(total_tokens: int, seed: int, questions: int = 2) -> tuple[Haystack, list[list[int]]]:
    tokenizer = TextTokenizer.open(NEEDLE)
    haystack = build_haystack(tokenizer, total_tokens, 3, seed, NEEDLE)
    asked = [needle.question for needle in haystack.needles[:questions]]
    prompts = build_document_prompts(
        tokenizer, haystack.document, asked, enable_thinking=None, max_model_len=total_tokens
    )
    return haystack, [list(prompt) for prompt in prompts]


@pytest.fixture(scope="module", params=["shipped", "saved_again"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "shipped":
        return NEEDLE
    return saved_by_transformers(NEEDLE, tmp_path_factory.mktemp("needle") / "again")


@pytest.mark.parametrize(("stages", "ranks", "chunk"), [(1, 1, 1024), (2, 2, 193)])
def test_plain(folder: Path, stages: int, ranks: int, chunk: int, oracle: Oracles) -> None:
    short, long = prompts_of(307, seed=1)[1], prompts_of(1021, seed=2)[1]
    prompts = [short[0], long[0], long[1]]
    with Pipeline(folder, stages, ranks, chunk=chunk, pages=256).keep_logits() as pipeline:
        assert pipeline.spec.rope.kind == "default"
        results = run(pipeline, prompts, NEW_TOKENS)
        assert results[2].cached_tokens > 900  # the second question about the same document
        for prompt, result in zip(prompts, results, strict=True):
            check_same(pipeline, result, oracle(folder).greedy(prompt, NEW_TOKENS))


@pytest.fixture(scope="module")
def stretched() -> Oracle:
    return Oracle(NEEDLE, rope={**YARN, "rope_theta": 200_000.0})


@pytest.mark.parametrize(("stages", "ranks", "chunk"), [(1, 1, 8192), (2, 2, 331)])
def test_yarn_by_override(stages: int, ranks: int, chunk: int, stretched: Oracle) -> None:
    prompts = [prompts_of(307, seed=1)[1][0], prompts_of(LONG, seed=3)[1][0]]
    assert len(prompts[1]) > 4096
    spec = load_model_spec(NEEDLE, YARN)
    with Pipeline(NEEDLE, stages, ranks, chunk=chunk, pages=512, spec=spec).keep_logits() as pipeline:
        for prompt, result in zip(prompts, run(pipeline, prompts, NEW_TOKENS), strict=True):
            check_same(pipeline, result, stretched.greedy(prompt, NEW_TOKENS))


def test_yarn_saved_in_the_config(tmp_path: Path) -> None:
    saved = saved_by_transformers(NEEDLE, tmp_path / "yarn", {**YARN, "rope_theta": 200_000.0})
    assert load_model_spec(saved).rope == load_model_spec(NEEDLE, YARN).rope


def test_the_answers_are_right() -> None:
    haystack, prompts = prompts_of(1021, seed=2, questions=3)
    tokenizer = TextTokenizer.open(NEEDLE)
    with Pipeline(NEEDLE, 2, 1, chunk=300, pages=256, eos=load_model_spec(NEEDLE).eos_token_ids) as pipeline:
        for needle, result in zip(haystack.needles, run(pipeline, prompts, 32), strict=True):
            assert is_right(tokenizer.decode(result.token_ids), needle)
