"""Who owns a data directory, and the files of its head."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from cluster.client.connection import read_state
from cluster.client.errors import Unavailable
from cluster.common.errors import PreflightError
from cluster.server import state_files
from cluster.server.state_files import HeadFiles, HeadRunning, is_head, reachable
from tests.support.paths import ROOT

CLAIM = """
import sys, time
from pathlib import Path
from cluster.server.state_files import HeadFiles
files = HeadFiles(Path(sys.argv[-1]))
files.claim()
files.announce("127.0.0.1:77")
print("claimed", flush=True)
time.sleep(60)
"""
SERVE = ["longreach", "serve"]  # what makes a process a head by its command line


@contextmanager
def owner(data: Path, words: list[str] = SERVE) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that has claimed a data directory; it is left for the caller to kill, or killed at the end."""
    process = subprocess.Popen([sys.executable, "-c", CLAIM, *words, data], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"claimed\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("command", "ours"),
    [
        (["python", "-m", "cluster.cli", "serve", "c.yaml"], True),
        (["/venv/bin/python", "/venv/bin/longreach", "serve", "c.yaml"], True),
        (["longreach", "up", "c.yaml"], False),
        (["vim", "serve", "cluster.cli"], False),
        (["python", "-m", "http.server"], False),
        ([], False),
    ],
)
def test_command_lines_of_a_head(command: list[str], ours: bool) -> None:
    assert is_head(command) == ours


def test_head_files(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        files = HeadFiles(tmp_path / "new")
        assert files.running() is None
        assert not files.remove_stale()
        files.claim()
        files.announce("[::]:77")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (files.data_dir, *files.data_dir.iterdir())}
    assert modes == {"new": 0o700, "head.json": 0o600, "head.pid": 0o600}
    assert read_state(files.data_dir)["address"] == "[::1]:77"
    files.release()
    files.release()
    assert not list(files.data_dir.iterdir())
    assert reachable("10.0.0.1:7") == "10.0.0.1:7"


def test_one_process_owns_a_data_directory_whatever_the_times_say(tmp_path: Path) -> None:
    with owner(tmp_path) as other:
        for offset in (-1e6, 1e6):
            for path in tmp_path.iterdir():
                os.utime(path, (time.time() + offset,) * 2)
            found = HeadFiles(tmp_path).running()
            assert found is not None
            assert found.pid == other.pid
        with pytest.raises(HeadRunning, match=rf"\(pid {other.pid}\)"):
            HeadFiles(tmp_path).claim()
        assert not HeadFiles(tmp_path).remove_stale()
        assert read_state(tmp_path)["pid"] == other.pid
        (tmp_path / "head.pid").unlink()  # as people do who think that it is in the way
        with pytest.raises(HeadRunning, match="starting or stopping"):
            HeadFiles(tmp_path).claim()
        (tmp_path / "head.pid").write_text(f"{other.pid}\n")

        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # a zombie now, as in a container without an init
        assert HeadFiles(tmp_path).running() is None
        with pytest.raises(Unavailable, match="no longer runs"):
            read_state(tmp_path)
        files = HeadFiles(tmp_path)
        files.claim()
        assert (tmp_path / "head.pid").read_text() == f"{os.getpid()}\n"
        assert not (tmp_path / "head.json").exists()
        files.release()


def test_two_paths_are_one_data_directory(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    files = HeadFiles(tmp_path / "data")
    files.claim()
    with pytest.raises(HeadRunning):
        HeadFiles(tmp_path / "link").claim()
    files.release()


@pytest.mark.parametrize("pid", [0, 1, 10**9, "nonsense"])
def test_a_pid_that_is_not_the_owner_is_never_stopped(tmp_path: Path, pid: object) -> None:
    """The file is older than the lock, or the head is in another container."""
    with owner(tmp_path, []):
        (tmp_path / "head.pid").write_text(f"{pid}\n")
        with pytest.raises(HeadRunning, match="cannot be seen from here"):
            HeadFiles(tmp_path).running()


def test_stale_files_of_any_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the lock it does not matter whose pid the file names."""
    monkeypatch.setattr(state_files, "is_head", lambda command: True)
    for pid in (psutil.Process().pid, 10**9, "nonsense", -1):
        (tmp_path / "head.pid").write_text(f"{pid}\n")
        assert HeadFiles(tmp_path).running() is None
        assert HeadFiles(tmp_path).remove_stale()
        assert not HeadFiles(tmp_path).remove_stale()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF, errno.ENOSYS])
def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / "head.pid").write_text("1\n")
    for step in (HeadFiles(tmp_path).claim, HeadFiles(tmp_path).running, HeadFiles(tmp_path).remove_stale):
        with pytest.raises(PreflightError, match=r"^data_dir: .*: cannot be locked \(.*\): must be a folder"):
            step()
    assert (tmp_path / "head.pid").exists()


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PreflightError, match=r"^data_dir: .*file: cannot be locked"):
        HeadFiles(tmp_path / "file").claim()

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    files = HeadFiles(tmp_path)
    with pytest.raises(PreflightError, match=r"head\.pid cannot be written \(No space left on device\)"):
        files.claim()
    assert files.running() is None


def test_a_state_file_that_others_can_write_is_not_believed(tmp_path: Path) -> None:
    files = HeadFiles(tmp_path)
    files.claim()
    files.announce("127.0.0.1:77")
    for mode in (0o620, 0o602, 0o666):
        (tmp_path / "head.json").chmod(mode)
        with pytest.raises(Unavailable, match="others can write to it"):
            read_state(tmp_path)
    files.release()
