"""Folders of dead heads are removed; those of living heads, of other users and of other programs are not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.stages import socket_dirs
from cluster.stages.socket_dirs import OWNER_FILE, clean_run_dirs, make_run_dir
from tests.integration.conftest import CommandLine
from tests.support.rigs.head import HeadProcess, until

LONG_AGO = 3600.0


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A TMPDIR of one test, with a path short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(folder)


def make(parent: Path, name: str, owner: object = None, age_s: float = LONG_AGO, mode: int = 0o700) -> Path:
    folder = parent / f"longreach-{name}"
    folder.mkdir()
    (folder / "stage0.store").write_text("x")
    if owner is not None:
        (folder / OWNER_FILE).write_text(owner if isinstance(owner, str) else json.dumps(owner))
    folder.chmod(mode)
    os.utime(folder, (time.time() - age_s,) * 2)
    return folder


def own(pid: int, offset_s: float = 0.0) -> dict[str, float]:
    return {"pid": pid, "started": psutil.Process(pid).create_time() + offset_s}


def test_a_folder_lives_as_long_as_its_owner(parent: Path) -> None:
    assert make_run_dir().parent == parent
    owner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    folder = make(parent, "other", own(owner.pid))
    assert clean_run_dirs() == []
    owner.kill()
    owner.wait()
    assert clean_run_dirs() == [folder]
    assert len(list(parent.iterdir())) == 1


def test_a_pid_that_was_given_to_another_process(parent: Path) -> None:
    folder = make(parent, "reused", own(os.getpid(), -100.0))
    assert clean_run_dirs() == [folder]


def test_what_is_never_removed(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    dead = own(gone.pid)
    gone.wait()
    make(parent, "shared", dead, mode=0o777)
    make(parent, "broken", "{")
    make(parent, "wrong", {"pid": "x"})
    make(parent, "young", age_s=1.0)
    (make(parent, "program", dead) / "thesis.txt").write_text("years of work")
    elsewhere = parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / OWNER_FILE).write_text(json.dumps(dead))
    (parent / "longreach-link").symlink_to(elsewhere)
    (parent / "longreach-file").write_text("")
    before = sorted(parent.rglob("*"))
    assert clean_run_dirs() == []
    assert sorted(parent.rglob("*")) == before
    stranger = make(parent, "stranger", dead)
    monkeypatch.setattr(socket_dirs.os, "getuid", lambda: os.geteuid() + 1)
    assert clean_run_dirs() == []
    monkeypatch.undo()
    assert clean_run_dirs(parent) == [stranger]


def test_without_an_owner_the_sockets_decide(parent: Path) -> None:
    living, dead = make(parent, "living"), make(parent, "dead")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as left:
        listener.bind(str(living / "s0r0.sock"))
        listener.listen()
        left.bind(str(dead / "s0r0.sock"))
        left.listen()
        left.close()
        for folder in (living, dead):
            os.utime(folder, (time.time() - LONG_AGO,) * 2)
        assert clean_run_dirs() == [dead]
    os.utime(living, (time.time() - LONG_AGO,) * 2)
    assert clean_run_dirs() == [living]


@pytest.mark.parametrize("verb", ["down", "run", "serve"])
def test_verbs_clean_up(longreach: CommandLine, write_config: Callable[..., Path], parent: Path, verb: str) -> None:
    folder = make(parent, "dead", own(os.getpid(), -100.0))
    arguments = ["--token-ids", "/nowhere"] if verb == "run" else []
    longreach(verb, write_config(), *arguments)  # `run` and `serve` fail for other reasons
    assert not folder.exists()


def test_a_killed_head_leaves_nothing_after_the_next_start(parent: Path, tmp_path: Path) -> None:
    head = HeadProcess(tmp_path)
    try:
        head.start()
        (folder,) = parent.glob("longreach-*")
        head.kill()
        assert folder.exists()
        os.utime(folder, (time.time() - LONG_AGO,) * 2)  # without an owner, a while must have passed
        head.start()
        until(lambda: not folder.exists(), "the dead head's folder is gone")
        head.terminate()
        head.process.wait(60)
        assert not list(parent.glob("longreach-*"))
    finally:
        head.close()
