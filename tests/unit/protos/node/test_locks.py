"""Locks on folders: who excludes whom, and how long a lock lives."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from protos.node.locks import hold_folder, is_locked, lock_folder

HOLD = """
import sys, time
from pathlib import Path
from protos.node.locks import lock_folder
assert lock_folder(Path(sys.argv[1])) is not None
print("held", flush=True)
time.sleep(60)
"""


def test_one_alone_or_many_together(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    alone = lock_folder(tmp_path)
    assert alone is not None
    assert is_locked(tmp_path)
    assert lock_folder(tmp_path) is None
    assert lock_folder(tmp_path, shared=True) is None
    os.close(alone)
    shared = [lock_folder(tmp_path, shared=True) for _ in range(3)]
    assert None not in shared
    assert lock_folder(tmp_path) is None
    assert not is_locked(tmp_path)
    for descriptor in shared:
        assert descriptor is not None
        os.close(descriptor)


def test_a_lock_ends_with_its_process_even_before_that_is_reaped(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    assert is_locked(tmp_path)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is a zombie
    assert not is_locked(tmp_path)
    process.wait()


def test_programs_inherit_no_lock(tmp_path: Path) -> None:
    descriptor = lock_folder(tmp_path)
    assert descriptor is not None
    command = [sys.executable, "-c", "print('here', flush=True); input()"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False)
    assert child.stdout is not None
    assert child.stdout.readline() == b"here\n"
    os.close(descriptor)
    assert not is_locked(tmp_path)
    child.communicate(b"\n")


def test_a_folder_that_is_held_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0)
    try:
        os.close(hold_folder(tmp_path / "a" / "b"))
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    locked: list[int] = []

    def replace(descriptor: int, operation: int) -> None:
        if not locked:
            shutil.rmtree(tmp_path / "c")
            (tmp_path / "c").mkdir()
        locked.append(operation)

    monkeypatch.setattr(fcntl, "flock", replace)
    os.close(hold_folder(tmp_path / "c"))
    assert len(locked) == 2, "the first lock was that of a folder which somebody removed at that moment"
