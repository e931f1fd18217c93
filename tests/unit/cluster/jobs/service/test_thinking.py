"""Budgets of reasoning of durable jobs: the same answer after the head or the pipeline was replaced at any token."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.constraints.thinking import closing_ids
from cluster.jobs.model import InvalidJob, JobInput, JobState
from protos.jobs.sampling import AnswerOptions
from tests.support.data.tokenizers import NEEDLE
from tests.support.fakes.runtime import FakeRuntime
from tests.support.fakes.stage import eventually
from tests.support.rigs.service import Bench

PROMPT = JobInput(prompt="What was decided?<think>\n")
WORD = NEEDLE.encode("so", literal=True, continues=True)[0]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(FakeRuntime, "script", staticmethod(lambda sequence, index: WORD))
    made = Bench(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("budget", [0, 17])
def test_answers_go_on_after_the_end_of_head_and_pipeline(
    bench: Bench, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(budget)
    closing = closing_ids(NEEDLE, budget, NEEDLE.encode("<think>\n"), True)
    options = AnswerOptions(budget + len(closing) + 8, thinking_budget=budget)
    monkeypatch.setattr(FakeRuntime, "holds", True)
    bench.restart()
    job_id = bench.submit(input=PROMPT, ask=options)
    while len(bench.ids(job_id)) < options.max_tokens - 8:
        before, shard = len(bench.ids(job_id)), bench.runtime.shard
        shard.let(draw.randrange(2, 14))
        eventually(lambda before=before: len(bench.ids(job_id)) > before)  # type: ignore[misc]
        if draw.random() < 0.5:
            bench.restart()
        else:
            bench.runtime.fail()
        eventually(lambda shard=shard: bench.runtime.supervisor.running and bench.runtime.shard is not shard)  # type: ignore[misc]
    bench.runtime.shard.let(1000)
    bench.reaches(job_id, JobState.SUCCEEDED)
    assert bench.ids(job_id) == [WORD] * budget + closing + [WORD] * 8
    (answer,) = bench.service.get(job_id).answers
    assert answer.text == NEEDLE.decode([WORD] * 8)
    assert (answer.reasoning or "").endswith("directly now." if budget else "")


def test_ids_out_of_the_vocabulary_have_no_bias(bench: Bench) -> None:
    size = bench.runtime.deployment.spec.vocab_size
    with pytest.raises(InvalidJob, match=rf"^logit_bias: {size} at index 1: must be between 0 and {size - 1}"):
        bench.submit(ask=AnswerOptions(3, logit_bias={5: 1, size: 1}))  # type: ignore[arg-type]


def test_fewest_tokens_of_an_answer_that_is_shortened(bench: Bench) -> None:
    room = bench.runtime.max_model_len
    job_id = bench.submit(tokens=room - 4, ask=AnswerOptions(1000, min_tokens=900), shorten=True)
    bench.reaches(job_id, JobState.SUCCEEDED)
    ask = bench.service.get(job_id).spec.ask
    assert (ask.max_tokens, ask.min_tokens) == (4, 4)
