"""Damaged rows of the job store: whatever is in them, only that job is affected, and it says why."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cluster.access.codec import encode_job
from cluster.engine.outputs import OutputToken
from cluster.jobs.model import (
    ACTIVE,
    DocumentRecord,
    JobAnswer,
    JobDamaged,
    JobInput,
    JobRecord,
    JobSpec,
    JobState,
    PromptToken,
    new_id,
)
from cluster.jobs.rows import JobRow, document_record, job_record, job_state, listed_record
from cluster.jobs.store import JobStore
from protos.jobs.sampling import AnswerOptions
from protos.stage.messages import TokenLogprob

SPEC = JobSpec(
    JobInput(document_id="doc_" + "0" * 32, questions=("Who?", "Where?")), AnswerOptions(), labels={"a": "b"}
)
DOCUMENT = DocumentRecord("doc_" + "0" * 32, "d", 3, 1.0, 1e12)
BAD, GOOD = f"job_{1:032x}", f"job_{2:032x}"

DAMAGES = [  # SQL on the job with seq 1
    "UPDATE specs SET spec = 'not JSON'",
    "UPDATE specs SET spec = '[' || hex(zeroblob(100)) WHERE job = 1",
    'UPDATE specs SET spec = \'{"input": {}, "ask": 7}\'',
    "UPDATE specs SET spec = json_set(spec, '$.input.kind', 'video') || ' '",
    "UPDATE specs SET spec = json_set(spec, '$.ask.max_tokens', 'many')",
    "UPDATE specs SET spec = json_set(spec, '$.priority', 99999999999)",
    "UPDATE specs SET spec = cast(x'ff00fe' AS TEXT)",
    "UPDATE specs SET spec = zeroblob(9)",
    "DELETE FROM specs",
    "DELETE FROM summaries",
    "UPDATE jobs SET state = 'paused'",
    "UPDATE jobs SET state = x'00'",
    "UPDATE jobs SET num_answers = 7",
    "UPDATE jobs SET num_answers = 'two'",
    "UPDATE jobs SET created = 'yesterday'",
    "UPDATE jobs SET started = x'01'",
    "UPDATE jobs SET restarts = -1",
    "UPDATE jobs SET last_event = 'x'",
    "UPDATE jobs SET error = cast(x'c3' AS TEXT)",
    "UPDATE answers SET finish_reason = 'tired'",
    "UPDATE answers SET timings = '{'",
    'UPDATE answers SET timings = \'{"ttft_s": "soon"}\'',
    "UPDATE answers SET attention = '7'",
    "UPDATE answers SET text = x'ff'",
    "UPDATE answers SET prompt = '[[1, \"x\", []]]'",
    "UPDATE answers SET prompt = 7",
    "UPDATE answers SET prompt_tokens = -5",
    "UPDATE answers SET question = question + 9000000000",
    "UPDATE summaries SET reproducibility = '[1]'",
    "UPDATE summaries SET questions = '{}'",
    "UPDATE summaries SET priority = 'urgent'",
    "UPDATE labels SET value = cast(x'ff' AS TEXT)",
]
ONLY_LISTED = ("summaries SET questions", "summaries SET priority", "labels")  # what a listing alone reads
UNSEEN = ("'$.input.kind'",)  # a field of a later version, which this one does not need


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.sqlite"


def make(path: Path) -> None:
    """A job to damage and a good one, each with two answers and three tokens."""
    store = JobStore(path)
    store.put_document(DOCUMENT)
    for job_id in (BAD, GOOD):
        store.create(SPEC, job_id, 2, {"model": "m"})
        tokens = [OutputToken(n, 0, n, "t", -0.5, (TokenLogprob(1, -0.5),)) for n in (1, 2, 3)]
        answer = JobAnswer(0, 5, 0, "stop", "text", None, {"ttft_s": 1.0}, {"mode": "dense", "layers": [{"layer": 0}]})
        store.commit_step(
            [(job_id, token) for token in tokens], [(job_id, ACTIVE, JobState.DECODING)], [(job_id, answer)]
        )
    store.close()


def damage(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        key = "seq" if " jobs " in statement else "job"
        db.execute(statement if " WHERE " in statement else f"{statement} WHERE {key} = 1")


@pytest.fixture
def opened(path: Path) -> Iterator[Callable[[str], JobStore]]:
    stores: list[JobStore] = []

    def damaged(statement: str) -> JobStore:
        make(path)
        damage(path, statement)
        stores.append(JobStore(path))
        return stores[-1]

    yield damaged
    for store in stores:
        store.close()


@pytest.mark.parametrize("statement", DAMAGES)
def test_a_damaged_row_is_the_trouble_of_its_job(opened: Callable[[str], JobStore], statement: str) -> None:
    store = opened(statement)
    store.split_old_tokens(lambda spec: False)
    unfinished = {record.id: record for record in store.unfinished()}
    listed = {record.id: record for record in store.list_jobs()[0]}
    assert set(unfinished) == set(listed) == {BAD, GOOD}
    if not any(part in statement for part in UNSEEN):
        damages = unfinished[BAD].damage, listed[BAD].damage
        assert any(damages), "somebody says so"
        assert damages[0] or any(part in statement for part in ONLY_LISTED)
        assert all("\n" not in damage and len(damage) < 400 for damage in damages)
    for records in (unfinished, listed):
        good = records[GOOD]
        assert (good.damage, good.state, good.spec.labels) == ("", JobState.DECODING, {"a": "b"})
        assert encode_job(good).labels == {"a": "b"}
        shown = encode_job(records[BAD])
        assert (shown.id, bool(shown.error)) == (BAD, bool(records[BAD].damage))
    assert [token.token_id for token in store.tokens(GOOD)] == [1, 2, 3]
    # it fails, durably, and can be forgotten
    assert store.transition(BAD, ACTIVE, JobState.FAILED, error="damaged")
    assert [record.id for record in store.unfinished()] == [GOOD]
    assert store.get(BAD).state is JobState.FAILED  # type: ignore[union-attr]
    assert store.expire(-1.0, 0.0) == 0
    assert store.delete(BAD)
    assert store.transition(GOOD, ACTIVE, JobState.SUCCEEDED)


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM tokens WHERE job = 1 AND number = 2",
        "DELETE FROM tokens WHERE job = 1 AND number = 1",
        "DELETE FROM tokens WHERE job = 1 AND number = 3",
        "UPDATE tokens SET token_id = 'x'",
        "UPDATE tokens SET token_id = -1",
        "UPDATE tokens SET question = 1.5",
        "UPDATE tokens SET text = cast(x'ff' AS TEXT)",
        "UPDATE tokens SET top = '[[1]]'",
        "UPDATE tokens SET top = '{'",
        "UPDATE tokens SET logprob = 'x'",
        "UPDATE tokens SET part = 'poem'",
        "UPDATE jobs SET last_event = 9",
    ],
)
def test_a_damaged_token(opened: Callable[[str], JobStore], statement: str) -> None:
    store = opened(statement)
    with pytest.raises(JobDamaged, match=BAD):
        store.tokens(BAD)
    assert len(store.tokens(GOOD)) == 3
    assert store.tokens(GOOD, after=1, limit=1)[0].number == 2
    assert store.tokens(GOOD, after=3) == store.tokens(GOOD, after=7) == []


@pytest.mark.parametrize("column", ["name = x'ff'", "size_bytes = 'x'", "created = 'x'", "size_bytes = -1"])
def test_a_damaged_document(opened: Callable[[str], JobStore], path: Path, column: str) -> None:
    store = opened("UPDATE jobs SET restarts = 0")
    other = store.put_document(DocumentRecord("doc_" + "1" * 32, "good", 4, 1.0, 1e12))
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(f"UPDATE documents SET {column} WHERE id = ?", (DOCUMENT.id,))
    shown = {record.id: record for record in store.list_documents()}
    assert set(shown) == {DOCUMENT.id, other.id}
    assert (shown[other.id], shown[DOCUMENT.id].size_bytes) == (other, 0)
    assert store.put_document(DOCUMENT).id == DOCUMENT.id


def test_rows_that_no_constraint_would_allow() -> None:
    nothing = JobRow(1, *[None] * (len(JobRow._fields) - 1))
    for record in (job_record(nothing, [[None] * 9], None), listed_record(nothing, [[None] * 9], {None: None})):
        assert (record.state, bool(record.damage)) == (JobState.FAILED, True)
        assert isinstance(record, JobRecord)
        assert encode_job(record).error == record.error
    assert document_record([None] * 16).size_bytes == 0
    assert (job_state(None), job_state("queued")) == (JobState.FAILED, JobState.QUEUED)


def test_log_probabilities_of_a_prompt_are_read_as_they_were_stored(path: Path) -> None:
    store = JobStore(path)
    top = (TokenLogprob(7, -0.1), TokenLogprob(5, -3.0000000000000004))
    prompt = (PromptToken(3, None, ()), PromptToken(5, -3.0000000000000004, top))
    job_id = new_id("job")
    spec = JobSpec(JobInput(token_ids=(3, 5)), AnswerOptions(), prompt_logprobs=2)
    store.create(spec, job_id, 1, {})
    answer = JobAnswer(0, 2, 0, "stop", "text", prompt=prompt)
    store.commit_step([], [(job_id, ACTIVE, JobState.SUCCEEDED)], [(job_id, answer)])
    record = store.get(job_id)
    assert record is not None
    assert record.answers == (answer,)
    assert record.spec == spec
    assert store.list_jobs()[0][0].answers[0].prompt == (), "listings do without"
    store.close()


def test_a_listing_reads_no_specs(path: Path) -> None:
    store = JobStore(path)
    long = "Why? " * 200
    store.put_document(DOCUMENT)
    given = JobInput(document_id=DOCUMENT.id, questions=("Short?", long))
    store.create(JobSpec(given, AnswerOptions(), priority=-3, labels={"k": "v"}), new_id("job"), 2, {"model": "m"})
    store.create(JobSpec(JobInput(token_ids=(1,) * 1000), AnswerOptions()), new_id("job"), 1, {})
    read: set[str | None] = set()

    def authorize(action: int, table: str | None, *_: object) -> int:
        read.add(table if action == sqlite3.SQLITE_READ else None)
        return sqlite3.SQLITE_OK

    with store._db.reading() as reader:
        reader.set_authorizer(authorize)
    plain, asked = store.list_jobs()[0]
    assert "specs" not in read
    assert read >= {"jobs", "summaries", "answers", "labels"}
    assert (plain.spec.input.num_answers, asked.spec.input.num_answers) == (1, 2)
    assert (asked.spec.priority, asked.spec.labels, asked.reproducibility) == (-3, {"k": "v"}, {"model": "m"})
    assert asked.spec.input.questions[0] == "Short?"
    assert asked.spec.input.questions[1] == f"{long[:499]}…"
    assert store.get(asked.id).spec.input.questions[1] == long  # type: ignore[union-attr]
    store.close()


def test_a_page_of_a_listing_is_bounded_by_bytes(path: Path) -> None:
    store = JobStore(path)
    ids = [store.create(JobSpec(JobInput(prompt="p"), AnswerOptions()), new_id("job"), 1, {})[0].id for _ in range(9)]
    for job_id in ids:
        store.commit_step([], [], [(job_id, JobAnswer(0, text="x" * (1 << 20)))])
    pages, cursor = [], ""
    while not pages or cursor:
        records, cursor = store.list_jobs(limit=100, cursor=cursor)
        pages.append([record.id for record in records])
    assert [len(page) for page in pages] == [3, 3, 3]
    assert [job_id for page in pages for job_id in page] == ids[::-1]
    store.close()
