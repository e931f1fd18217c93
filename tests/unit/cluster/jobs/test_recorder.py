"""The committing thread: what events become in the store, in which order, and who hears of it when."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import Mock

import pytest

from cluster.engine.outputs import Generation, OutputToken, PrefillProgress, Timings
from cluster.jobs.model import JobInput, JobSpec, JobState, new_id
from cluster.jobs.recorder import LiveJob, Recorder, committed_tokens
from cluster.jobs.store import JobStore
from cluster.scheduler.request import FinishReason
from protos.jobs.sampling import AnswerOptions
from protos.stage.messages import SampledToken, TokenLogprob
from tests.support.fakes.stage import eventually

PROGRESS = PrefillProgress(8, 0, 8, None)
TOP = (TokenLogprob(5, -0.5),)


@pytest.fixture
def notified() -> list[str]:
    return []


@pytest.fixture
def ended() -> list[str]:
    return []


@pytest.fixture
def recorder(store: JobStore, notified: list[str], ended: list[str]) -> Iterator[Recorder]:
    recorder = Recorder(store, notified.extend, ended.append)
    yield recorder
    recorder.close()
    recorder.close()


def live(store: JobStore, num_answers: int = 1) -> LiveJob:
    spec = JobSpec(JobInput(prompt="p"), AnswerOptions())
    return LiveJob(store.create(spec, new_id("job"), num_answers, {})[0].id, num_answers)


def result(reason: FinishReason, error: str = "") -> Generation:
    timings = Timings(0.1, 0.2, 0.3, 0.4, 0.5)
    return Generation((5,), "so", "why", reason, (SampledToken(1, 5),), 8, 4, timings, error)


def test_events_that_wait_are_one_commit_and_tokens_stay_as_they_are(
    store: JobStore, recorder: Recorder, ended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = Mock(wraps=store.commit_step)
    monkeypatch.setattr(store, "commit_step", commits)
    job = live(store, num_answers=2)
    first, second = recorder.callback(job, 0), recorder.callback(job, 1)
    tokens = [
        OutputToken(1, 0, 5, "<think>why", -0.5, TOP, "reasoning", "why", ""),
        OutputToken(2, 1, 6, "yes", answer="yes"),
        OutputToken(3, 0, 7, "</think>so", answer="so"),
    ]
    for callback, event in (
        (first, PROGRESS), (first, tokens[0]), (second, PROGRESS), (second, tokens[1]), (first, tokens[2]),
        (first, result(FinishReason.LENGTH)), (second, result(FinishReason.STOP)),
    ):  # fmt: skip
        callback(event)  # type: ignore[arg-type]
    assert store.tokens(job.job_id) == []
    recorder.start()
    recorder.flush()
    record = store.get(job.job_id)
    assert record is not None
    assert (record.state, record.last_event, commits.call_count) == (JobState.SUCCEEDED, 3, 1)
    assert store.tokens(job.job_id) == tokens
    assert [(answer.text, answer.reasoning, answer.finish_reason) for answer in record.answers] == [
        ("so", "why", "length"), ("so", "why", "stop"),
    ]  # fmt: skip
    assert record.answers[0].timings["ttft_s"] == 0.3
    assert (ended, job.generated, job.progress) == ([job.job_id], {0: 2, 1: 1}, {0: PROGRESS, 1: PROGRESS})


def test_states_follow_the_first_progress_and_the_first_token(store: JobStore, recorder: Recorder) -> None:
    job = live(store)
    callback = recorder.callback(job, 0)
    recorder.start()
    seen = []
    for event in (PROGRESS, OutputToken(1, 0, 5, "a"), OutputToken(2, 0, 6, "b"), result(FinishReason.CANCELLED)):
        callback(event)  # type: ignore[arg-type]
        recorder.flush()
        seen.append(store.state(job.job_id))
    assert seen == [JobState.PREFILLING, JobState.DECODING, JobState.DECODING, JobState.CANCELLED]


def test_the_error_of_a_pipeline_is_no_answer(store: JobStore, recorder: Recorder, ended: list[str]) -> None:
    job = live(store)
    recorder.callback(job, 0)(result(FinishReason.ERROR, "stage 0 is gone"))
    recorder.start()
    recorder.flush()
    assert (store.state(job.job_id), ended, job.ended) == (JobState.QUEUED, [], {})


def test_subscribers_hear_of_a_token_that_is_committed(
    store: JobStore, recorder: Recorder, notified: list[str]
) -> None:
    job, other = live(store), live(store)
    recorder.start()
    recorder.callback(job, 0)(OutputToken(1, 0, 5, "a"))
    eventually(lambda: bool(notified))
    assert len(store.tokens(job.job_id)) == 1
    assert notified == [job.job_id] != [other.job_id]


def test_close_commits_what_is_queued(store: JobStore) -> None:
    recorder = Recorder(store, lambda ids: None, lambda job_id: None)
    job = live(store)
    recorder.start()
    for number in range(1, 200):
        recorder.callback(job, 0)(OutputToken(number, 0, number, "x"))
    recorder.close()
    assert len(store.tokens(job.job_id)) == 199
    waiting = threading.Thread(target=recorder.flush)
    waiting.start()
    waiting.join(5)
    assert not waiting.is_alive(), "a closed recorder has nothing to wait for"


def test_committed_tokens_by_question(store: JobStore) -> None:
    job = live(store, num_answers=2)
    assert committed_tokens(store, job.job_id) == {}
    tokens = [OutputToken(number, number % 2, number * 3, "x", -0.5, TOP) for number in range(1, 6)]
    store.commit_step([(job.job_id, token) for token in tokens], [], [])
    assert committed_tokens(store, job.job_id) == {
        1: [SampledToken(0, number * 3, -0.5, TOP) for number in (1, 3, 5)],
        0: [SampledToken(0, number * 3, -0.5, TOP) for number in (2, 4)],
    }


def test_what_one_job_has_ends_that_job_alone(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit of three jobs is refused for good because of one of them."""
    broken: list[tuple[str, str]] = []
    recorder = Recorder(store, lambda ids: None, lambda id: None, lambda id, error: broken.append((id, str(error))))
    jobs = [live(store) for _ in range(3)]
    for job in jobs:
        recorder.callback(job, 0)(PROGRESS)
        for number in (1, 2):
            recorder.callback(job, 0)(OutputToken(number + (job is jobs[1]), 0, 5, "a"))
    recorder.start()
    recorder.flush()
    recorder.callback(jobs[1], 0)(OutputToken(1, 0, 5, "a"))
    recorder.close()
    assert [len(store.tokens(job.job_id)) for job in jobs] == [2, 0, 2]
    assert [job.generated for job in jobs] == [{0: 2}, {}, {0: 2}]
    assert [job.broken for job in jobs] == [False, True, False]
    assert broken == [(jobs[1].job_id, f"{jobs[1].job_id}: token number 2: must be 1: read the job again")]
    assert recorder.thread.problem == ""


def test_an_error_of_a_request_itself_breaks_its_job(store: JobStore) -> None:
    broken: list[tuple[str, str]] = []
    recorder = Recorder(store, lambda ids: None, lambda id: None, lambda id, error: broken.append((id, str(error))))
    job = live(store, num_answers=2)
    for question in (0, 1):
        error = replace(result(FinishReason.ERROR, "the request failed"), is_own_error=True)
        recorder.callback(job, question)(error)
    recorder.start()
    recorder.close()
    assert broken == [(job.job_id, "the request failed")]


def test_a_recorder_that_failed_goes_on_where_it_was(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.common.watched_thread.PAUSE_S", 0.01)
    notify = Mock(side_effect=[KeyError("odd"), None, None])
    recorder = Recorder(store, notify, lambda id: None)
    job = live(store)
    recorder.start()
    for number in (1, 2, 3):
        recorder.callback(job, 0)(OutputToken(number, 0, number, "x"))
        recorder.flush()
    assert len(store.tokens(job.job_id)) == 3
    assert "KeyError" in recorder.thread.problem
    recorder.close()
