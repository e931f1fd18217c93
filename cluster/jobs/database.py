"""The SQLite file of the job store: its schema and migrations, one writing connection and a pool of reading ones.

Write-ahead logging: readers never block the writer and see whole transactions. A commit survives the death of the
process; with `synchronous=NORMAL` the newest commits may be lost (whole, never in part) when the machine loses power.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.common.errors import JobStoreError
from cluster.jobs.model import InvalidJob

_BUSY_TIMEOUT_S = 10.0  # another process (a backup, sqlite3 on the command line) may hold the file for a moment
_BUSY_STEP_S = 0.02
_WAL_LIMIT_BYTES = 64 << 20


# What changes with every step is in another table than what is written once: SQLite rewrites a row as a whole, and a
# spec may have a million token ids.
_V1 = (
    """CREATE TABLE jobs (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        state TEXT NOT NULL,
        idempotency_key TEXT UNIQUE,
        body_hash TEXT NOT NULL,
        num_answers INTEGER NOT NULL,
        created REAL NOT NULL,
        started REAL,
        finished REAL,
        error TEXT NOT NULL DEFAULT '',
        last_event INTEGER NOT NULL DEFAULT 0,
        restarts INTEGER NOT NULL DEFAULT 0)""",
    "CREATE INDEX jobs_state ON jobs (state)",
    """CREATE TABLE specs (
        job INTEGER PRIMARY KEY REFERENCES jobs (seq) ON DELETE CASCADE,
        spec TEXT NOT NULL,
        reproducibility TEXT NOT NULL)""",
    """CREATE TABLE labels (
        job INTEGER NOT NULL REFERENCES jobs (seq) ON DELETE CASCADE,
        key TEXT NOT NULL,
        value TEXT NOT NULL,
        PRIMARY KEY (job, key)) WITHOUT ROWID""",
    "CREATE INDEX labels_value ON labels (key, value, job)",
    """CREATE TABLE answers (
        job INTEGER NOT NULL REFERENCES jobs (seq) ON DELETE CASCADE,
        question INTEGER NOT NULL,
        prompt_tokens INTEGER NOT NULL DEFAULT 0,
        cached_tokens INTEGER NOT NULL DEFAULT 0,
        finish_reason TEXT NOT NULL DEFAULT '',
        text TEXT NOT NULL DEFAULT '',
        reasoning TEXT,
        timings TEXT NOT NULL DEFAULT '{}',
        PRIMARY KEY (job, question)) WITHOUT ROWID""",
    """CREATE TABLE tokens (
        job INTEGER NOT NULL REFERENCES jobs (seq) ON DELETE CASCADE,
        number INTEGER NOT NULL,
        question INTEGER NOT NULL,
        token_id INTEGER NOT NULL,
        text TEXT NOT NULL,
        logprob REAL,
        top TEXT NOT NULL,
        PRIMARY KEY (job, number)) WITHOUT ROWID""",
    """CREATE TABLE documents (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL,
        size_bytes INTEGER NOT NULL,
        created REAL NOT NULL,
        expires REAL NOT NULL)""",
)


def _create(connection: sqlite3.Connection) -> None:
    for statement in ("CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL)", *_V1):
        connection.execute(statement)


def _name_documents(connection: sqlite3.Connection) -> None:
    """Keep the id of the document beside the state: every sweep asks whether a document is in use."""
    connection.execute("ALTER TABLE jobs ADD COLUMN document_id TEXT")
    connection.execute(
        "UPDATE jobs SET document_id = (SELECT nullif(json_extract(spec, '$.input.document_id'), '')"
        " FROM specs WHERE job = seq)"
    )
    connection.execute("CREATE INDEX jobs_document ON jobs (document_id, state) WHERE document_id IS NOT NULL")


def _keep_attention(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE answers ADD COLUMN attention TEXT NOT NULL DEFAULT '{}'")


def _keep_parts(connection: sqlite3.Connection) -> None:
    """Store tokens with reasoning split off; `JobStore.split_old_tokens` does it for those stored before (part '')."""
    connection.execute("ALTER TABLE tokens ADD COLUMN part TEXT NOT NULL DEFAULT ''")
    connection.execute("ALTER TABLE tokens ADD COLUMN reasoning TEXT NOT NULL DEFAULT ''")
    connection.execute("ALTER TABLE tokens ADD COLUMN answer TEXT NOT NULL DEFAULT ''")
    connection.execute("CREATE INDEX tokens_unsplit ON tokens (job) WHERE part = ''")


# by the version they lead to
MIGRATIONS: Mapping[int, Callable[[sqlite3.Connection], None]] = {
    1: _create, 2: _name_documents, 3: _keep_attention, 4: _keep_parts,
}  # fmt: skip
VERSION = max(MIGRATIONS)


class Database:
    """One file: a single writing connection behind a lock, and a pool of reading ones."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._closed = False
        self._hurry = threading.Event()
        self._write_lock = threading.Lock()
        self._idle: list[sqlite3.Connection] = []  # reading ones; shared between threads, since list methods are atomic
        with self._errors():
            _make_private(path)
            self._writer = self._connect()
            try:
                _upgrade(self._writer, path)
            except BaseException:
                self._writer.close()
                raise
            self._writer.execute("PRAGMA busy_timeout = 0")  # `_begin` waits itself, and can be told to stop

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Run a transaction: committed at the end of the block, rolled back when anything is raised in it."""
        with self._write_lock, self._errors():
            self._check_open()
            with self._writer:
                self._begin()
                yield self._writer

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Read one consistent view of the last commit; never waits for writers, never delays them."""
        with self._errors():
            self._check_open()
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = self._connect()
                connection.execute("PRAGMA query_only = ON")
            try:
                with connection:
                    connection.execute("BEGIN")
                    yield connection
            finally:
                self._idle.append(connection)
                if self._closed:
                    self._close_idle()

    def _begin(self) -> None:
        """Begin to write; while another process does, wait for it up to `_BUSY_TIMEOUT_S`, or until `stop_waiting`."""
        until = time.monotonic() + _BUSY_TIMEOUT_S
        while True:
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                is_busy = getattr(error, "sqlite_errorname", "").startswith("SQLITE_BUSY")
                if not is_busy or time.monotonic() >= until or self._hurry.wait(_BUSY_STEP_S):
                    raise

    def stop_waiting(self) -> None:
        """Let writes fail at once while another process has locked the file."""
        self._hurry.set()

    def close(self) -> None:
        """Finish the running transaction and close the file; reads that still run end by themselves."""
        with self._write_lock:
            self._closed = True
            self._close_idle()
            self._writer.close()

    def _close_idle(self) -> None:
        with suppress(IndexError):  # there is none any more
            while True:
                self._idle.pop().close()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False, cached_statements=256
        )
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT_BYTES}")
        return connection

    def _check_open(self) -> None:
        if self._closed:
            raise JobStoreError(f"job store {self.path}: is closed: open it again")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except UnicodeEncodeError as error:
            raise InvalidJob(f"text: {error.object[error.start]!r} at {error.start}: must be valid Unicode") from error
        except sqlite3.Error as error:
            full = getattr(error, "sqlite_errorname", "") == "SQLITE_FULL"  # absent on errors of the Python layer
            remedy = "free space on its disk" if full else "check its disk and its permissions, or name another file"
            raise JobStoreError(f"job store {self.path}: {error}: {remedy}") from error
        except OSError as error:
            raise JobStoreError(
                f"job store {self.path}: {error.strerror}: must be a file in a folder that we may write"
            ) from error


def _make_private(path: Path) -> None:
    """Create the file with mode 0600 before SQLite opens it; its `-wal` and `-shm` files get the same mode."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        if not path.is_file():
            raise JobStoreError(f"job store {path}: must be a file: name another one") from None
        path.chmod(0o600)  # by name: closing a second descriptor would drop SQLite's locks of this process


def _upgrade(connection: sqlite3.Connection, path: Path) -> None:
    """Bring the schema to VERSION in one transaction, or raise JobStoreError and change nothing."""
    version = _version(connection, path)  # refused before anything changes, the journal mode included
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":
        raise JobStoreError(f"job store {path}: journal mode {mode}: must be wal: put it on a local disk")
    if version == VERSION:
        return
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        for reached in range(_version(connection, path) + 1, VERSION + 1):
            MIGRATIONS[reached](connection)
            connection.execute("INSERT OR REPLACE INTO meta VALUES ('schema_version', ?)", (reached,))


def _version(connection: sqlite3.Connection, path: Path) -> int:
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    if not tables:
        return 0
    query = "SELECT value FROM meta WHERE key = 'schema_version'"
    row = connection.execute(query).fetchone() if "meta" in tables else None
    if row is None:
        raise JobStoreError(f"job store {path}: a database of something else: name another file")
    if row[0] > VERSION:
        raise JobStoreError(
            f"job store {path}: schema version {row[0]}: must be at most {VERSION}: upgrade, or name another file"
        )
    return int(row[0])
