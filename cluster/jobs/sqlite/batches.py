"""The tables of batches: requests of one input file, each of which is answered once.

A line of the input is answered when its result is stored, in one statement that does nothing for a line that has one.
Results stay here until they are written to the output files; then the lines are deleted with the last transition.
"""

from __future__ import annotations

import enum
import json
import sqlite3
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.jobs.sqlite.database import Database


class BatchStatus(enum.StrEnum):
    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def is_final(self) -> bool:
        return self in ENDED


ENDED = frozenset({BatchStatus.COMPLETED, BatchStatus.FAILED, BatchStatus.CANCELLED, BatchStatus.EXPIRED})
# the column of the time at which a status begins
_SINCE = {
    BatchStatus.IN_PROGRESS: "started", BatchStatus.FINALIZING: "finalizing", BatchStatus.CANCELLING: "cancelling",
} | dict.fromkeys(ENDED, "finished")  # fmt: skip


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """A batch; times are seconds since 1970. `input`, `output` and `errors` are ids of documents, "" for none.

    `owner` is the name of the API key that made it, `problems` why it failed as a whole.
    """

    id: str
    owner: str
    status: BatchStatus
    endpoint: str
    input: str
    completion_window: str
    created: float
    expires: float
    metadata: Mapping[str, str] = field(default_factory=dict)
    started: float | None = None
    finalizing: float | None = None
    finished: float | None = None
    cancelling: float | None = None
    output: str = ""
    errors: str = ""
    problems: Sequence[Mapping[str, object]] = ()
    total: int = 0
    completed: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class BatchLine:
    """A request of a batch: where it is in the input, in bytes, and its result: `status` of HTTP, 0 without one."""

    line: int  # from 1
    start: int
    size: int
    custom_id: str
    status: int = 0
    result: str = ""


_COLUMNS = ", ".join(BatchRecord.__dataclass_fields__)
_LINE_COLUMNS = ", ".join(BatchLine.__dataclass_fields__)
_SEQ = "(SELECT seq FROM batches WHERE id = ?)"


class BatchTable:
    """The batches of a job store; all methods may be called from any thread, each is one transaction."""

    _db: Database
    _clock: Callable[[], float]

    def create_batch(self, batch: BatchRecord) -> None:
        """Store a new batch."""
        names = [name for name in BatchRecord.__dataclass_fields__ if name not in ("metadata", "problems")]
        values = [getattr(batch, name) for name in names]
        texts = [json.dumps(batch.metadata), json.dumps(batch.problems)]
        with self._db.writing() as db:
            marks = ", ".join("?" * (len(names) + 2))
            db.execute(
                f"INSERT INTO batches ({', '.join(names)}, metadata, problems) VALUES ({marks})", (*values, *texts)
            )

    def get_batch(self, batch_id: str) -> BatchRecord | None:
        with self._db.reading() as db:
            return next(iter(_records(db, "WHERE id = ?", batch_id)), None)

    def list_batches(self, owner: str | None, limit: int, after: str = "") -> list[BatchRecord]:
        """Return batches of an owner, or (None) of all, the newest first, those older than `after`."""
        with self._db.reading() as db:
            where = "WHERE (?1 IS NULL OR owner = ?1) AND (?2 = '' OR seq < (SELECT seq FROM batches WHERE id = ?2))"
            return _records(db, f"{where} ORDER BY seq DESC LIMIT ?3", owner, after, limit)

    def unfinished_batches(self) -> list[BatchRecord]:
        """Return the batches that have not ended, the oldest first."""
        with self._db.reading() as db:
            ended = json.dumps(sorted(ENDED))
            return _records(db, "WHERE status NOT IN (SELECT value FROM json_each(?)) ORDER BY seq", ended)

    def add_lines(self, batch_id: str, lines: Sequence[BatchLine]) -> bool:
        """Store the lines of a batch that is being validated, which is in progress then; False if it is not."""
        with self._db.writing() as db:
            if not self._move(db, batch_id, (BatchStatus.VALIDATING,), BatchStatus.IN_PROGRESS):
                return False
            (seq,) = db.execute("SELECT seq FROM batches WHERE id = ?", (batch_id,)).fetchone()
            marks = ", ".join("?" * (1 + len(BatchLine.__dataclass_fields__)))
            rows = ((seq, one.line, one.start, one.size, one.custom_id, one.status, one.result) for one in lines)
            db.executemany(f"INSERT INTO batch_lines (batch, {_LINE_COLUMNS}) VALUES ({marks})", rows)
            failed = sum(one.status != 0 for one in lines)
            db.execute("UPDATE batches SET total = ?, failed = ? WHERE seq = ?", (len(lines), failed, seq))
            return True

    def open_lines(self, batch_id: str, after: int, limit: int) -> list[BatchLine]:
        """Return lines behind `after` that have no result, in their order."""
        return self._lines(batch_id, "status = 0", after, limit)

    def results(self, batch_id: str, is_good: bool, after: int, limit: int) -> list[BatchLine]:
        """Return lines behind `after` with a result, good or bad, in their order."""
        return self._lines(batch_id, "status = 200" if is_good else "status NOT IN (0, 200)", after, limit)

    def _lines(self, batch_id: str, condition: str, after: int, limit: int) -> list[BatchLine]:
        with self._db.reading() as db:
            query = (
                f"SELECT {_LINE_COLUMNS} FROM batch_lines WHERE batch = {_SEQ} AND {condition} AND line > ?"
                " ORDER BY line LIMIT ?"
            )
            return [BatchLine(*row) for row in db.execute(query, (batch_id, after, limit))]

    def answer_line(self, batch_id: str, line: int, status: int, result: str) -> bool:
        """Store the result of a line and count it; False, and nothing happens, if it has one or is gone."""
        with self._db.writing() as db:
            query = f"UPDATE batch_lines SET status = ?, result = ? WHERE batch = {_SEQ} AND line = ? AND status = 0"
            if not db.execute(query, (status, result, batch_id, line)).rowcount:
                return False
            counted = "completed" if status == 200 else "failed"
            db.execute(f"UPDATE batches SET {counted} = {counted} + 1 WHERE id = ?", (batch_id,))
            return True

    def close_lines(self, batch_id: str, make_result: Callable[[BatchLine], str], status: int) -> None:
        """Give every line without a result one that says why it has none."""
        while lines := self.open_lines(batch_id, 0, 1000):
            with self._db.writing() as db:
                query = (
                    f"UPDATE batch_lines SET status = ?, result = ? WHERE batch = {_SEQ} AND line = ? AND status = 0"
                )
                rows = [(status, make_result(one), batch_id, one.line) for one in lines]
                closed = db.executemany(query, rows).rowcount
                db.execute("UPDATE batches SET failed = failed + ? WHERE id = ?", (closed, batch_id))

    def move_batch(self, batch_id: str, expected: Collection[BatchStatus], new: BatchStatus) -> bool:
        """Change the status if it is one of `expected`; False if it is not, or the batch is gone."""
        with self._db.writing() as db:
            return self._move(db, batch_id, expected, new)

    def fail_batch(self, batch_id: str, problems: Iterable[Mapping[str, object]]) -> bool:
        """End a batch whose input cannot be used; False if it has begun or ended."""
        with self._db.writing() as db:
            if not self._move(db, batch_id, (BatchStatus.VALIDATING,), BatchStatus.FAILED):
                return False
            db.execute("UPDATE batches SET problems = ? WHERE id = ?", (json.dumps([*problems]), batch_id))
            return True

    def end_batch(self, batch_id: str, expected: BatchStatus, new: BatchStatus, output: str, errors: str) -> bool:
        """End a batch with its output files, and forget its lines; False if it has another status."""
        with self._db.writing() as db:
            if not self._move(db, batch_id, (expected,), new):
                return False
            db.execute("UPDATE batches SET output = ?, errors = ? WHERE id = ?", (output, errors, batch_id))
            db.execute(f"DELETE FROM batch_lines WHERE batch = {_SEQ}", (batch_id,))
            return True

    def expire_batches(self, before: float) -> int:
        """Forget batches that ended before a time; returns how many."""
        with self._db.writing() as db:
            query = "DELETE FROM batches WHERE finished < ? AND status IN (SELECT value FROM json_each(?))"
            return db.execute(query, (before, json.dumps(sorted(ENDED)))).rowcount

    def _move(self, db: sqlite3.Connection, batch_id: str, expected: Collection[BatchStatus], new: BatchStatus) -> bool:
        query = (
            f"UPDATE batches SET status = ?, {_SINCE[new]} = ?"
            " WHERE id = ? AND status IN (SELECT value FROM json_each(?))"
        )
        return db.execute(query, (new, self._clock(), batch_id, json.dumps(sorted(expected)))).rowcount > 0


def _records(db: sqlite3.Connection, rest: str, *values: object) -> list[BatchRecord]:
    return [_record(row) for row in db.execute(f"SELECT {_COLUMNS} FROM batches {rest}", values)]


def _record(row: Sequence[Any]) -> BatchRecord:
    """Return a batch; a damaged row is one that has failed."""
    fields = dict(zip(BatchRecord.__dataclass_fields__, row, strict=True))
    try:
        fields["status"] = BatchStatus(fields["status"])
        for name in ("metadata", "problems"):
            fields[name] = json.loads(fields[name])
    except (ValueError, TypeError):
        problem = {"code": "damaged", "message": "what is stored of the batch is damaged: make it again"}
        fields |= {"status": BatchStatus.FAILED, "metadata": {}, "problems": [problem]}
    return BatchRecord(**fields)
