"""Jobs, their answers and tokens, batches, and the list of documents, in one SQLite file.

Failure contract: what a method has written when it returns survives the death of the process. Every method is one
transaction: it happens as a whole or not at all. A job that has ended never changes its state again. Errors:
JobStoreError when the store itself fails, the errors of `cluster.jobs.model` when a request cannot be granted.
"""

from __future__ import annotations

import hmac
import json
import logging
import re
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.engine.outputs import OutputToken
from cluster.jobs.model import (
    FINAL,
    InvalidJob,
    JobAnswer,
    JobConflict,
    JobDamaged,
    JobRecord,
    JobSpec,
    JobState,
    ServiceBusy,
    check_id,
    document_not_found,
)
from cluster.jobs.rows import job_state, token
from cluster.jobs.sqlite import statements
from cluster.jobs.sqlite.batches import BatchTable
from cluster.jobs.sqlite.database import Database
from cluster.jobs.sqlite.documents import DocumentTable, touch
from cluster.jobs.sqlite.migrations import shown_question
from cluster.jobs.tenants.tenant import ANYONE, Tenant
from cluster.text.reasoning import ReasoningSplitter
from protos.jobs.limits import MAX_INT64, MAX_PAGE

_log = logging.getLogger(__name__)
_CURSOR = re.compile(r"j[0-9a-f]{32}")
_LISTINGS = 4  # at a time; others wait
_LISTING_WAIT_S = 10.0

StateChange = tuple[str, Collection[JobState], JobState]  # job id, states it must be in, new state


class JobStore(DocumentTable, BatchTable):
    """Durable state of the head process; all methods may be called from any thread."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """
        Args:
            clock: gives seconds since 1970.
        """
        super().__init__(Database(path), clock)
        self._listings = threading.BoundedSemaphore(_LISTINGS)
        if self.warning:
            _log.warning(self.warning)

    @property
    def warning(self) -> str:
        """What was found to be lost when the store was opened, as one line; "" for nothing."""
        return self._db.warning

    def check(self) -> None:
        """Raise JobStoreError when a file of the store was removed, replaced or cut off since it was opened."""
        self._db.check()

    def close(self) -> None:
        self._db.close()

    def stop_waiting(self) -> None:
        """Let writes fail at once, instead of after seconds, while another process has locked the database."""
        self._db.stop_waiting()

    def admit(self, spec: JobSpec, max_queued: int, tenant: Tenant = ANYONE) -> JobRecord | None:
        """Return the job that an earlier submission of the tenant with this idempotency key made.

        Without one, raises ServiceBusy when too many jobs wait, of all or of the tenant. JobConflict: as of `create`.
        """
        with self._db.reading() as db:
            known = statements.by_key(db, spec, tenant.name)
            if known is None:
                statements.check_queue(db, max_queued, tenant)
            return known

    def create(
        self, spec: JobSpec, job_id: str, num_answers: int, reproducibility: Mapping[str, Any],
        max_queued: int | None = None, document_expires: float | None = None, tenant: Tenant = ANYONE,
    ) -> tuple[JobRecord, bool]:  # fmt: skip
        """Store a queued job and return it, and True; with an idempotency key in use, the job that has it, and False.

        Idempotency keys are those of the tenant, who owns the job.

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
            if (known := statements.by_key(db, spec, tenant.name)) is not None:
                return known, False
            statements.check_queue(db, max_queued, tenant)
            if db.execute("SELECT 1 FROM jobs WHERE id = ?", (job_id,)).fetchone():
                raise JobConflict(f"job id: {job_id}: is in use: take a new one")
            if document and not touch(db, document, document_expires, self._clock()):
                raise document_not_found(document)
            created = self._clock()
            seq = db.execute(
                "INSERT INTO jobs (id, state, owner, owner_key, body_hash, num_answers, created, document_id)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (job_id, JobState.QUEUED, tenant.name, key, spec.body_hash(), num_answers, created, document),
            ).lastrowid
            db.execute("INSERT INTO specs VALUES (?, ?, '{}')", (seq, spec.to_json()))
            questions = json.dumps([*map(shown_question, spec.input.questions)], ensure_ascii=False)
            summary = (seq, spec.priority, questions, json.dumps(dict(reproducibility)))
            db.execute("INSERT INTO summaries VALUES (?, ?, ?, ?)", summary)
            db.executemany("INSERT INTO labels VALUES (?, ?, ?)", [(seq, *label) for label in spec.labels.items()])
            answers = tuple(map(JobAnswer, range(num_answers)))
            statements.insert(db, "answers", seq, answers)
        record = JobRecord(
            job_id, JobState.QUEUED, spec, created, answers=answers, reproducibility=reproducibility, owner=tenant.name
        )
        return record, True

    def transition(self, job_id: str, expected: Collection[JobState], new: JobState, error: str = "") -> bool:
        """Change the state if it is one of `expected`; returns False if it is not, or the job is gone."""
        with self._db.writing() as db:
            return statements.transition(db, (job_id, expected, new), self._clock(), error)

    def commit_step(
        self, tokens: Sequence[tuple[str, OutputToken]], states: Sequence[StateChange],
        answers: Sequence[tuple[str, JobAnswer]],
    ) -> None:  # fmt: skip
        """Store what steps of the engine produced, in one transaction: tokens, then answers, then states.

        The tokens of a job must continue its numbers. Late tokens of a job that has ended or was deleted are dropped;
        late answers only of a deleted one, so a cancelled job keeps what it had.
        """
        outputs: dict[str, tuple[list[OutputToken], list[JobAnswer]]] = defaultdict(lambda: ([], []))
        for job_id, item in tokens:
            outputs[job_id][0].append(item)
        for job_id, answer in answers:
            outputs[job_id][1].append(answer)
        with self._db.writing() as db:
            for job_id, output in outputs.items():
                statements.add_output(db, job_id, *output)
            now = self._clock()
            for change in states:
                statements.transition(db, change, now)

    def get(self, job_id: str) -> JobRecord | None:
        """Return the job with its answers, without tokens."""
        with self._db.reading() as db:
            return statements.one(db, job_id)

    def owner(self, job_id: str) -> str | None:
        """Return whose a job is, without reading its spec; None for an unknown one."""
        with self._db.reading() as db:
            row = db.execute("SELECT owner FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return None if row is None else str(row[0])

    def state(self, job_id: str) -> JobState | None:
        """Return the state of a job, without reading its spec; None for an unknown one."""
        with self._db.reading() as db:
            row = db.execute("SELECT state FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return None if row is None else job_state(row[0])

    def tokens(self, job_id: str, after: int = 0, limit: int = 1000) -> list[OutputToken]:
        """Return at most `limit` tokens with numbers above `after`, in order; none for an unknown job.

        Raises JobDamaged when one is missing or damaged.
        """
        if after < 0 or limit < 1:
            raise InvalidJob(f"after, limit: {after}, {limit}: must be at least 0 and at least 1")
        with self._db.reading() as db:
            job = db.execute("SELECT seq, last_event FROM jobs WHERE id = ?", (job_id,)).fetchone()
            if job is None:
                return []
            columns = statements.columns(OutputToken)
            rows = db.execute(
                f"SELECT {columns} FROM tokens WHERE job = ? AND number > ? ORDER BY number LIMIT ?",
                (job[0], min(after, MAX_INT64), min(limit, MAX_INT64)),
            ).fetchall()
        found = [token(job_id, number, row) for number, row in enumerate(rows, after + 1)]
        if len(rows) < limit and after + len(rows) != max(job[1], after):
            raise JobDamaged(f"job {job_id}: {after + len(rows)} of its {job[1]} tokens are stored: submit it again")
        return found

    def split_old_tokens(self, reasoning_opened: Callable[[JobSpec, int], bool]) -> None:
        """Split reasoning off the tokens that were stored before schema 4; later ones come with it.

        Args:
            reasoning_opened: whether the prompt of a question (its index) ends inside `<think>`.
        """
        while True:
            with self._db.writing() as db:  # one job at a time: others read in between
                row = db.execute("SELECT job FROM tokens WHERE part = '' LIMIT 1").fetchone()
                if row is None:
                    return
                (spec,) = db.execute("SELECT spec FROM specs WHERE job = ?", row).fetchone() or (None,)

                def opened(question: int, spec: object = spec) -> bool:
                    try:
                        return reasoning_opened(JobSpec.from_json(str(spec)), question)
                    except Exception:  # noqa: BLE001 - the row is damaged; its tokens are text all the same
                        return False

                splitters: dict[int, ReasoningSplitter] = {}
                query = "SELECT number, question, text FROM tokens WHERE job = ? ORDER BY number"
                for number, question, text in db.execute(query, row).fetchall():
                    if question not in splitters:
                        splitters[question] = ReasoningSplitter(opened(question))
                    splitter = splitters[question]
                    parts = splitter.push(text if isinstance(text, str) else "")
                    db.execute(
                        "UPDATE tokens SET part = ?, reasoning = ?, answer = ? WHERE job = ? AND number = ?",
                        (splitter.part, *parts, *row, number),
                    )

    def list_jobs(
        self, states: Collection[JobState] = (), labels: Mapping[str, str] | None = None, limit: int = 100,
        cursor: str = "", owner: str | None = None,
    ) -> tuple[list[JobRecord], str]:  # fmt: skip
        """Return jobs in any of `states` (none: all) with all `labels`, newest first, and the cursor of the next page.

        Those of one owner, or (None) of all.

        A cursor stays valid while jobs come and go: no job is listed twice or skipped. It is empty after the last page.
        """
        if not 1 <= limit <= MAX_PAGE:
            raise InvalidJob(f"page_size: {limit}: must be between 1 and {MAX_PAGE}")
        below = self._read_cursor(cursor) if cursor else MAX_INT64
        where = ["seq < ?"]
        values: list[object] = [below]
        if owner is not None:
            where.append("owner = ?")
            values.append(owner)
        if states:
            where.append("state IN (SELECT value FROM json_each(?))")
            values.append(statements.array(states))
        for label in (labels or {}).items():
            where.append("seq IN (SELECT job FROM labels WHERE key = ? AND value = ?)")
            values += label
        if not self._listings.acquire(timeout=_LISTING_WAIT_S):
            raise ServiceBusy(f"listing: {_LISTINGS} others are being read: try again", 2.0)
        try:
            with self._db.reading() as db:
                page = f"SELECT seq FROM jobs WHERE {' AND '.join(where)} ORDER BY seq DESC LIMIT ?"
                found = [seq for (seq,) in db.execute(page, (*values, limit + 1))]
                records = statements.page(db, found[:limit])
        finally:
            self._listings.release()
        return records, self._cursor(found[len(records) - 1]) if len(records) < len(found) else ""

    def _cursor(self, seq: int) -> str:
        """Return the cursor after a job: its number, hidden, since that tells how many jobs all tenants had."""
        nonce = secrets.token_hex(8)
        return f"j{nonce}{seq ^ self._mask(nonce):016x}"

    def _read_cursor(self, cursor: str) -> int:
        if not _CURSOR.fullmatch(cursor):
            raise InvalidJob(f"page_token: {cursor[:60]!r}: must be one that a list gave, or empty")
        return min(int(cursor[17:], 16) ^ self._mask(cursor[1:17]), MAX_INT64)

    def _mask(self, nonce: str) -> int:
        digest = hmac.digest(f"{self._db.number}".encode(), nonce.encode(), "sha256")
        return int.from_bytes(digest[:8])

    def unfinished_ids(self) -> list[str]:
        """Return the ids of all jobs that have not ended, oldest first; reads nothing else of them."""
        with self._db.reading() as db:
            query = "SELECT id FROM jobs WHERE state NOT IN (SELECT value FROM json_each(?)) ORDER BY seq"
            return [job_id for (job_id,) in db.execute(query, (statements.array(FINAL),)) if isinstance(job_id, str)]

    def unfinished(self) -> Iterator[JobRecord]:
        """Yield every job that has not ended, oldest first, read one at a time: each may have a million token ids.

        Those with `damage` cannot go on.
        """
        for job_id in self.unfinished_ids():
            record = self.get(job_id)
            if record is not None:
                yield record

    def count(self, states: Collection[JobState] = (), owner: str | None = None) -> int:
        """Count the jobs in any of `states` (none: all), of one owner or (None) of all."""
        with self._db.reading() as db:
            return statements.count(db, states or JobState, owner)

    def delete(self, job_id: str) -> bool:
        """Delete an ended job with its tokens and its idempotency key; False if it is unknown or has not ended."""
        with self._db.writing() as db:
            query = "DELETE FROM jobs WHERE id = ? AND state IN (SELECT value FROM json_each(?))"
            return db.execute(query, (job_id, statements.array(FINAL))).rowcount > 0

    def expire(self, now: float, ttl_s: float) -> int:
        """Delete the jobs that ended before `now - ttl_s`; returns how many."""
        with self._db.reading() as db:
            query = "SELECT id FROM jobs WHERE state IN (SELECT value FROM json_each(?)) AND finished < ?"
            ids = [job_id for (job_id,) in db.execute(query, (statements.array(FINAL), now - ttl_s))]
        self._db.checkpoint()  # this is called every minute or so
        return sum(self.delete(job_id) for job_id in ids)  # one transaction each: steps commit in between
