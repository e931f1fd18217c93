"""Token counts, spellings and progress as answers show them."""

from __future__ import annotations

from cluster.engine.outputs import OutputToken, PrefillProgress
from cluster.http.answers import Answer, finish_reason, progress_text, spelling
from cluster.jobs.model import JobAnswer, JobInput, JobRecord, JobSpec, JobState
from protos.jobs.sampling import AnswerOptions
from tests.support.rigs.http import needle_tokenizer

RECORD = JobRecord(
    "job_1", JobState.SUCCEEDED, JobSpec(JobInput(prompt="a"), AnswerOptions()), 1.0,
    answers=(JobAnswer(0, 100, 64, "length"),),
)  # fmt: skip


def test_usage_counts_reasoning_and_what_was_cached() -> None:
    answer = Answer()
    answer.add([OutputToken(1, 0, 5, "a", part="reasoning"), OutputToken(2, 0, 6, "b")], keep=False)
    assert answer.usage(RECORD) == {
        "prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102,
        "prompt_tokens_details": {"cached_tokens": 64}, "completion_tokens_details": {"reasoning_tokens": 1},
    }  # fmt: skip
    assert not answer.tokens
    assert finish_reason(RECORD) == "length"


def test_a_part_of_a_character_has_its_bytes() -> None:
    tokenizer = needle_tokenizer()
    pieces = [spelling(tokenizer, token_id) for token_id in tokenizer.encode("aé€😀 <|im_end|>")]
    assert b"".join(raw for _, raw in pieces).decode() == "aé€😀 <|im_end|>"
    assert any("\ufffd" in text for text, _ in pieces)


def test_progress_as_text() -> None:
    assert progress_text(PrefillProgress(200, 0, 68, 40_500)) == "read 34 %, 40 s left\n"
    assert progress_text(PrefillProgress(0, 0, 0, None)) == "read 0 %\n"
