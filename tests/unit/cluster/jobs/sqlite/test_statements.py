"""Statements on damaged values, and several changes of one transaction."""

from __future__ import annotations

import sqlite3

import pytest

from cluster.common.errors import JobStoreError
from cluster.engine.outputs import OutputToken
from cluster.jobs.model import ACTIVE, JobDamaged, JobInput, JobSpec, JobState, new_id
from cluster.jobs.sqlite import statements
from cluster.jobs.store import JobStore
from protos.jobs.sampling import AnswerOptions


def submit(store: JobStore) -> str:
    return store.create(JobSpec(JobInput(prompt="p"), AnswerOptions()), new_id("job"), 1, {})[0].id


def test_changes_of_several_jobs_happen_together(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, ended = (submit(store) for _ in range(3))
    store.transition(ended, ACTIVE, JobState.CANCELLED)
    changes = [(job_id, ACTIVE, JobState.RECOVERING) for job_id in (first, ended, second, new_id("job"))]
    change = statements.transition

    def fail(db: sqlite3.Connection, one: tuple[str, object, JobState], *rest: object) -> bool:
        if one[0] == second:
            raise sqlite3.OperationalError("disk I/O error")
        return change(db, one, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(statements, "transition", fail)
        with pytest.raises(JobStoreError, match="disk I/O error"):
            store.commit_step([], changes, [])
    assert store.state(first) is JobState.QUEUED
    store.commit_step([], changes, [])
    assert [store.state(job_id) for job_id in (first, second, ended)] == [
        JobState.RECOVERING, JobState.RECOVERING, JobState.CANCELLED
    ]  # fmt: skip


def test_a_job_in_an_unknown_state_can_only_end(store: JobStore) -> None:
    job_id = submit(store)
    with store._db.writing() as db:
        db.execute("UPDATE jobs SET state = 'paused'")
    assert store.state(job_id) is JobState.FAILED
    assert not store.transition(job_id, ACTIVE, JobState.QUEUED)
    assert not store.delete(job_id)
    assert store.unfinished_ids() == [job_id]
    assert store.transition(job_id, ACTIVE, JobState.FAILED, error="damaged")
    assert store.unfinished_ids() == []
    assert not store.transition(job_id, ACTIVE, JobState.CANCELLED)
    assert store.delete(job_id)


@pytest.mark.parametrize("column", ["last_event", "num_answers"])
def test_output_of_a_damaged_job_is_refused_as_its_own(store: JobStore, column: str) -> None:
    bad, good = submit(store), submit(store)
    with store._db.writing() as db:
        db.execute(f"UPDATE jobs SET {column} = 'x' WHERE id = ?", (bad,))
    token = OutputToken(1, 0, 1, "a")
    with pytest.raises(JobDamaged, match=bad):
        store.commit_step([(bad, token)], [], [])
    store.commit_step([(good, token)], [], [])
    assert len(store.tokens(good)) == 1
