"""Whether the prompts of a job end inside the reasoning tag."""

from __future__ import annotations

import pytest

from cluster.jobs.model import JobInput, JobSpec
from cluster.jobs.prompts import reasoning_opened
from cluster.text.tokenizer import TextTokenizer
from protos.jobs.sampling import AnswerOptions
from tests.support.paths import NEEDLE

THINKING = "{{ messages[0]['content'] }}<assistant>{% if enable_thinking is not false %}<think>\n{% endif %}"


@pytest.mark.parametrize(
    ("given", "thinking", "opened"),
    [
        (JobInput(document_id="doc_" + "0" * 32, questions=("q",)), None, True),
        (JobInput(document_id="doc_" + "0" * 32, questions=("q",)), False, False),
        (JobInput(messages=(("user", "hi"),)), None, True),
        (JobInput(messages=(("user", "hi"),)), False, False),
        (JobInput(prompt="once <think>\n"), None, True),
        (JobInput(prompt="<think> once"), None, False),
        (JobInput(token_ids=(1, 2, 3)), None, False),
    ],
)
def test_prompts_that_end_inside_the_tag(given: JobInput, thinking: bool | None, opened: bool):
    tokenizer = TextTokenizer.open(NEEDLE)
    tokenizer.chat_template = THINKING
    assert reasoning_opened(tokenizer, JobSpec(given, AnswerOptions(enable_thinking=thinking))) is opened


def test_token_ids_that_end_inside_the_tag():
    tokenizer = TextTokenizer.open(NEEDLE)
    ids = tuple(tokenizer.encode("why? <think>\n"))
    assert reasoning_opened(tokenizer, JobSpec(JobInput(token_ids=ids), AnswerOptions()))


def test_a_template_that_cannot_be_rendered_opens_nothing():
    tokenizer = TextTokenizer.open(NEEDLE)
    tokenizer.chat_template = "{{ raise_exception('no') }}<think>"
    spec = JobSpec(JobInput(messages=(("user", "hi"),)), AnswerOptions())
    assert not reasoning_opened(tokenizer, spec), "of a job that another model has answered"
