"""Folders of dead heads are removed; those that somebody uses, of other users and of other programs are not."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.common.errors import PreflightError
from cluster.stages import socket_dirs
from cluster.stages.socket_dirs import RAY_FOLDER, RAY_LOG, clean_run_dirs, make_run_dir
from protos.node.locks import hold_folder
from tests.integration.conftest import CommandLine
from tests.support.paths import ROOT
from tests.support.rigs.head import HeadProcess, until

HOLD = """
import sys, time
from pathlib import Path
from protos.node.locks import hold_folder
hold_folder(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A TMPDIR of one test, with a path short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(folder)


def make(parent: Path, name: str, mode: int = 0o700) -> Path:
    """The folder of a head and of its Ray that were killed."""
    folder = parent / f"longreach-{name}"
    (folder / RAY_FOLDER / "session_1" / "logs").mkdir(parents=True)
    for file in ("stage0.store", "s0r0.sock", RAY_LOG, f"{RAY_FOLDER}/session_1/logs/raylet.out"):
        (folder / file).write_text("x")
    folder.chmod(mode)
    return folder


def test_a_folder_lives_as_long_as_one_of_its_users(parent: Path) -> None:
    made = make_run_dir()
    assert made.path.parent == parent
    assert made.path.stat().st_mode & 0o777 == 0o700
    other = subprocess.Popen([sys.executable, "-c", HOLD, made.path], cwd=ROOT, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    for age in (-1e6, 1e6):  # whatever the clocks say
        os.utime(made.path, (time.time() - age,) * 2)
        assert clean_run_dirs() == []
    os.close(made.lock)  # the one who made it is gone
    assert clean_run_dirs() == []
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # a zombie uses nothing
    assert clean_run_dirs() == [made.path]
    other.wait()
    assert list(parent.iterdir()) == []


def test_a_user_removes_its_folder(parent: Path) -> None:
    made = make_run_dir()
    (made.path / "s0r0.sock").write_text("")
    made.remove()
    assert list(parent.iterdir()) == []


def test_what_is_never_removed(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(parent, "shared", mode=0o777)
    (make(parent, "program") / "thesis.txt").write_text("years of work")
    shutil.move(make(parent, "moved"), parent / "elsewhere")
    (parent / "longreach-link").symlink_to(parent / "elsewhere")
    (parent / "longreach-file").write_text("")
    before = sorted(parent.rglob("*"))
    assert clean_run_dirs() == []
    assert sorted(parent.rglob("*")) == before
    stranger = make(parent, "stranger")
    monkeypatch.setattr(socket_dirs.os, "getuid", lambda: os.geteuid() + 1)
    assert clean_run_dirs() == []
    monkeypatch.undo()
    assert clean_run_dirs(parent) == [stranger]


def test_a_folder_that_is_removed_at_that_moment_is_made_again(parent: Path) -> None:
    folder = make(parent, "dead")
    assert clean_run_dirs() == [folder]
    os.close(hold_folder(folder))  # as a stage does, at its node
    assert folder.is_dir()


def test_folders_that_cannot_be_used_are_refused(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = make(parent, "dead")

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        with pytest.raises(PreflightError, match=r"^TMPDIR: .*No locks available.*local disk$"):
            make_run_dir()
        assert clean_run_dirs() == [], "in doubt it is kept"
    assert left.exists()
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + "x" * 74)
    with pytest.raises(PreflightError, match=r"^TMPDIR: /tmp/x+: too long for Unix sockets: must be at most \d+ bytes"):
        make_run_dir()


@pytest.mark.parametrize("verb", ["down", "run", "serve"])
def test_verbs_clean_up(longreach: CommandLine, write_config: Callable[..., Path], parent: Path, verb: str) -> None:
    folder = make(parent, "dead")
    arguments = ["--token-ids", "/nowhere"] if verb == "run" else []
    longreach(verb, write_config(), *arguments)  # `run` and `serve` fail for other reasons
    assert not folder.exists()


def test_a_killed_head_leaves_nothing(parent: Path, tmp_path: Path) -> None:
    head = HeadProcess(tmp_path)
    try:
        head.start()
        folders = set(parent.glob("longreach-*"))
        assert len(folders) == 2, "of Ray, and of the pipeline"
        assert clean_run_dirs() == [], "a command beside a living head"
        assert not list(parent.glob("ray*")), "Ray's own folder is not used"
        head.kill()
        head.start()
        until(lambda: not folders & set(parent.glob("longreach-*")), "the dead head's folders are gone")
        head.terminate()
        head.process.wait(60)
        assert not list(parent.glob("longreach-*"))
    finally:
        head.close()
