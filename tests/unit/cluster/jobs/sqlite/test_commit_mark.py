"""The mark of commits beside a job store: a lost write-ahead log, an older copy, another database."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from cluster.common.errors import JobStoreError
from cluster.jobs.sqlite.commit_mark import CommitMark
from cluster.jobs.store import JobStore
from tests.support.paths import ROOT

KILLED = """
import os, sys
from pathlib import Path
from cluster.jobs.store import JobStore
from cluster.jobs.model import JobInput, JobSpec, new_id
from protos.jobs.sampling import AnswerOptions

store = JobStore(Path(sys.argv[1]))
for _ in range(10):
    store.create(JobSpec(JobInput(prompt="p"), AnswerOptions()), new_id("job"), 1, {})
os._exit(9)
"""


def test_a_mark_is_compared(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    mark = CommitMark(path)
    assert mark.loss(5, 0) == "", "a new one says nothing"
    mark.set(5, 70)
    mark.close()
    mark.close()
    again = CommitMark(path)
    assert again.loss(5, 70) == again.loss(5, 71) == ""
    assert "its last 3 commits of 70 are lost" in again.loss(5, 67)
    assert "another database" in again.loss(6, 900)
    again.set((1 << 62) - 1, 1 << 60)
    assert "commits" in again.loss((1 << 62) - 1, 7)
    again.close()
    marked = tmp_path / "jobs.sqlite.commits"
    assert stat.S_IMODE(marked.stat().st_mode) == 0o600
    for damaged in (b"", b"\xff" * 30, b"1", b"a b"):
        marked.write_bytes(damaged)
        again = CommitMark(path)
        assert again.loss(5, 0) == ""
        again.close()
    marked.unlink()
    for make in (marked.mkdir, lambda: marked.symlink_to(path)):
        make()
        with pytest.raises(JobStoreError, match="must be a file that we may write"):
            CommitMark(path)
        shutil.rmtree(marked, ignore_errors=True)


def keep(path: Path) -> None:
    pass


def remove(path: Path) -> None:
    path.with_name("jobs.sqlite-wal").unlink()


def truncate(path: Path) -> None:
    log = path.with_name("jobs.sqlite-wal")
    os.truncate(log, log.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path.with_name("jobs.sqlite-wal"), 0)


def smash(path: Path) -> None:
    log = path.with_name("jobs.sqlite-wal")
    with log.open("r+b") as file:
        file.seek(log.stat().st_size // 3)
        file.write(b"\xa5" * 5000)


def start_anew(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(f"jobs.sqlite{suffix}").unlink(missing_ok=True)


def copy_alone(path: Path) -> None:
    shutil.copy(path, path.with_name("copy"))
    start_anew(path)
    path.with_name("copy").rename(path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (keep, ""), (remove, "commits of"), (truncate, "commits of"), (empty, "commits of"), (smash, "commits of"),
        (start_anew, "another database"), (copy_alone, "commits of"),
    ],
)  # fmt: skip
def test_a_lost_log_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], said: str
) -> None:
    path = tmp_path / "jobs.sqlite"
    JobStore(path).close()
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, check=False).returncode == 9
    damage(path)
    store = JobStore(path)
    assert said in store.warning
    assert bool(store.warning) == bool(said)
    assert store.warning in caplog.text
    assert (store.count() == 10) == (not said)
    store.close()
    again = JobStore(path)
    assert again.warning == "", "this head has begun from what there was"
    again.close()


def test_what_was_in_the_log_is_in_the_file_after_a_start(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, check=False).returncode == 9
    store = JobStore(path)
    copy = tmp_path / "copy" / "jobs.sqlite"
    copy.parent.mkdir()
    shutil.copy(path, copy)
    alone = JobStore(copy)
    assert alone.count() == store.count() == 10
    assert alone.warning == ""
    alone.close()
    store.close()


@pytest.mark.parametrize("damage", ["DELETE FROM meta WHERE key <> 'schema_version'", "UPDATE meta SET value = 'x'"])
def test_a_damaged_count_is_said_and_begun_anew(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "jobs.sqlite"
    JobStore(path).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(f"{damage} {'AND' if 'WHERE' in damage else 'WHERE'} key <> 'schema_version'")
    for is_first in (True, False):
        store = JobStore(path)
        assert bool(store.warning) == is_first
        store.close()
