"""The SQLite file of the job store: verified when it is opened, one writing connection and a pool of reading ones.

Write-ahead logging: readers never block the writer and see whole transactions. A commit survives the death of the
process; with `synchronous=NORMAL` the newest commits may be lost (whole, never in part) when the machine loses power.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from cluster.common.errors import JobStoreError, JobStoreFull
from cluster.jobs.model import InvalidJob
from cluster.jobs.sqlite.commit_mark import CommitMark
from cluster.jobs.sqlite.files import NO_SPACE, StoreFiles, make_private, remedy
from cluster.jobs.sqlite.migrations import MIGRATIONS, VERSION, check_schema, schema_version

_BUSY_TIMEOUT_S = 10.0  # another process (a backup, sqlite3 on the command line) may hold the file for a moment
_BUSY_STEP_S = 0.02
_WAL_LIMIT_BYTES = 64 << 20
_VERIFY_S = 5.0  # for reading the pages of a large file at its start
_CHECKPOINT_WAIT_S = 1.0  # for readers
_log = logging.getLogger(__name__)


class Database:
    """One file: a single writing connection behind a lock, and a pool of reading ones.

    `warning` is what was found to be lost when it was opened, as one line, or "".
    """

    def __init__(self, path: Path) -> None:
        """Raises JobStoreError, before anything of an existing file is changed, when it cannot be used."""
        self.path = path
        self.warning = ""
        self._closed = False
        self._hurry = threading.Event()
        self._write_lock = threading.Lock()
        self._idle: list[sqlite3.Connection] = []  # reading ones; shared between threads, since list methods are atomic
        with self._errors():
            make_private(path)
            self._verify()
            self._mark = CommitMark(path)
            try:
                self._writer = self._connect()
                try:
                    self._prepare()
                except BaseException:
                    self._writer.close()
                    raise
            except BaseException:
                self._mark.close()
                raise

    def _verify(self) -> None:
        """Refuse a file that is damaged, or no job store of this version or an older one; only reads it."""
        # the journal of a head that was killed when the file was new must be rolled back before anything can be read
        is_new = self.path.with_name(f"{self.path.name}-journal").exists()
        with closing(self._connect("rw" if is_new else "ro")) as connection:
            version = schema_version(connection, self.path)
            if not version:
                return
            check_schema(connection, self.path, version)
            until = time.monotonic() + _VERIFY_S
            connection.set_progress_handler(lambda: time.monotonic() > until, 100_000)
            try:
                problems = [problem for (problem,) in connection.execute("PRAGMA quick_check")]
            except sqlite3.OperationalError as error:
                if error.sqlite_errorname != "SQLITE_INTERRUPT":  # else it is too large to be read as a whole
                    raise
                return
        for problem in problems:
            if problem != "ok" and " value in " not in problem:  # one bad row is the trouble of its job
                raise JobStoreError(f"job store {self.path}: {problem}: {remedy('SQLITE_CORRUPT')}")

    def _prepare(self) -> None:
        """Bring the schema to VERSION, prove that the file can be written, and look whether commits are lost."""
        _upgrade(self._writer, self.path)
        self._checkpoint("TRUNCATE")
        self._files = StoreFiles(self.path)
        meta = dict(self._writer.execute("SELECT key, value FROM meta"))
        self._store, self._commits = (
            value if isinstance(value := meta.get(key), int) else 0 for key in ("store", "commits")
        )
        self.warning = self._mark.loss(self._store, self._commits)
        self._writer.execute("PRAGMA busy_timeout = 0")  # `_begin` waits itself, and can be told to stop
        with self.writing():
            pass

    @property
    def number(self) -> int:
        """A random number of this database, which nobody is told."""
        return self._store

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Run a transaction: committed at the end of the block, rolled back when anything is raised in it."""
        with self._write_lock, self._errors():
            self._check_open()
            with self._writer:
                self._begin()
                yield self._writer
                self._writer.execute("INSERT OR REPLACE INTO meta VALUES ('commits', ?)", (self._commits + 1,))
            self._commits += 1
            with suppress(OSError):  # the next start may then say less than is lost
                self._mark.set(self._store, self._commits)

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

    def check(self) -> None:
        """Raise JobStoreError when a file of the store was removed, replaced or cut off since it was opened."""
        with self._errors():
            self._check_open()

    def checkpoint(self) -> None:
        """Move the write-ahead log into the database file: a copy of that file alone then has all but the newest."""
        with self._errors():
            self._check_open()
            size = self.path.with_name(f"{self.path.name}-wal").stat().st_size
            # readers that follow each other without a gap keep a log from being begun anew; TRUNCATE makes the gap
            self._checkpoint("TRUNCATE" if size > _WAL_LIMIT_BYTES else "PASSIVE")

    def _checkpoint(self, mode: str) -> None:
        with closing(self._connect()) as connection:  # one of its own: commits go on beside it
            connection.execute(f"PRAGMA busy_timeout = {int(_CHECKPOINT_WAIT_S * 1000)}")
            connection.execute(f"PRAGMA wal_checkpoint({mode})")

    def close(self) -> None:
        """Finish the running transaction and close the file; reads that still run end by themselves."""
        with self._write_lock:
            self._closed = True
            self._close_idle()
            self._writer.close()
            self._mark.close()

    def _close_idle(self) -> None:
        with suppress(IndexError):  # there is none any more
            while True:
                self._idle.pop().close()

    def _connect(self, mode: str = "rw") -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={mode}", uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None,
            check_same_thread=False, cached_statements=256,
        )  # fmt: skip
        connection.text_factory = _text
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT_BYTES}")
        return connection

    def _check_open(self) -> None:
        if self._closed:
            raise JobStoreError(f"job store {self.path}: is closed: open it again")
        self._files.check()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except UnicodeEncodeError as error:
            raise InvalidJob(f"text: {error.object[error.start]!r} at {error.start}: must be valid Unicode") from error
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", "")  # absent on errors of the Python layer
            kind = JobStoreFull if name == "SQLITE_FULL" else JobStoreError
            raise kind(f"job store {self.path}: {error}: {remedy(name)}") from error
        except OSError as error:
            raise _of_the_system(self.path, error) from error


def _of_the_system(path: Path, error: OSError) -> JobStoreError:
    if error.errno in NO_SPACE:
        return JobStoreFull(f"job store {path}: {error.strerror}: {remedy('SQLITE_FULL')}")
    return JobStoreError(f"job store {path}: {error.strerror}: must be a file in a folder that we may write")


def _text(value: bytes) -> str | bytes:
    """Return a text of the database; bytes that are none stay bytes, and whoever reads the row tells of them."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _upgrade(connection: sqlite3.Connection, path: Path) -> None:
    """Bring the schema to VERSION in one transaction, or raise JobStoreError and change nothing."""
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":
        raise JobStoreError(f"job store {path}: journal mode {mode}: must be wal: put it on a local disk")
    if schema_version(connection, path) == VERSION:
        return
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        for reached in range(schema_version(connection, path) + 1, VERSION + 1):
            MIGRATIONS[reached](connection)
            connection.execute("INSERT OR REPLACE INTO meta VALUES ('schema_version', ?)", (reached,))
