"""The schema of the job store, and the steps that bring a file of an older version to it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

from cluster.common.errors import JobStoreError

MAX_SHOWN = 500  # characters of a question in a listing

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
        " FROM specs WHERE job = seq AND json_valid(spec))"
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


def _summarize(connection: sqlite3.Connection) -> None:
    """Keep what a listing shows apart from the specs, which may be large, and count the commits."""
    connection.execute(
        """CREATE TABLE summaries (
            job INTEGER PRIMARY KEY REFERENCES jobs (seq) ON DELETE CASCADE,
            priority INTEGER NOT NULL,
            questions TEXT NOT NULL,
            reproducibility TEXT NOT NULL)"""
    )
    shown = f"CASE WHEN length(value) > {MAX_SHOWN} THEN substr(value, 1, {MAX_SHOWN - 1}) || '…' ELSE value END"
    questions = f"(SELECT json_group_array({shown}) FROM json_each(spec, '$.input.questions'))"
    is_valid = "coalesce(json_valid(spec), 0)"  # a damaged spec is told by whoever reads it
    connection.execute(
        f"""INSERT INTO summaries SELECT job,
            CASE WHEN {is_valid} THEN coalesce(json_extract(spec, '$.priority'), 0) ELSE 0 END,
            CASE WHEN {is_valid} THEN {questions} ELSE '[]' END,
            coalesce(reproducibility, '{{}}')
        FROM specs WHERE job IN (SELECT seq FROM jobs)"""
    )
    connection.execute("INSERT OR REPLACE INTO meta VALUES ('commits', 0), ('store', abs(random() / 2))")


def _describe_documents(connection: sqlite3.Connection) -> None:
    """Keep what documents are made of and how they are used, and which blocks of stored KV belong to them.

    A block is kept here until it is dropped, also of a document that is gone: that is how it is found.
    """
    for column in (
        "tokens INTEGER NOT NULL DEFAULT 0", "scale_len INTEGER NOT NULL DEFAULT 0",
        "pinned INTEGER NOT NULL DEFAULT 0", "used REAL NOT NULL DEFAULT 0", "parent TEXT NOT NULL DEFAULT ''",
        "source_hash TEXT NOT NULL DEFAULT ''", "kernel_family TEXT NOT NULL DEFAULT ''",
        "seams TEXT NOT NULL DEFAULT '[]'",
    ):  # fmt: skip
        connection.execute(f"ALTER TABLE documents ADD COLUMN {column}")
    connection.execute("UPDATE documents SET used = created")
    connection.execute(
        """CREATE TABLE document_kv (
            document_id TEXT NOT NULL,
            key BLOB NOT NULL,
            bytes INTEGER NOT NULL,
            PRIMARY KEY (document_id, key)) WITHOUT ROWID"""
    )
    connection.execute("CREATE INDEX document_kv_key ON document_kv (key)")


def _account_before(connection: sqlite3.Connection) -> None:
    """Note whose a block is before it is stored, and for which length, instead of its size afterwards."""
    connection.execute("ALTER TABLE document_kv DROP COLUMN bytes")
    connection.execute("ALTER TABLE document_kv ADD COLUMN pinned_len INTEGER NOT NULL DEFAULT 0")


def _name_owners(connection: sqlite3.Connection) -> None:
    """Keep whose jobs and documents are; those of before belong to nobody's key.

    `owner_key` replaces `idempotency_key`, which was unique over all owners.
    """
    connection.execute("ALTER TABLE jobs ADD COLUMN owner TEXT NOT NULL DEFAULT ''")
    connection.execute("ALTER TABLE jobs ADD COLUMN owner_key TEXT")
    connection.execute("UPDATE jobs SET owner_key = idempotency_key, idempotency_key = NULL")
    connection.execute("CREATE UNIQUE INDEX jobs_owner_key ON jobs (owner, owner_key) WHERE owner_key IS NOT NULL")
    connection.execute("CREATE INDEX jobs_owner ON jobs (owner)")
    connection.execute("ALTER TABLE documents ADD COLUMN owner TEXT NOT NULL DEFAULT ''")
    connection.execute("ALTER TABLE documents ADD COLUMN shared INTEGER NOT NULL DEFAULT 0")
    connection.execute("CREATE INDEX documents_owner ON documents (owner)")


def _keep_batches(connection: sqlite3.Connection) -> None:
    """Keep what a file is for, and batches with the results of their lines until these are written to a file."""
    connection.execute("ALTER TABLE documents ADD COLUMN purpose TEXT NOT NULL DEFAULT ''")
    connection.execute(
        """CREATE TABLE batches (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            owner TEXT NOT NULL,
            status TEXT NOT NULL,
            endpoint TEXT NOT NULL,
            input TEXT NOT NULL,
            completion_window TEXT NOT NULL,
            metadata TEXT NOT NULL,
            problems TEXT NOT NULL,
            created REAL NOT NULL,
            expires REAL NOT NULL,
            started REAL,
            finalizing REAL,
            finished REAL,
            cancelling REAL,
            output TEXT NOT NULL,
            errors TEXT NOT NULL,
            total INTEGER NOT NULL,
            completed INTEGER NOT NULL,
            failed INTEGER NOT NULL)"""
    )
    connection.execute("CREATE INDEX batches_status ON batches (status)")
    connection.execute(
        """CREATE TABLE batch_lines (
            batch INTEGER NOT NULL REFERENCES batches (seq) ON DELETE CASCADE,
            line INTEGER NOT NULL,
            start INTEGER NOT NULL,
            size INTEGER NOT NULL,
            custom_id TEXT NOT NULL,
            status INTEGER NOT NULL,
            result TEXT NOT NULL,
            PRIMARY KEY (batch, line)) WITHOUT ROWID"""
    )
    connection.execute("CREATE INDEX batch_lines_status ON batch_lines (batch, status, line)")


def _keep_prompt_logprobs(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE answers ADD COLUMN prompt TEXT NOT NULL DEFAULT '[]'")


# by the version they lead to
MIGRATIONS: Mapping[int, Callable[[sqlite3.Connection], None]] = {
    1: _create, 2: _name_documents, 3: _keep_attention, 4: _keep_parts, 5: _summarize, 6: _describe_documents,
    7: _account_before, 8: _name_owners, 9: _keep_batches, 10: _keep_prompt_logprobs,
}  # fmt: skip
VERSION = max(MIGRATIONS)


def shown_question(question: str) -> str:
    """Return a question as listings show it: at most MAX_SHOWN characters."""
    return question if len(question) <= MAX_SHOWN else f"{question[: MAX_SHOWN - 1]}…"


def schema_version(connection: sqlite3.Connection, path: Path) -> int:
    """Return the version of a job store, 0 for an empty file; raises JobStoreError for anything else."""
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    if not tables:
        return 0
    query = "SELECT value FROM meta WHERE key = 'schema_version'"
    row = connection.execute(query).fetchone() if "meta" in tables else None
    if row is None:
        raise JobStoreError(f"job store {path}: a database of something else: name another file")
    (version,) = row
    if not isinstance(version, int) or version < 1:
        raise JobStoreError(
            f"job store {path}: schema version {str(version)[:20]!r}: must be from 1 to {VERSION}: "
            "the file is damaged: restore a copy of it, or name another file"
        )
    if version > VERSION:
        raise JobStoreError(
            f"job store {path}: schema version {version}: must be at most {VERSION}: upgrade, or name another file"
        )
    return version


def check_schema(connection: sqlite3.Connection, path: Path, version: int) -> None:
    """Refuse a job store in which a table or column of its version is missing (JobStoreError)."""
    with closing(sqlite3.connect(":memory:")) as model:
        for step in range(1, version + 1):
            MIGRATIONS[step](model)
        wanted, found = _columns(model), _columns(connection)
    if missing := sorted(wanted - found):
        raise JobStoreError(
            f"job store {path}: {'.'.join(missing[0])} is missing: the file is damaged: restore a copy of it, "
            "or name another file"
        )


def _columns(connection: sqlite3.Connection) -> set[tuple[str, str]]:
    """Return the (table, column) pairs of a database."""
    query = "SELECT t.name, c.name FROM sqlite_master AS t, pragma_table_info(t.name) AS c WHERE t.type = 'table'"
    return set(connection.execute(query))
