"""The files of a job store: refused before anything is changed, and watched while it is open."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.common.errors import JobStoreError
from cluster.jobs.sqlite.files import StoreFiles, make_private, remedy


def test_a_new_file_is_private(tmp_path: Path) -> None:
    path = tmp_path / "new" / "jobs.sqlite"
    make_private(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o666)
    make_private(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def read_only_folder(path: Path) -> None:
    path.parent.chmod(0o555)


def read_only_file(path: Path) -> None:
    path.write_text("data")
    path.chmod(0o400)


def read_only_log(path: Path) -> None:
    path.write_text("data")
    log = path.with_name(f"{path.name}-wal")
    log.write_text("log")
    log.chmod(0o444)


def emptied(path: Path) -> None:
    path.touch()
    path.with_name(f"{path.name}-wal").write_text("log")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Path.mkdir, "must be a file"),
        (lambda path: path.symlink_to(path.with_name("nowhere")), "must be a file"),
        (lambda path: path.symlink_to(path), "must be a file"),
        (os.mkfifo, "must be a file"),
        (read_only_folder, "its folder is read-only"),
        (read_only_file, "is read-only"),
        (read_only_log, "-wal: is read-only"),
        (emptied, "0 bytes beside a write-ahead log"),
    ],
)
def test_what_is_refused(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    path = folder / "jobs.sqlite"
    make(path)
    before = sorted((p.name, p.lstat().st_mode, p.lstat().st_size) for p in folder.iterdir())
    with pytest.raises(JobStoreError, match=message):
        make_private(path)
    assert sorted((p.name, p.lstat().st_mode, p.lstat().st_size) for p in folder.iterdir()) == before
    folder.chmod(0o700)


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("x")
    with pytest.raises(OSError, match="data"):
        make_private(tmp_path / "data" / "jobs.sqlite")


@pytest.fixture
def files(tmp_path: Path) -> StoreFiles:
    for suffix in ("", "-wal", "-shm"):
        (tmp_path / f"jobs{suffix}").write_bytes(b"x" * 100)
    return StoreFiles(tmp_path / "jobs")


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm"])
def test_files_that_go_away_or_are_others(files: StoreFiles, tmp_path: Path, suffix: str) -> None:
    files.check()
    path = tmp_path / f"jobs{suffix}"
    path.rename(tmp_path / "away")
    with pytest.raises(sqlite3.OperationalError, match="was removed while in use"):
        files.check()
    path.write_bytes(b"x" * 100)
    with pytest.raises(sqlite3.OperationalError, match="was replaced while in use"):
        files.check()
    (tmp_path / "away").replace(path)
    files.check()


def test_a_file_only_grows(files: StoreFiles, tmp_path: Path) -> None:
    (tmp_path / "jobs").write_bytes(b"x" * 200)
    (tmp_path / "jobs-wal").write_bytes(b"")  # begun anew
    files.check()
    (tmp_path / "jobs").write_bytes(b"x" * 99)
    with pytest.raises(sqlite3.OperationalError, match="was cut off from 100 to 99 bytes"):
        files.check()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("SQLITE_FULL", "free space"), ("SQLITE_BUSY_SNAPSHOT", "another process"), ("SQLITE_NOTADB", "something else"),
        ("SQLITE_CORRUPT_VTAB", "is damaged"), ("SQLITE_READONLY_DBMOVED", "put it back"),
        ("SQLITE_READONLY", "check its disk"), ("SQLITE_IOERR", "check its disk"), ("", "check its disk"),
    ],
)  # fmt: skip
def test_every_error_has_a_way_out(name: str, said: str) -> None:
    assert said in remedy(name)
