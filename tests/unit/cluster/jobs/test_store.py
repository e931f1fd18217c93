"""The job store: idempotent submission, compare-and-set, numbered tokens, lists, documents."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.common.errors import JobStoreError
from cluster.engine.outputs import OutputToken
from cluster.jobs.model import (
    ACTIVE,
    FINAL,
    DocumentRecord,
    InvalidJob,
    JobAnswer,
    JobConflict,
    JobInput,
    JobNotFound,
    JobSpec,
    JobState,
    NotAllowedNow,
    ServiceBusy,
    new_id,
)
from cluster.jobs.store import MAX_PAGE, JobStore
from protos.jobs.chat import ChatMessage, Tool, ToolCall
from protos.jobs.sampling import AnswerOptions
from protos.stage.messages import SamplingParams, TokenLogprob

DOCUMENT = DocumentRecord("doc_" + "0" * 32, "report.txt", 7, created=1.0, expires=100.0)
PLAIN = JobSpec(JobInput(prompt="Once"), AnswerOptions())


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "jobs.db"


@pytest.fixture
def store(path: Path, clock: Clock) -> Iterator[JobStore]:
    store = JobStore(path, clock)
    yield store
    store.close()


def submit(store: JobStore, spec: JobSpec = PLAIN, num_answers: int = 1) -> str:
    return store.create(spec, new_id("job"), num_answers, {})[0].id


def run_to(store: JobStore, job_id: str, *states: JobState) -> str:
    for state in states:
        assert store.transition(job_id, ACTIVE, state)
    return job_id


def tokens(first: int, count: int, question: int = 0) -> list[OutputToken]:
    return [OutputToken(number, question, number * 3, f"t{number} ") for number in range(first, first + count)]


def commit(store: JobStore, job_id: str, batch: list[OutputToken]) -> None:
    store.commit_step([(job_id, token) for token in batch], [], [])


def test_a_job_comes_back_as_it_was(store: JobStore, path: Path) -> None:
    store.put_document(DOCUMENT)
    ask = AnswerOptions(
        9, SamplingParams(0.5, seed=(1 << 63) - 1, logprobs=2), stop=("\n\n", "é"), stop_token_ids=(1, 2)
    )
    given = JobInput(document_id=DOCUMENT.id, questions=("Who?", "Warum?"))
    spec = JobSpec(given, ask, priority=-3, deadline=5.5, attached=True, idempotency_key="k", labels={"team": "a'b"})
    record, is_new = store.create(spec, new_id("job"), 2, {"model": "m", "versions": {"torch": "2"}})
    assert is_new
    assert (record.state, record.created, record.spec) == (JobState.QUEUED, 1000.0, spec)
    assert record.answers == (JobAnswer(0), JobAnswer(1))
    top = (TokenLogprob(5, -0.25), TokenLogprob(6, -math.inf))
    token = OutputToken(1, 1, 5, "a\0\U0001f600", -0.25, top, "reasoning", "a\0", "\U0001f600")
    attention = {"mode": "sparse", "layers": [{"layer": 0, "density": [0.5]}]}
    answer = JobAnswer(1, 10, 4, "stop", "text", "why", {"queued_s": 0.5}, attention)
    store.commit_step([(record.id, token)], [], [(record.id, answer)])
    store.close()
    again = JobStore(path)
    assert again.get(record.id) == replace(record, last_event=1, answers=(JobAnswer(0), answer))
    assert again.tokens(record.id) == [token]
    again.close()


@pytest.mark.parametrize(
    "given",
    [
        JobInput(token_ids=(1, 2)),
        JobInput(token_ids=()),
        JobInput(messages=(ChatMessage("user", "hi"),)),
        JobInput(
            messages=(ChatMessage("assistant", "", "hm", (ToolCall("c", "f"),)),), tools=(Tool("f", strict=True),)
        ),
        JobInput(prompt=""),
    ],
)
def test_every_kind_of_input(store: JobStore, given: JobInput) -> None:
    record = store.get(submit(store, JobSpec(given, AnswerOptions())))
    assert record is not None
    assert record.spec.input == given


def test_one_key_is_one_job(store: JobStore) -> None:
    spec = replace(PLAIN, idempotency_key="key")
    with ThreadPoolExecutor(50) as pool:
        made = list(pool.map(lambda _: store.create(spec, new_id("job"), 1, {}), range(50)))
    assert len({record.id for record, _ in made}) == store.count() == 1
    assert sum(is_new for _, is_new in made) == 1
    assert store.create(replace(spec, deadline=9.0), new_id("job"), 1, {}) == (made[0][0], False)
    with pytest.raises(JobConflict, match=f"'key': used by {made[0][0].id} with another body"):
        store.create(replace(spec, input=JobInput(prompt="Twice")), new_id("job"), 1, {})
    run_to(store, made[0][0].id, JobState.CANCELLED)
    assert store.delete(made[0][0].id)
    assert store.create(spec, new_id("job"), 1, {})[1], "a deleted job gives its key back"


def test_a_full_queue_takes_what_is_known_only(store: JobStore) -> None:
    spec = replace(PLAIN, idempotency_key="key")
    assert store.admit(spec, 1) is None
    record, _ = store.create(spec, new_id("job"), 1, {})
    waiting = run_to(store, submit(store), JobState.PREFILLING, JobState.RECOVERING)
    run_to(store, submit(store), JobState.PREFILLING, JobState.DECODING)
    assert store.admit(spec, 2) == record
    assert store.admit(PLAIN, 3) is None
    with pytest.raises(ServiceBusy):
        store.admit(PLAIN, 2)
    with pytest.raises(JobConflict, match="another body"):
        store.admit(replace(spec, priority=1), 3)
    with pytest.raises(ServiceBusy, match=r"queue: 2 jobs wait, the limit is server\.max_queued_jobs") as caught:
        store.create(PLAIN, new_id("job"), 1, {}, max_queued=2)
    assert caught.value.retry_after_s == 10.0
    assert store.create(spec, new_id("job"), 1, {}, max_queued=2) == (record, False), "a repeated one is answered"
    run_to(store, waiting, JobState.CANCELLED)
    assert store.create(PLAIN, new_id("job"), 1, {}, max_queued=2)[1]


def test_a_submission_moves_on_the_expiry_of_its_document(store: JobStore) -> None:
    store.put_document(DOCUMENT)
    spec = JobSpec(JobInput(document_id=DOCUMENT.id, questions=("?",)), AnswerOptions())
    store.create(spec, new_id("job"), 1, {})
    assert store.get_document(DOCUMENT.id) == replace(DOCUMENT, used=1000.0)
    store.create(spec, new_id("job"), 1, {}, document_expires=170.0)
    assert store.get_document(DOCUMENT.id) == replace(DOCUMENT, expires=170.0, used=1000.0)


def test_refused_submissions_leave_nothing(store: JobStore) -> None:
    job_id = submit(store)
    with pytest.raises(JobConflict, match="is in use"):
        store.create(PLAIN, job_id, 1, {})
    with pytest.raises(InvalidJob, match="job id"):
        store.create(PLAIN, "doc_" + "0" * 32, 1, {})
    with pytest.raises(JobNotFound, match="upload it again"):
        submit(store, JobSpec(JobInput(document_id=DOCUMENT.id, questions=("?",)), AnswerOptions()))
    for broken in (JobInput(prompt="a\ud800"), JobInput(messages=(ChatMessage("user", "\udfff"),))):
        with pytest.raises(InvalidJob, match="must be valid Unicode"):
            submit(store, JobSpec(broken, AnswerOptions()))
    with pytest.raises(InvalidJob, match="must be valid Unicode"):
        store.list_jobs(labels={"\ud800": ""})
    assert store.count() == 1


def test_life_of_a_job(store: JobStore, clock: Clock) -> None:
    job_id = submit(store)
    steps = [  # expected, new, took place, (started, finished, restarts) after it
        ({JobState.DECODING}, JobState.SUCCEEDED, False, (None, None, 0)),
        (set(), JobState.FAILED, False, (None, None, 0)),
        ({JobState.QUEUED}, JobState.PREFILLING, True, (3.0, None, 0)),
        (ACTIVE, JobState.RECOVERING, True, (3.0, None, 1)),
        (ACTIVE, JobState.RECOVERING, True, (3.0, None, 1)),
        ({JobState.RECOVERING}, JobState.QUEUED, True, (3.0, None, 1)),
        ({JobState.QUEUED}, JobState.PREFILLING, True, (3.0, None, 1)),
        ({JobState.PREFILLING}, JobState.DECODING, True, (3.0, None, 1)),
        ([JobState.DECODING], JobState.FAILED, True, (3.0, 9.0, 1)),
        (ACTIVE, JobState.CANCELLED, False, (3.0, 9.0, 1)),
    ]
    for number, (expected, new, happened, after) in enumerate(steps, 1):
        clock.now = float(number)
        assert store.transition(job_id, expected, new, error="lost") is happened
        record = store.get(job_id)
        assert record is not None
        assert (record.started, record.finished, record.restarts) == after
        assert (record.state is new) == happened
    assert record is not None
    assert record.error == "lost"
    assert not store.transition(new_id("job"), ACTIVE, JobState.FAILED)
    with pytest.raises(AssertionError):
        store.transition(job_id, FINAL, JobState.QUEUED)


def test_only_one_of_many_changes_wins(store: JobStore) -> None:
    job_id = submit(store)
    with ThreadPoolExecutor(16) as pool:
        ends = [JobState.CANCELLED, JobState.SUCCEEDED] * 8
        won = list(pool.map(lambda new: store.transition(job_id, ACTIVE, new), ends))
    assert won.count(True) == 1


@pytest.mark.parametrize("count", [1, 15, 16, 17, 97])
def test_tokens_are_numbered_and_read_from_anywhere(store: JobStore, count: int) -> None:
    job_id = submit(store, num_answers=2)
    batch = [*tokens(1, 1, question=1), *tokens(2, count, question=0)]
    commit(store, job_id, batch)
    for after in (0, 1, count, count + 1, count + 2, 1 << 64):
        assert store.tokens(job_id, after) == [token for token in batch if token.number > after]
        assert store.tokens(job_id, after, limit=16) == [token for token in batch if token.number > after][:16]
    assert store.get(job_id).last_event == count + 1  # type: ignore[union-attr]
    assert store.tokens(new_id("job")) == []
    for after, limit in ((-1, 1), (0, 0)):
        with pytest.raises(InvalidJob):
            store.tokens(job_id, after, limit)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (tokens(4, 1), "token number 4: must be 3"),
        (tokens(2, 1), "token number 2: must be 3"),
        ([*tokens(3, 2), *tokens(6, 1)], "token number 6: must be 5"),
        (tokens(3, 1, question=1), "question 1: must be between 0 and 0"),
        (tokens(3, 1, question=-1), "question -1: must be"),
    ],
)
def test_a_wrong_step_writes_nothing(store: JobStore, batch: list[OutputToken], message: str) -> None:
    good, bad = submit(store), submit(store)
    commit(store, bad, tokens(1, 2))
    step = [(good, token) for token in tokens(1, 3)] + [(bad, token) for token in batch]
    with pytest.raises(JobStoreError, match=message):
        store.commit_step(step, [(good, ACTIVE, JobState.SUCCEEDED)], [(good, JobAnswer(0, text="x"))])
    assert [token.number for token in store.tokens(bad)] == [1, 2]
    record = store.get(good)
    assert record is not None
    assert (record.state, record.last_event, record.answers) == (JobState.QUEUED, 0, (JobAnswer(0),))
    with pytest.raises(JobStoreError, match="question 1"):
        store.commit_step([(good, tokens(1, 1)[0])], [], [(good, JobAnswer(1))])
    assert store.tokens(good) == []


def test_late_tokens_are_dropped(store: JobStore) -> None:
    ended, gone, running = submit(store), submit(store), submit(store)
    commit(store, ended, tokens(1, 2))
    run_to(store, ended, JobState.CANCELLED)
    run_to(store, gone, JobState.CANCELLED)
    assert store.delete(gone)
    step = [(job_id, token) for job_id in (ended, gone) for token in tokens(3, 2)]
    step += [(running, token) for token in tokens(1, 2)]
    answers = [(job_id, JobAnswer(0, finish_reason="cancelled", text="half")) for job_id in (ended, gone)]
    changes = [
        (ended, ACTIVE, JobState.SUCCEEDED),
        (gone, ACTIVE, JobState.FAILED),
        (running, ACTIVE, JobState.SUCCEEDED),
    ]
    store.commit_step(step, changes, answers)
    assert [store.state(job_id) for job_id in (ended, gone, running)] == [JobState.CANCELLED, None, JobState.SUCCEEDED]
    record = store.get(ended)
    assert record is not None
    assert (record.last_event, record.state, record.answers[0].text) == (2, JobState.CANCELLED, "half")
    assert [len(store.tokens(job_id)) for job_id in (ended, gone, running)] == [2, 0, 2]
    store.commit_step([], [], [])


@pytest.mark.parametrize("limit", [1, 6, 7, 8])
def test_pages_are_stable(store: JobStore, limit: int) -> None:
    made = [submit(store) for _ in range(7)]  # all at the same second: order is that of submission
    page, cursor = store.list_jobs(limit=limit)
    seen = [record.id for record in page]
    run_to(store, made[6], JobState.FAILED)
    assert store.delete(made[6])
    submit(store)
    while cursor:
        page, cursor = store.list_jobs(limit=limit, cursor=cursor)
        seen += [record.id for record in page]
    assert seen == made[::-1]


def test_lists_are_filtered(store: JobStore) -> None:
    odd = 'a"b\\c'
    jobs = {
        name: submit(store, replace(PLAIN, labels=labels))
        for name, labels in {"none": {}, "x": {"k": "x"}, "xy": {"k": "x", odd: "y"}, "z": {"k": "z"}}.items()
    }
    run_to(store, jobs["xy"], JobState.FAILED)
    run_to(store, jobs["z"], JobState.DECODING)
    cases: list[tuple[set[JobState], dict[str, str], list[str]]] = [
        (set(), {}, ["z", "xy", "x", "none"]),
        (set(), {"k": "x"}, ["xy", "x"]),
        (set(), {"k": "x", odd: "y"}, ["xy"]),
        ({JobState.QUEUED}, {"k": "x"}, ["x"]),
        ({JobState.FAILED, JobState.DECODING}, {}, ["z", "xy"]),
        (set(), {"k": "' OR 1=1 --"}, []),
    ]
    for states, labels, names in cases:
        records, cursor = store.list_jobs(states, labels)
        assert ([record.id for record in records], cursor) == ([jobs[name] for name in names], "")
    assert [record.id for record in store.unfinished()] == [jobs["none"], jobs["x"], jobs["z"]]
    assert [store.count(), store.count(FINAL), store.count({JobState.QUEUED})] == [4, 1, 2]


def test_a_cursor_does_not_tell_how_many_jobs_there_were(store: JobStore) -> None:
    for _ in range(20):
        submit(store)
    cursors = [store.list_jobs(limit=limit)[1] for limit in (1, 1, 2)]
    assert len({cursor[:17] for cursor in cursors}) == 3
    first, again, second = (store.list_jobs(limit=1, cursor=cursor)[0][0].id for cursor in cursors)
    assert first == again != second
    garbage = f"j{'0' * 16}{'f' * 16}"
    assert len(store.list_jobs(cursor=garbage)[0]) <= 20


@pytest.mark.parametrize(
    "cursor", ["x", "j0", "j" + "g" * 32, "j" + "0" * 33, "0; DROP TABLE jobs", "j" + "0" * 31 + "\u0665"]
)
def test_forged_cursors(store: JobStore, cursor: str) -> None:
    with pytest.raises(InvalidJob, match="page_token"):
        store.list_jobs(cursor=cursor)
    for limit in (0, -1, MAX_PAGE + 1):
        with pytest.raises(InvalidJob, match="page_size"):
            store.list_jobs(limit=limit)


def test_only_ended_jobs_are_forgotten(store: JobStore, clock: Clock) -> None:
    running, old, new = submit(store), submit(store), submit(store)
    commit(store, old, tokens(1, 3))
    assert not store.delete(running)
    assert not store.delete(new_id("job"))
    for job_id, clock.now in ((old, 100.0), (new, 101.0)):
        assert store.transition(job_id, ACTIVE, JobState.SUCCEEDED)
    assert store.expire(now=110.0, ttl_s=10.0) == 0
    assert store.expire(now=110.5, ttl_s=10.0) == 1
    assert (store.get(old), store.tokens(old)) == (None, [])
    assert store.get(new) is not None
    assert store.expire(now=1e9, ttl_s=10.0) == 1
    assert [record.id for record in store.unfinished()] == store.unfinished_ids() == [running]


def test_documents_in_use_stay(store: JobStore) -> None:
    other = replace(DOCUMENT, id="doc_" + "1" * 32, created=2.0, expires=50.0)
    assert store.put_document(DOCUMENT) == DOCUMENT
    assert store.put_document(other) == other
    assert store.put_document(replace(DOCUMENT, name="other", created=9.0, expires=200.0)) == replace(
        DOCUMENT, expires=200.0
    )
    assert store.touch_document(DOCUMENT.id, 60.0)
    assert not store.touch_document(new_id("doc"), 60.0)
    assert [record.id for record in store.list_documents()] == [other.id, DOCUMENT.id]
    assert store.expire_documents(49.9) == 0
    job_id = submit(store, JobSpec(JobInput(document_id=DOCUMENT.id, questions=("?",)), AnswerOptions()))
    assert store.expire_documents(60.0) == 1
    assert [record.id for record in store.list_documents()] == [DOCUMENT.id]
    with pytest.raises(NotAllowedNow, match="an unfinished job uses it"):
        store.delete_document(DOCUMENT.id)
    run_to(store, job_id, JobState.SUCCEEDED)
    assert store.expire_documents(59.9) == 0
    assert store.delete_document(DOCUMENT.id)
    assert not store.delete_document(DOCUMENT.id)
    assert store.get_document(DOCUMENT.id) is None


def test_answers_of_many_questions_come_in_order(store: JobStore) -> None:
    job_id = submit(store, num_answers=1024)
    store.commit_step([], [], [(job_id, JobAnswer(1023, text="z")), (job_id, JobAnswer(0, text="a"))])
    record = store.get(job_id)
    assert record is not None
    assert [answer.question for answer in record.answers] == list(range(1024))
    assert [answer.text for answer in record.answers if answer.text] == ["a", "z"]
