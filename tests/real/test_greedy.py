"""20 prompts, 64 greedy tokens: our engine in float32, transformers and llama.cpp on the same GGUF file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path

import pytest

from cluster.engine.outputs import Generation
from cluster.engine.pipeline import end_ids
from cluster.text.chat_prompt import encode_chat
from cluster.text.tokenizer import TextTokenizer
from protos.model.config_json import load_model_spec
from tests.support.data.specs import generation_spec
from tests.support.fakes.pipeline import Pipeline
from tests.support.oracles.transformers import TOLERANCE, Oracle, relative_error
from tests.support.real.agreement import Agreement, agree, agree_with_text, summary
from tests.support.real.llama_cpp import LlamaServer
from tests.support.real.texts import BEGINNINGS, QUESTIONS
from tests.support.real.unpack import unpacked_model

TOKENS = 64
FLOAT32_TIE = 1e-3  # of logits; rounding moves them by less than 1e-4 of the largest, which is about 20
EIGHT_BIT_TIE = 0.5  # llama.cpp rounds what it multiplies to 8 bits


@pytest.fixture(scope="module")
def prompts(ours: TextTokenizer) -> list[list[int]]:
    chats = [encode_chat(ours, [{"role": "user", "content": text}]) for text in QUESTIONS]
    return chats + [ours.encode(text) for text in BEGINNINGS]


@pytest.fixture(scope="module")
def answered(
    gguf: Path, prompts: list[list[int]]
) -> Iterator[tuple[Pipeline, list[Generation]]]:  # fmt: skip
    """Yield 64 tokens a prompt, also after the end of an answer; the model is loaded once, prompts share its steps."""
    pages = sum(-(-(len(prompt) + TOKENS) // 16) for prompt in prompts)
    with Pipeline(gguf, 1, 1, pages=pages, seqs=len(prompts)).keep_logits() as pipeline:
        specs = [generation_spec(prompt, TOKENS) for prompt in prompts]
        yield pipeline, pipeline.generate(*specs, timeout_s=1800.0)


@pytest.mark.timeout(3600)
def test_greedy_text_is_that_of_transformers(
    gguf: Path, prompts: list[list[int]], answered: tuple[Pipeline, list[Generation]]
) -> None:
    pipeline, results = answered
    oracle = Oracle.of(unpacked_model(gguf))
    found = []
    for prompt, result in zip(prompts, results, strict=True):
        answer = list(result.token_ids)
        rows = oracle.logits([*prompt, *answer][:-1], last=len(answer))
        one = agree(answer, rows, FLOAT32_TIE)
        checked = one.same + one.tied
        error = relative_error(pipeline.logits(result)[:checked], rows[:checked])
        assert float(error.max()) <= TOLERANCE, f"token {int(error.argmax())}: relative error {float(error.max()):.2e}"
        found.append(one)
    _check(found, at_least=0.95 * TOKENS * len(prompts))


@pytest.mark.timeout(3600)
def test_greedy_text_is_that_of_llama_cpp(
    llama: LlamaServer, ours: TextTokenizer, gguf: Path, prompts: list[list[int]],
    answered: tuple[Pipeline, list[Generation]],
) -> None:  # fmt: skip
    ends = set(end_ids(load_model_spec(gguf), ours))
    found = []
    for prompt, result in zip(prompts, answered[1], strict=True):
        theirs = llama.greedy(prompt, TOKENS)  # which stops at the end of an answer
        found.append(
            agree_with_text(_answer(result.token_ids, ends), _answer(theirs.tokens, ends), theirs.best, EIGHT_BIT_TIE)
        )
    _check(found, at_least=0.5 * sum(len(_answer(result.token_ids, ends)) for result in answered[1]))


def _answer(tokens: Sequence[int], ends: set[int]) -> list[int]:
    """Return tokens up to the first that ends the answer, which is a choice as any other."""
    before = list(takewhile(lambda token: token not in ends, tokens))
    return list(tokens[: len(before) + 1])


def _check(found: list[Agreement], at_least: float) -> None:
    """Nothing parts without a tie, and of all tokens enough were compared before one."""
    print(summary(found))
    assert [one.problem for one in found if one.problem] == []
    assert sum(one.same for one in found) >= at_least, summary(found)
