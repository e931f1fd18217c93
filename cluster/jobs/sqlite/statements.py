"""What the job store asks of its database, on a connection in a transaction: statements and what they return."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any

from cluster.common.errors import JobStoreError
from cluster.engine.outputs import OutputToken
from cluster.jobs.model import (
    FINAL,
    WAITING,
    DocumentRecord,
    JobAnswer,
    JobConflict,
    JobDamaged,
    JobRecord,
    JobSpec,
    JobState,
    ServiceBusy,
)
from cluster.jobs.rows import COLUMNS, JobRow, document_record, job_record, listed_record
from cluster.jobs.tenants.limits import check_queued_jobs
from cluster.jobs.tenants.tenant import Tenant

_RECORD = (
    f"SELECT {COLUMNS}, spec FROM jobs LEFT JOIN summaries ON summaries.job = seq LEFT JOIN specs ON specs.job = seq"
)
_LISTED = f"SELECT {COLUMNS} FROM jobs LEFT JOIN summaries ON job = seq WHERE seq = ?"
_ANSWERS = "SELECT {} FROM answers WHERE job = ? ORDER BY question"
_PAGE_BYTES = 4 << 20  # of a listing, about; a page has one job at least


def columns(kind: type[OutputToken | JobAnswer | DocumentRecord]) -> str:
    """Return the columns of the table of these objects: one a field, of the same name."""
    return ", ".join(field.name for field in fields(kind))


def insert(db: sqlite3.Connection, table: str, seq: int | None, items: Sequence[OutputToken | JobAnswer]) -> None:
    """Store objects of one type as rows of a job, tuples and mappings as JSON; a row of the same key is replaced."""
    if not items:
        return
    names = [field.name for field in fields(items[0])]
    rows = [[seq, *map(_column, attrgetter(*names)(item))] for item in items]
    marks = ", ".join("?" * len(rows[0]))
    db.executemany(f"INSERT OR REPLACE INTO {table} (job, {', '.join(names)}) VALUES ({marks})", rows)


def _column(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (tuple, Mapping)) else value


def add_output(
    db: sqlite3.Connection, job_id: str, tokens: Sequence[OutputToken], answers: Sequence[JobAnswer]
) -> None:
    """Store tokens and answers of a job, if it may still have them."""
    row = db.execute("SELECT seq, state, last_event, num_answers FROM jobs WHERE id = ?", (job_id,)).fetchone()
    if row is None:
        return
    seq, state, last, num_answers = row
    if not isinstance(last, int) or not isinstance(num_answers, int):
        raise JobDamaged(f"job {job_id}: the stored job is damaged: last_event, num_answers: {last!r}, {num_answers!r}")
    if state in FINAL:
        tokens = ()
    for number, item in enumerate(tokens, last + 1):
        if item.number != number:
            raise JobStoreError(f"{job_id}: token number {item.number}: must be {number}: read the job again")
    for question in (item.question for items in (tokens, answers) for item in items):
        if not 0 <= question < num_answers:
            raise JobStoreError(f"{job_id}: question {question}: must be between 0 and {num_answers - 1}")
    insert(db, "tokens", seq, tokens)
    insert(db, "answers", seq, answers)
    db.execute("UPDATE jobs SET last_event = ? WHERE seq = ?", (last + len(tokens), seq))


def transition(
    db: sqlite3.Connection, change: tuple[str, Collection[JobState], JobState], now: float, error: str = ""
) -> bool:
    job_id, expected, new = change
    assert not FINAL.intersection(expected), f"{job_id}: an ended job stays as it is"
    cursor = db.execute(
        "UPDATE jobs SET state = :new, error = :error,"
        " restarts = restarts + (:recovers AND state IN ('prefilling', 'decoding')),"
        " started = CASE WHEN :start THEN coalesce(started, :now) ELSE started END,"
        " finished = CASE WHEN :finish THEN :now END"
        " WHERE id = :id AND (state IN (SELECT value FROM json_each(:expected))"
        " OR :finish AND state NOT IN (SELECT value FROM json_each(:known)))",  # a damaged state can only end
        {
            "new": new,
            "error": error,
            "recovers": new is JobState.RECOVERING,
            "start": new is JobState.PREFILLING,
            "finish": new.is_final,
            "now": now,
            "id": job_id,
            "expected": array(expected),
            "known": array(JobState),
        },
    )
    return cursor.rowcount > 0


def count(db: sqlite3.Connection, states: Iterable[JobState], owner: str | None = None) -> int:
    """Count the jobs in any of `states`, of one owner or (None) of all."""
    query = "SELECT count(*) FROM jobs WHERE state IN (SELECT value FROM json_each(?1)) AND (?2 IS NULL OR owner = ?2)"
    return int(db.execute(query, (array(states), owner)).fetchone()[0])


def check_queue(db: sqlite3.Connection, max_queued: int | None, tenant: Tenant) -> None:
    """Refuse one more job of a tenant when `max_queued` wait already, or as many of its own as it may have.

    Raises ServiceBusy, which tells nothing of others.
    """
    if tenant.max_queued_jobs is not None:
        check_queued_jobs(tenant, count(db, WAITING, tenant.name))
    if max_queued is not None and count(db, WAITING) >= max_queued:
        raise ServiceBusy(f"queue: {max_queued} jobs wait, the limit is server.max_queued_jobs", 10.0)


def by_key(db: sqlite3.Connection, spec: JobSpec, owner: str) -> JobRecord | None:
    """Return the job that an owner submitted with this idempotency key. Raises JobConflict: with another body."""
    key = spec.idempotency_key
    query = "SELECT id, body_hash FROM jobs WHERE owner = ? AND owner_key = ?"
    row = db.execute(query, (owner, key)).fetchone() if key else None
    if row is not None and row[1] != spec.body_hash():
        raise JobConflict(f"idempotency_key: {key[:60]!r}: used by {row[0]} with another body: use a new key")
    return None if row is None else one(db, row[0])


def one(db: sqlite3.Connection, job_id: str) -> JobRecord | None:
    row = db.execute(f"{_RECORD} WHERE id = ?", (job_id,)).fetchone()
    if row is None:
        return None
    *values, spec = row
    job = JobRow(*values)
    return job_record(job, db.execute(_ANSWERS.format(columns(JobAnswer)), (job.seq,)).fetchall(), spec)


def page(db: sqlite3.Connection, found: Sequence[int]) -> list[JobRecord]:
    """Return jobs as listings show them, from the first on, until they have _PAGE_BYTES together."""
    whole = "CASE WHEN json_valid(attention) THEN json_remove(attention, '$.layers') ELSE attention END"
    answers = _ANSWERS.format(columns(JobAnswer).replace("attention", whole).removesuffix("prompt") + "'[]'")
    records: list[JobRecord] = []
    size = 0
    for seq in found:
        row = JobRow(*db.execute(_LISTED, (seq,)).fetchone())
        rows = db.execute(answers, (seq,)).fetchall()
        size += sum(len(value) for values in (row, *rows) for value in values if isinstance(value, (str, bytes)))
        if records and size > _PAGE_BYTES:
            break
        labels = dict(db.execute("SELECT key, value FROM labels WHERE job = ?", (seq,)).fetchall())
        records.append(listed_record(row, rows, labels))
    return records


def documents(db: sqlite3.Connection, rest: str, *values: object) -> list[DocumentRecord]:
    rows = db.execute(f"SELECT {columns(DocumentRecord)} FROM documents {rest}", values).fetchall()
    return [document_record(row) for row in rows]


def array(states: Iterable[JobState]) -> str:
    return json.dumps(list(states))
