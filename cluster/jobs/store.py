"""Jobs, their answers and tokens, and the list of documents, in one SQLite file.

Failure contract: what a method has written when it returns survives the death of the process. Every method is one
transaction: it happens as a whole or not at all. A job that has ended never changes its state again. Errors:
JobStoreError when the store itself fails, the errors of `cluster.jobs.model` when a request cannot be granted.
"""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import astuple, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

from cluster.common.errors import JobStoreError
from cluster.engine.outputs import OutputToken
from cluster.jobs.database import Database
from cluster.jobs.model import (
    ACTIVE,
    FINAL,
    WAITING,
    DocumentRecord,
    InvalidJob,
    JobAnswer,
    JobConflict,
    JobNotFound,
    JobRecord,
    JobSpec,
    JobState,
    NotAllowedNow,
    ServiceBusy,
    check_id,
    job_record,
)
from cluster.text.reasoning import ReasoningSplitter
from protos.jobs.limits import MAX_INT64, MAX_PAGE
from protos.stage.messages import TokenLogprob

_CURSOR = re.compile(r"j[0-9a-f]{15}")  # the seq of the last job of a page
_RECORD = (
    "SELECT seq, id, state, created, started, finished, error, last_event, restarts, spec, reproducibility"
    " FROM jobs JOIN specs ON job = seq"
)
_IN_USE = "EXISTS (SELECT 1 FROM jobs WHERE document_id = documents.id AND state IN (SELECT value FROM json_each(?)))"

StateChange = tuple[str, Collection[JobState], JobState]  # job id, states it must be in, new state


class JobStore:
    """Durable state of the head process; all methods may be called from any thread."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """
        Args:
            clock: gives seconds since 1970.
        """
        self._db = Database(path)
        self._clock = clock

    def close(self) -> None:
        self._db.close()

    def stop_waiting(self) -> None:
        """Let writes fail at once, instead of after seconds, while another process has locked the database."""
        self._db.stop_waiting()

    def admission(self, spec: JobSpec) -> tuple[JobRecord | None, int]:
        """Return the job that an earlier submission with this idempotency key made, and how many jobs wait.

        Raises JobConflict as `create` does.
        """
        with self._db.reading() as db:
            return _by_key(db, spec), _count(db, WAITING)

    def create(
        self, spec: JobSpec, job_id: str, num_answers: int, reproducibility: Mapping[str, Any],
        max_queued: int | None = None, document_expires: float | None = None,
    ) -> tuple[JobRecord, bool]:  # fmt: skip
        """Store a queued job and return it, and True; with an idempotency key in use, the job that has it, and False.

        Args:
            max_queued: how many jobs may wait; None for any number.
            document_expires: the new expiry of its document, in seconds since 1970; None leaves it as it is.

        Raises:
            JobConflict: the key came with another body. ServiceBusy: too many jobs wait. JobNotFound: the document.
            InvalidJob: id, or text that is not Unicode.
        """
        check_id(job_id, "job")
        assert num_answers >= 1, num_answers
        document, key = spec.input.document_id or None, spec.idempotency_key or None
        with self._db.writing() as db:
            if (known := _by_key(db, spec)) is not None:
                return known, False
            if max_queued is not None:
                check_queue(_count(db, WAITING), max_queued)
            if db.execute("SELECT 1 FROM jobs WHERE id = ?", (job_id,)).fetchone():
                raise JobConflict(f"job id: {job_id}: is in use: take a new one")
            touch = "UPDATE documents SET expires = coalesce(?, expires) WHERE id = ?"
            if document and not db.execute(touch, (document_expires, document)).rowcount:
                raise JobNotFound(f"document: {document}: not found: upload it again")
            created = self._clock()
            seq = db.execute(
                "INSERT INTO jobs (id, state, idempotency_key, body_hash, num_answers, created, document_id)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (job_id, JobState.QUEUED, key, spec.body_hash(), num_answers, created, document),
            ).lastrowid
            db.execute("INSERT INTO specs VALUES (?, ?, ?)", (seq, spec.to_json(), json.dumps(dict(reproducibility))))
            db.executemany("INSERT INTO labels VALUES (?, ?, ?)", [(seq, *label) for label in spec.labels.items()])
            answers = tuple(map(JobAnswer, range(num_answers)))
            _insert(db, "answers", seq, answers)
        return JobRecord(job_id, JobState.QUEUED, spec, created, answers=answers, reproducibility=reproducibility), True

    def transition(self, job_id: str, expected: Collection[JobState], new: JobState, error: str = "") -> bool:
        """Change the state if it is one of `expected`; returns False if it is not, or the job is gone."""
        with self._db.writing() as db:
            return _transition(db, (job_id, expected, new), self._clock(), error)

    def commit_step(
        self, tokens: Sequence[tuple[str, OutputToken]], states: Sequence[StateChange],
        answers: Sequence[tuple[str, JobAnswer]],
    ) -> None:  # fmt: skip
        """Store what steps of the engine produced, in one transaction: tokens, then answers, then states.

        The tokens of a job must continue its numbers. Late tokens of a job that has ended or was deleted are dropped;
        late answers only of a deleted one, so a cancelled job keeps what it had.
        """
        outputs: dict[str, tuple[list[OutputToken], list[JobAnswer]]] = defaultdict(lambda: ([], []))
        for job_id, token in tokens:
            outputs[job_id][0].append(token)
        for job_id, answer in answers:
            outputs[job_id][1].append(answer)
        with self._db.writing() as db:
            for job_id, output in outputs.items():
                _add_output(db, job_id, *output)
            now = self._clock()
            for change in states:
                _transition(db, change, now)

    def get(self, job_id: str) -> JobRecord | None:
        """Return the job with its answers, without tokens."""
        with self._db.reading() as db:
            return _one(db, job_id)

    def state(self, job_id: str) -> JobState | None:
        """Return the state of a job, without reading its spec; None for an unknown one."""
        with self._db.reading() as db:
            row = db.execute("SELECT state FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return None if row is None else JobState(row[0])

    def tokens(self, job_id: str, after: int = 0, limit: int = 1000) -> list[OutputToken]:
        """Return at most `limit` tokens with numbers above `after`, in order; none for an unknown job."""
        if after < 0 or limit < 1:
            raise InvalidJob(f"after, limit: {after}, {limit}: must be at least 0 and at least 1")
        with self._db.reading() as db:
            rows = db.execute(
                f"SELECT {_columns(OutputToken)} FROM tokens"
                " WHERE job = (SELECT seq FROM jobs WHERE id = ?) AND number > ? ORDER BY number LIMIT ?",
                (job_id, min(after, MAX_INT64), min(limit, MAX_INT64)),
            ).fetchall()
        return [_token(row) for row in rows]

    def split_old_tokens(self, reasoning_opened: Callable[[JobSpec], bool]) -> None:
        """Split reasoning off the tokens that were stored before schema 4; later ones come with it."""
        while True:
            with self._db.writing() as db:  # one job at a time: others read in between
                row = db.execute("SELECT job FROM tokens WHERE part = '' LIMIT 1").fetchone()
                if row is None:
                    return
                (spec,) = db.execute("SELECT spec FROM specs WHERE job = ?", row).fetchone()
                try:
                    opened = reasoning_opened(JobSpec.from_json(spec))
                except ValueError:  # the row is damaged; its tokens are text all the same
                    opened = False
                splitters: dict[int, ReasoningSplitter] = {}
                query = "SELECT number, question, text FROM tokens WHERE job = ? ORDER BY number"
                for number, question, text in db.execute(query, row).fetchall():
                    splitter = splitters.setdefault(question, ReasoningSplitter(opened))
                    parts = splitter.push(text)
                    db.execute(
                        "UPDATE tokens SET part = ?, reasoning = ?, answer = ? WHERE job = ? AND number = ?",
                        (splitter.part, *parts, *row, number),
                    )

    def list_jobs(
        self, states: Collection[JobState] = (), labels: Mapping[str, str] | None = None, limit: int = 100,
        cursor: str = "",
    ) -> tuple[list[JobRecord], str]:  # fmt: skip
        """Return jobs in any of `states` (none: all) with all `labels`, newest first, and the cursor of the next page.

        A cursor stays valid while jobs come and go: no job is listed twice or skipped. It is empty after the last page.
        """
        if not 1 <= limit <= MAX_PAGE:
            raise InvalidJob(f"page_size: {limit}: must be between 1 and {MAX_PAGE}")
        if cursor and not _CURSOR.fullmatch(cursor):
            raise InvalidJob(f"page_token: {cursor[:60]!r}: must be one that a list gave, or empty")
        below = int(cursor[1:], 16) if cursor else MAX_INT64
        where = ["seq < ?"]
        values: list[object] = [below]
        if states:
            where.append("state IN (SELECT value FROM json_each(?))")
            values.append(_array(states))
        for label in (labels or {}).items():
            where.append("seq IN (SELECT job FROM labels WHERE key = ? AND value = ?)")
            values += label
        with self._db.reading() as db:
            page = f"SELECT seq FROM jobs WHERE {' AND '.join(where)} ORDER BY seq DESC LIMIT ?"
            query = f"{_RECORD} WHERE seq IN ({page}) ORDER BY seq DESC"  # sorts no specs, which may be large
            rows = db.execute(query, (*values, limit + 1)).fetchall()
            records = _records(db, rows[:limit])
        return records, f"j{rows[limit - 1][0]:015x}" if len(rows) > limit else ""

    def unfinished(self) -> list[JobRecord]:
        """Return every job that has not ended, oldest first."""
        with self._db.reading() as db:
            query = f"{_RECORD} WHERE state IN (SELECT value FROM json_each(?)) ORDER BY seq"
            return _records(db, db.execute(query, (_array(ACTIVE),)).fetchall())

    def unfinished_ids(self) -> list[str]:
        """Return the ids of all jobs that have not ended, oldest first; reads nothing else of them."""
        with self._db.reading() as db:
            query = "SELECT id FROM jobs WHERE state IN (SELECT value FROM json_each(?)) ORDER BY seq"
            return [job_id for (job_id,) in db.execute(query, (_array(ACTIVE),))]

    def count(self, states: Collection[JobState] = ()) -> int:
        """Count the jobs in any of `states` (none: all)."""
        with self._db.reading() as db:
            return _count(db, states or JobState)

    def delete(self, job_id: str) -> bool:
        """Delete an ended job with its tokens and its idempotency key; False if it is unknown or has not ended."""
        with self._db.writing() as db:
            query = "DELETE FROM jobs WHERE id = ? AND state IN (SELECT value FROM json_each(?))"
            return db.execute(query, (job_id, _array(FINAL))).rowcount > 0

    def expire(self, now: float, ttl_s: float) -> int:
        """Delete the jobs that ended before `now - ttl_s`; returns how many."""
        with self._db.reading() as db:
            query = "SELECT id FROM jobs WHERE state IN (SELECT value FROM json_each(?)) AND finished < ?"
            ids = [job_id for (job_id,) in db.execute(query, (_array(FINAL), now - ttl_s))]
        return sum(self.delete(job_id) for job_id in ids)  # one transaction each: steps commit in between

    def put_document(self, record: DocumentRecord) -> DocumentRecord:
        """Add a document, or renew the expiry of the one with this id; returns what is stored."""
        with self._db.writing() as db:
            db.execute(
                f"INSERT INTO documents ({_columns(DocumentRecord)}) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (id) DO UPDATE SET expires = excluded.expires",
                astuple(record),
            )
            return _documents(db, "WHERE id = ?", record.id)[0]

    def get_document(self, document_id: str) -> DocumentRecord | None:
        with self._db.reading() as db:
            return next(iter(_documents(db, "WHERE id = ?", document_id)), None)

    def touch_document(self, document_id: str, expires: float) -> bool:
        """Set the expiry; False if there is no such document."""
        with self._db.writing() as db:
            query = "UPDATE documents SET expires = ? WHERE id = ?"
            return db.execute(query, (expires, document_id)).rowcount > 0

    def list_documents(self) -> list[DocumentRecord]:
        """Return all documents, newest first."""
        with self._db.reading() as db:
            return _documents(db, "ORDER BY created DESC, rowid DESC")

    def delete_document(self, document_id: str) -> bool:
        """Delete the record; False if there is none. Raises NotAllowedNow while an unfinished job uses it."""
        with self._db.writing() as db:
            if _documents(db, f"WHERE id = ? AND {_IN_USE}", document_id, _array(ACTIVE)):
                raise NotAllowedNow(f"document: {document_id}: an unfinished job uses it: wait or cancel the job")
            return db.execute("DELETE FROM documents WHERE id = ?", (document_id,)).rowcount > 0

    def expire_documents(self, now: float) -> int:
        """Delete the records whose expiry has passed and that no unfinished job uses; returns how many."""
        with self._db.writing() as db:
            query = f"DELETE FROM documents WHERE expires <= ? AND NOT {_IN_USE}"
            return db.execute(query, (now, _array(ACTIVE))).rowcount


def _columns(kind: type[OutputToken | JobAnswer | DocumentRecord]) -> str:
    """Return the columns of the table of these objects: one a field, of the same name."""
    return ", ".join(field.name for field in fields(kind))


def _insert(db: sqlite3.Connection, table: str, seq: int | None, items: Sequence[OutputToken | JobAnswer]) -> None:
    """Store objects of one type as rows of a job, tuples and mappings as JSON; a row of the same key is replaced."""
    if not items:
        return
    names = [field.name for field in fields(items[0])]
    rows = [[seq, *map(_column, attrgetter(*names)(item))] for item in items]
    marks = ", ".join("?" * len(rows[0]))
    db.executemany(f"INSERT OR REPLACE INTO {table} (job, {', '.join(names)}) VALUES ({marks})", rows)


def _column(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (tuple, Mapping)) else value


def _token(row: Sequence[Any]) -> OutputToken:
    values = list(row)
    values[5] = () if row[5] == "[]" else tuple(TokenLogprob(*entry) for entry in json.loads(row[5]))  # `top`
    return OutputToken(*values)


def _add_output(
    db: sqlite3.Connection, job_id: str, tokens: Sequence[OutputToken], answers: Sequence[JobAnswer]
) -> None:
    """Store tokens and answers of a job, if it may still have them."""
    row = db.execute("SELECT seq, state, last_event, num_answers FROM jobs WHERE id = ?", (job_id,)).fetchone()
    if row is None:
        return
    seq, state, last, num_answers = row
    if state in FINAL:
        tokens = ()
    for number, token in enumerate(tokens, last + 1):
        if token.number != number:
            raise JobStoreError(f"{job_id}: token number {token.number}: must be {number}: read the job again")
    for question in (item.question for items in (tokens, answers) for item in items):
        if not 0 <= question < num_answers:
            raise JobStoreError(f"{job_id}: question {question}: must be between 0 and {num_answers - 1}")
    _insert(db, "tokens", seq, tokens)
    _insert(db, "answers", seq, answers)
    db.execute("UPDATE jobs SET last_event = ? WHERE seq = ?", (last + len(tokens), seq))


def _transition(db: sqlite3.Connection, change: StateChange, now: float, error: str = "") -> bool:
    job_id, expected, new = change
    assert not FINAL.intersection(expected), f"{job_id}: an ended job stays as it is"
    cursor = db.execute(
        "UPDATE jobs SET state = :new, error = :error,"
        " restarts = restarts + (:recovers AND state IN ('prefilling', 'decoding')),"
        " started = CASE WHEN :start THEN coalesce(started, :now) ELSE started END,"
        " finished = CASE WHEN :finish THEN :now END"
        " WHERE id = :id AND state IN (SELECT value FROM json_each(:expected))",
        {
            "new": new,
            "error": error,
            "recovers": new is JobState.RECOVERING,
            "start": new is JobState.PREFILLING,
            "finish": new.is_final,
            "now": now,
            "id": job_id,
            "expected": _array(expected),
        },
    )
    return cursor.rowcount > 0


def check_queue(waiting: int, max_queued: int) -> None:
    """Refuse one more job when `max_queued` wait already (raises ServiceBusy)."""
    if waiting >= max_queued:
        raise ServiceBusy(f"queue: {waiting} jobs wait, the limit is server.max_queued_jobs", 10.0)


def _count(db: sqlite3.Connection, states: Iterable[JobState]) -> int:
    query = "SELECT count(*) FROM jobs WHERE state IN (SELECT value FROM json_each(?))"
    return int(db.execute(query, (_array(states),)).fetchone()[0])


def _by_key(db: sqlite3.Connection, spec: JobSpec) -> JobRecord | None:
    key = spec.idempotency_key
    row = db.execute("SELECT id, body_hash FROM jobs WHERE idempotency_key = ?", (key,)).fetchone() if key else None
    if row is not None and row[1] != spec.body_hash():
        raise JobConflict(f"idempotency_key: {key[:60]!r}: used by {row[0]} with another body: use a new key")
    return None if row is None else _one(db, row[0])


def _one(db: sqlite3.Connection, job_id: str) -> JobRecord | None:
    return next(iter(_records(db, db.execute(f"{_RECORD} WHERE id = ?", (job_id,)).fetchall())), None)


def _records(db: sqlite3.Connection, rows: Sequence[Sequence[Any]]) -> list[JobRecord]:
    """Turn rows of _RECORD into records, with the answers of all of them from one query."""
    answers: dict[int, list[Sequence[Any]]] = {row[0]: [] for row in rows}
    query = (
        f"SELECT job, {_columns(JobAnswer)} FROM answers"
        " WHERE job IN (SELECT value FROM json_each(?)) ORDER BY job, question"
    )
    for row in db.execute(query, (json.dumps(list(answers)),)):
        answers[row[0]].append(row[1:])
    return [job_record(row, answers[row[0]]) for row in rows]


def _documents(db: sqlite3.Connection, rest: str, *values: object) -> list[DocumentRecord]:
    rows = db.execute(f"SELECT {_columns(DocumentRecord)} FROM documents {rest}", values)
    return [DocumentRecord(*row) for row in rows]


def _array(states: Iterable[JobState]) -> str:
    return json.dumps(list(states))
