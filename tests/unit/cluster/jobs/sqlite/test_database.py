"""The file of the job store: private, upgraded, refused, full; readers beside the writer; death in mid-commit."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.common.errors import JobStoreError
from cluster.engine.outputs import OutputToken
from cluster.jobs.model import JobInput, JobSpec, JobState, NotAllowedNow, new_id
from cluster.jobs.sqlite import database as database_module
from cluster.jobs.sqlite.migrations import MIGRATIONS, VERSION
from cluster.jobs.store import JobStore
from protos.jobs.sampling import AnswerOptions
from protos.stage.messages import TokenLogprob
from tests.support.paths import ROOT
from tests.unit.cluster.jobs.test_store import DOCUMENT, PLAIN, commit, submit, tokens


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "jobs.db"


@pytest.fixture
def store(path: Path) -> Iterator[JobStore]:
    store = JobStore(path)
    yield store
    store.close()


def test_a_long_read_does_not_delay_commits(store: JobStore) -> None:
    job_id = submit(store)
    commit(store, job_id, tokens(1, 5))
    with store._db.reading() as reader:
        rows = reader.execute("SELECT number FROM tokens ORDER BY number")
        assert next(rows) == (1,)
        writer = threading.Thread(target=commit, args=(store, job_id, tokens(6, 5)))
        writer.start()
        writer.join(5)
        assert not writer.is_alive()
        assert store.get(job_id).last_event == 10  # type: ignore[union-attr]
        assert len(rows.fetchall()) == 4, "a read sees one moment"


def test_get_reads_no_tokens(store: JobStore) -> None:
    job_id = submit(store)
    commit(store, job_id, tokens(1, 5))
    read: set[str | None] = set()

    def authorize(action: int, table: str | None, *_: object) -> int:
        read.add(table if action == sqlite3.SQLITE_READ else None)
        return sqlite3.SQLITE_OK

    with store._db.reading() as reader:
        reader.set_authorizer(authorize)
    assert store.get(job_id) is not None
    assert read >= {"jobs", "specs", "answers"}
    assert "tokens" not in read


def test_files_are_private(store: JobStore, path: Path) -> None:
    submit(store)
    assert {p.name: p.stat().st_mode & 0o777 for p in path.parent.iterdir()} == {
        "jobs.db": 0o600, "jobs.db-wal": 0o600, "jobs.db-shm": 0o600, "jobs.db.commits": 0o600
    }  # fmt: skip
    store.close()
    store.close()
    path.chmod(0o644)
    JobStore(path).close()
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(JobStoreError, match="is closed"):
        store.get(new_id("job"))


def test_an_old_file_is_upgraded(path: Path) -> None:
    path.parent.mkdir()
    old = sqlite3.connect(path, isolation_level=None)
    MIGRATIONS[1](old)
    old.execute("INSERT INTO meta VALUES ('schema_version', 1)")
    old.execute("INSERT INTO documents VALUES (?, ?, ?, ?, ?)", (DOCUMENT.id, "d", 1, 1.0, 2.0))
    specs = [JobSpec(JobInput(document_id=DOCUMENT.id, questions=("?",)), AnswerOptions()), PLAIN]
    for seq, spec in enumerate(specs, 1):
        values = (seq, f"job_{seq:032x}", "queued", spec.body_hash())
        columns = "seq, id, state, body_hash, num_answers, created"
        old.execute(f"INSERT INTO jobs ({columns}) VALUES (?, ?, ?, ?, 1, 1)", values)
        old.execute("INSERT INTO specs VALUES (?, ?, '{}')", (seq, spec.to_json()))
        old.execute("INSERT INTO answers (job, question) VALUES (?, 0)", (seq,))
    old.close()
    for _ in range(2):  # the second time there is nothing to do
        store = JobStore(path)
        assert [record.spec for record in store.unfinished()] == specs
        with pytest.raises(NotAllowedNow):
            store.delete_document(DOCUMENT.id)
        with store._db.reading() as db:
            assert db.execute("SELECT document_id FROM jobs ORDER BY seq").fetchall() == [(DOCUMENT.id,), (None,)]
            query = "SELECT value FROM meta WHERE key = 'schema_version'"
            assert db.execute(query).fetchall() == [(VERSION,)]
        store.close()


def test_tokens_of_an_old_file_are_split_once(path: Path) -> None:
    """A file of version 3: an ended job and one to be resumed, with two answers, one of which began as reasoning."""
    path.parent.mkdir()
    old = sqlite3.connect(path, isolation_level=None)
    for version in (1, 2, 3):
        MIGRATIONS[version](old)
    old.execute("INSERT INTO meta VALUES ('schema_version', 3)")
    specs = [replace(PLAIN, priority=1), replace(PLAIN, priority=2), PLAIN]
    texts = [
        [(0, "<think>why"), (1, "yes"), (0, " not</thi"), (0, "nk>"), (1, "."), (0, "\n\nso")],
        [(0, "why"), (0, " \n</think>"), (0, "so")],
        [],
    ]
    for seq, (spec, state, rows) in enumerate(zip(specs, ("succeeded", "decoding", "queued"), texts, strict=True), 1):
        columns = "seq, id, state, body_hash, num_answers, created, last_event"
        values = (seq, f"job_{seq:032x}", state, spec.body_hash(), len(rows))
        old.execute(f"INSERT INTO jobs ({columns}) VALUES (?, ?, ?, ?, 2, 1, ?)", values)
        old.execute("INSERT INTO specs VALUES (?, ?, '{}')", (seq, spec.to_json()))
        old.executemany(
            "INSERT INTO tokens (job, number, question, token_id, text, logprob, top) VALUES (?, ?, ?, 9, ?, -0.5, ?)",
            [(seq, number, question, text, "[[9, -0.5]]") for number, (question, text) in enumerate(rows, 1)],
        )
    old.close()
    asked: list[tuple[int, int]] = []

    def opened(spec: JobSpec, question: int) -> bool:
        asked.append((spec.priority, question))
        return spec.priority == 2

    for _ in range(2):  # the second time there is nothing to do
        store = JobStore(path)
        store.split_old_tokens(opened)
        first, second = (store.tokens(f"job_{seq:032x}") for seq in (1, 2))
        assert [(t.question, t.text) for t in first] == texts[0]
        assert [(t.part, t.reasoning, t.answer) for t in first] == [
            ("reasoning", "why", ""), ("answer", "", "yes"), ("reasoning", " not", ""), ("answer", "", ""),
            ("answer", "", "."), ("answer", "", "so"),
        ]  # fmt: skip
        assert [(t.part, t.reasoning, t.answer) for t in second] == [
            ("reasoning", "why", ""), ("answer", "", ""), ("answer", "", "so"),
        ]  # fmt: skip
        assert {(t.logprob, t.top) for t in first + second} == {(-0.5, (TokenLogprob(9, -0.5),))}
        assert asked == [(1, 0), (1, 1), (2, 0)], "jobs without tokens of that time are not looked at"
        store.close()
    store = JobStore(path)
    commit(store, f"job_{2:032x}", [OutputToken(4, 0, 9, "!", answer="!")])
    store.split_old_tokens(opened)
    assert [token.answer for token in store.tokens(f"job_{2:032x}")] == ["", "", "so", "!"]
    assert len(asked) == 3
    store.close()


def changed(statement: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        store = JobStore(path)
        for _ in range(30):
            submit(store, replace(PLAIN, input=JobInput(token_ids=(7,) * 2000)))
        store.close()
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute(statement)

    return change


def foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE photos (id)")


def foreign_with_meta(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("CREATE TABLE meta (name, value)")
        db.execute("INSERT INTO meta VALUES ('schema_version', 1)")


def cut(path: Path) -> None:
    changed("SELECT 1")(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def smash(path: Path) -> None:
    changed("SELECT 1")(path)
    with path.open("r+b") as file:
        file.seek(3 * 4096)
        file.write(b"\xa5" * 4096 * 5)


def smash_header(path: Path) -> None:
    changed("SELECT 1")(path)
    with path.open("r+b") as file:
        file.write(b"\0" * 100)


VERSION_IS = "UPDATE meta SET value = {} WHERE key = 'schema_version'"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (changed(VERSION_IS.format(VERSION + 1)), f"schema version {VERSION + 1}: must be at most {VERSION}: upgrade"),
        (changed(VERSION_IS.format("'new'")), "schema version 'new'"),
        (changed(VERSION_IS.format(-1)), "schema version '-1'"),
        (changed("DELETE FROM meta"), "a database of something else"),
        (changed("DROP TABLE meta"), "a database of something else"),
        (changed("DROP TABLE tokens"), "tokens.* is missing"),
        (changed("ALTER TABLE jobs DROP COLUMN restarts"), "jobs.restarts is missing"),
        (foreign, "a database of something else"),
        (foreign_with_meta, "no such column: key"),
        (cut, "damaged: restore a copy"),
        (smash, "damaged: restore a copy"),
        (smash_header, "not a database.*restore a copy"),
        (lambda path: path.write_text("x" * 5000), "not a database"),
        (lambda path: path.mkdir(), "must be a file"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "jobs.db"
    make(path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(JobStoreError, match=message) as caught:
        JobStore(path)
    assert "\n" not in str(caught.value)
    assert (path.read_bytes() if path.is_file() else b"") == before


def test_a_refused_file_keeps_its_log(path: Path) -> None:
    """A head of a later version was killed: its log is not taken up, and not removed."""
    store = JobStore(path)
    with store._db.writing() as db:
        db.execute(VERSION_IS.format(VERSION + 1))
    newer = path.with_name("newer.db")
    for suffix in ("", "-wal"):
        shutil.copy(f"{path}{suffix}", f"{newer}{suffix}")
    store.close()
    before = [Path(f"{newer}{suffix}").read_bytes() for suffix in ("", "-wal")]
    with pytest.raises(JobStoreError, match="must be at most"):
        JobStore(newer)
    assert [Path(f"{newer}{suffix}").read_bytes() for suffix in ("", "-wal")] == before


def test_a_file_that_a_killed_head_had_just_made(path: Path) -> None:
    """It has a rollback journal yet, which must be played back before anybody can read."""
    path.parent.mkdir()
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA cache_size = 1")
        db.execute("CREATE TABLE passing (a)")
        db.execute("DROP TABLE passing")
        db.execute("BEGIN IMMEDIATE")
        db.execute("CREATE TABLE half (a)")
        db.executemany("INSERT INTO half VALUES (?)", [("x" * 100,)] * 2000)
        killed = path.with_name("killed.db")
        for suffix in ("", "-journal"):
            shutil.copy(f"{path}{suffix}", f"{killed}{suffix}")
    store = JobStore(killed)
    submit(store)
    store.close()
    assert not Path(f"{killed}-journal").exists()


def test_a_row_that_no_column_allows_refuses_nothing(path: Path) -> None:
    path.parent.mkdir()
    changed("SELECT 1")(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_master SET sql = replace(sql, 'state TEXT NOT NULL', 'state TEXT')")
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE jobs SET state = NULL WHERE seq = 1")
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_master SET sql = replace(sql, 'state TEXT', 'state TEXT NOT NULL')")
    store = JobStore(path)
    damages = [bool(record.damage) for record in store.unfinished()]
    assert damages == [True] + [False] * 29
    store.close()


def test_a_locked_file_is_refused_at_the_start(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "_BUSY_TIMEOUT_S", 0.2)
    JobStore(path).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(JobStoreError, match="locked: another process uses it"):
            JobStore(path)
    JobStore(path).close()


def test_a_large_file_is_not_read_as_a_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "_VERIFY_S", -1.0)
    path.parent.mkdir()
    changed("SELECT 1")(path)
    store = JobStore(path)
    for _ in range(30):
        for _ in range(100):
            submit(store)
    store.close()
    JobStore(path).close()


def test_a_log_is_checkpointed(store: JobStore, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = path.with_name("jobs.db-wal")
    with store._db.reading() as reader:  # one that lasts starves the checkpoint
        reader.execute("SELECT count(*) FROM jobs").fetchone()
        for _ in range(20):
            submit(store, replace(PLAIN, input=JobInput(token_ids=(7,) * 2000)))
        store._db.checkpoint()
    size = log.stat().st_size
    assert size > 100_000
    monkeypatch.setattr(database_module, "_WAL_LIMIT_BYTES", size - 1)
    store.expire(0.0, 1.0)  # what a head calls every minute
    assert log.stat().st_size == 0
    copy = path.with_name("copy.db")
    shutil.copy(path, copy)
    with closing(sqlite3.connect(copy)) as db:
        assert db.execute("SELECT count(*) FROM jobs").fetchone() == (20,)


def test_a_full_disk_is_one_error_and_no_loss(store: JobStore) -> None:
    job_id = submit(store)
    commit(store, job_id, tokens(1, 2))
    store._db._writer.execute("PRAGMA max_page_count = 1")  # SQLite answers as for a full disk
    with pytest.raises(JobStoreError, match="full: free space"):
        commit(store, job_id, [replace(token, text="x" * 9000) for token in tokens(3, 20)])
    store._db._writer.execute("PRAGMA max_page_count = 100000")
    assert len(store.tokens(job_id)) == store.get(job_id).last_event == 2  # type: ignore[union-attr]
    commit(store, job_id, tokens(3, 20))
    assert len(store.tokens(job_id)) == 22


WRITER = """
import sys
from pathlib import Path
from cluster.jobs.store import JobStore
from cluster.jobs.model import ACTIVE, JobAnswer, JobInput, JobSpec, JobState, new_id
from cluster.engine.outputs import OutputToken
from protos.jobs.sampling import AnswerOptions

store = JobStore(Path(sys.argv[1]))
jobs = [record.id for record in store.unfinished()]
while len(jobs) < 4:
    jobs.append(store.create(JobSpec(JobInput(prompt="p"), AnswerOptions()), new_id("job"), 1, {})[0].id)
last = [store.get(job).last_event for job in jobs]
while True:
    step = [(job, OutputToken(n + k, 0, k, "word " * 200)) for job, n in zip(jobs, last) for k in (1, 2, 3, 4)]
    last = [n + 4 for n in last]
    answers = [(job, JobAnswer(0, text=str(n))) for job, n in zip(jobs, last)]
    store.commit_step(step, [(job, ACTIVE, JobState.DECODING) for job in jobs], answers)
    print(last[0], flush=True)
"""


def test_death_in_the_middle_of_commits(path: Path) -> None:
    acknowledged = 0
    for kills in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert writer.stdout is not None
        for _ in range(60 + 37 * kills):
            acknowledged = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)  # it commits all the time, so this is almost always inside a commit
        rest = writer.stdout.read().split("\n")[:-1]  # whole lines that were still in the pipe
        acknowledged = int(rest[-1]) if rest else acknowledged
        assert writer.wait(10) == -signal.SIGKILL
        store = JobStore(path)
        records = list(store.unfinished())
        assert len(records) == 4
        assert len({record.last_event for record in records}) == 1, "a step is whole or absent"
        for record in records:
            assert record.last_event in (acknowledged, acknowledged + 4)
            numbers = [token.number for token in store.tokens(record.id, limit=1 << 40)]
            assert numbers == list(range(1, record.last_event + 1))
            assert (record.answers[0].text, record.state) == (str(record.last_event), JobState.DECODING)
        with store._db.reading() as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert db.execute("PRAGMA foreign_key_check").fetchall() == []
        store.close()
