"""Versions of the schema: what is refused, and what a listing of old jobs shows."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from cluster.common.errors import JobStoreError
from cluster.jobs.model import DocumentRecord, JobInput, JobSpec
from cluster.jobs.sqlite.migrations import MAX_SHOWN, MIGRATIONS, VERSION, check_schema, schema_version, shown_question
from cluster.jobs.store import JobStore
from cluster.jobs.tenants.tenant import Tenant
from protos.jobs.sampling import AnswerOptions

PATH = Path("jobs.sqlite")


def at(version: int) -> sqlite3.Connection:
    db = sqlite3.connect(":memory:", isolation_level=None)
    for step in range(1, version + 1):
        MIGRATIONS[step](db)
    return db


@pytest.mark.parametrize("version", range(1, VERSION + 1))
def test_every_version_is_recognised(version: int) -> None:
    db = at(version)
    with pytest.raises(JobStoreError, match="something else"):
        schema_version(db, PATH)
    db.execute("INSERT INTO meta VALUES ('schema_version', ?)", (version,))
    assert schema_version(db, PATH) == version
    check_schema(db, PATH, version)
    if version < VERSION:
        with pytest.raises(JobStoreError, match="is missing: the file is damaged"):
            check_schema(db, PATH, VERSION)
    assert schema_version(sqlite3.connect(":memory:"), PATH) == 0


@pytest.mark.parametrize("value", ["'five'", "-1", "0", "2.5", "x'01'", "99999999999"])
def test_versions_that_are_none(value: str) -> None:
    db = at(1)
    db.execute(f"INSERT INTO meta VALUES ('schema_version', {value})")
    with pytest.raises(JobStoreError, match="schema version") as caught:
        schema_version(db, PATH)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "table",
    ["jobs", "specs", "answers", "tokens", "labels", "documents", "summaries", "document_kv", "batches", "batch_lines"],
)
def test_a_missing_table(table: str) -> None:
    db = at(VERSION)
    db.execute(f"DROP TABLE {table}")
    with pytest.raises(JobStoreError, match=f"{table}.*is missing"):
        check_schema(db, PATH, VERSION)


@pytest.mark.parametrize("version", range(1, VERSION))
def test_jobs_of_every_version_are_listed(tmp_path: Path, version: int) -> None:
    """Good jobs as they were; damaged ones survive, and say so."""
    path = tmp_path / "jobs.sqlite"
    old = sqlite3.connect(path, isolation_level=None)
    written = min(version, 4)  # later ones keep a summary beside the spec
    for step in range(1, written + 1):
        MIGRATIONS[step](old)
    old.execute("INSERT INTO meta VALUES ('schema_version', ?)", (version,))
    old.execute("INSERT INTO documents VALUES (?, 'd', 3, 1.0, 2e12)", ("doc_" + "0" * 32,))
    questions = ("Who?", "é" * (MAX_SHOWN - 1), "é" * MAX_SHOWN, "é" * (MAX_SHOWN + 1))
    given = JobInput(document_id="doc_" + "0" * 32, questions=questions)
    good = JobSpec(given, AnswerOptions(), priority=-4, labels={"a": "b"}).to_json()
    document = given.document_id if version > 1 else None
    for seq, spec in enumerate([good, good[:50], '{"input": 3}', b"\xff\xfe"], 1):
        columns = "seq, id, state, body_hash, num_answers, created" + (", document_id" if version > 1 else "")
        values = [seq, f"job_{seq:032x}", "succeeded", "h", 4, 1.0, *([document] if version > 1 else [])]
        old.execute(f"INSERT INTO jobs ({columns}) VALUES ({', '.join('?' * len(values))})", values)
        old.execute('INSERT INTO specs VALUES (?, ?, \'{"model": "m"}\')', (seq, spec))
        old.execute("INSERT INTO labels VALUES (?, 'a', 'b')", (seq,))
    for step in range(written + 1, version + 1):
        MIGRATIONS[step](old)
    old.close()
    store = JobStore(path)
    records = {record.id: record for record in store.list_jobs()[0]}
    assert len(records) == 4
    shown = records[f"job_{1:032x}"]
    assert shown.spec.input.questions == tuple(map(shown_question, questions))
    assert [len(question) for question in shown.spec.input.questions] == [4, MAX_SHOWN - 1, MAX_SHOWN, MAX_SHOWN]
    assert (shown.spec.priority, shown.spec.labels, shown.reproducibility) == (-4, {"a": "b"}, {"model": "m"})
    assert shown.damage == ""
    assert store.list_documents() == [DocumentRecord("doc_" + "0" * 32, "d", 3, 1.0, 2e12, used=1.0)]
    for seq in (2, 3, 4):
        record = store.get(f"job_{seq:032x}")
        assert record is not None
        assert record.damage
    store.close()


def test_what_was_there_before_tenants_is_nobodys(tmp_path: Path) -> None:
    """Its idempotency key holds for who has no key; no name sees it."""
    path = tmp_path / "jobs.sqlite"
    old = sqlite3.connect(path, isolation_level=None)
    for step in range(1, 8):
        MIGRATIONS[step](old)
    old.execute("INSERT INTO meta VALUES ('schema_version', 7)")
    spec = JobSpec(JobInput(prompt="a"), AnswerOptions(), idempotency_key="once")
    columns = "(id, state, body_hash, num_answers, created, idempotency_key)"
    old.execute(
        f"INSERT INTO jobs {columns} VALUES (?, 'queued', ?, 1, 1.0, 'once')", (f"job_{1:032x}", spec.body_hash())
    )
    old.execute("INSERT INTO specs VALUES (1, ?, '{}')", (spec.to_json(),))
    old.execute("INSERT INTO summaries VALUES (1, 0, '[]', '{}')")
    old.close()
    store = JobStore(path)
    known, is_new = store.create(spec, f"job_{2:032x}", 1, {})
    assert (known.id, known.owner, is_new) == (f"job_{1:032x}", "", False)
    assert store.create(spec, f"job_{2:032x}", 1, {}, tenant=Tenant("law"))[1]
    assert [record.id for record in store.list_jobs(owner="law")[0]] == [f"job_{2:032x}"]
    assert len(store.list_jobs()[0]) == 2
    store.close()
