"""A real local Ray: who can reach it, what watches it, and what is left of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.bench.head_process import marking
from tests.integration.conftest import CommandLine
from tests.support.paths import ROOT
from tests.support.rigs.head import until

# A program that uses a RayCluster and says on each line of its input what came of it.
PROGRAM = """
import json, logging, os, signal, sys, threading
from cluster.stages.ray_cluster import RayCluster
logging.disable()
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # Ray prints what becomes of it
class Actor:
    def __init__(self):
        import os
        self.secret = os.environ.get("RAY_AUTH_TOKEN")
    def ask(self):
        import os
        return [os.getpid(), os.umask(0o077), self.secret]
cluster, lost = RayCluster("local"), []
def connect():
    cluster.connect()
    ((actor,),) = cluster.place(Actor, 1, 1, 0.1, 0.0)
    cluster.watch(lost.append)
    return cluster.call([actor.ask.remote()], 60)[0]
def settings():
    return {k: v for k, v in os.environ.items() if k.startswith("RAY_") and k != "RAY_CLIENT_MODE"}
steps = {"connect": connect, "release": cluster.release, "close": cluster.close, "lost": lambda: lost,
         "settings": settings}
for line in sys.stdin:
    print(json.dumps(steps[line.strip()]()), file=out, flush=True)
"""


class Program:
    """That program in a process of its own, whose parent is init if `orphan`, as that of a head of `up` is."""

    def __init__(self, line: CommandLine, folder: Path, orphan: bool = False) -> None:
        home = folder / "home"
        home.mkdir(mode=0o500)
        environment = os.environ | {"HOME": str(home), "TMPDIR": str(folder)} | marking(line.mark)
        command = [sys.executable, "-c", PROGRAM]
        if orphan:
            command = ["sh", "-c", 'exec 3<&0; "$@" <&3 & exit 0', "sh", *command]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._line = line

    def __call__(self, step: str) -> object:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(step + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline() or '"it has ended"')

    def daemon(self, name: str) -> psutil.Process:
        return next(p for p in self._line.processes() if any(Path(word).name == name for word in p.cmdline()[:3]))


@pytest.fixture
def folder() -> Iterator[Path]:
    """A TMPDIR, short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp", ignore_cleanup_errors=True) as made:
        yield Path(made)


def test_it_is_private_and_leaves_nothing(longreach: CommandLine, folder: Path) -> None:
    program = Program(longreach, folder)
    answer = program("connect")
    assert isinstance(answer, list)
    _, umask, secret = answer
    assert umask == 0o077
    assert len(secret) == 64
    assert program("settings") == {}, "the environment of the program is as it was"
    listening = {c.laddr.ip for p in longreach.processes() for c in p.net_connections() if c.status == "LISTEN"}
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1"}
    assert listening
    (made,) = folder.glob("longreach-*")
    assert made.stat().st_mode & 0o777 == 0o700
    folders = [path for path in made.rglob("*") if path.is_dir() and not path.is_symlink()]
    assert {path.name for path in folders} >= {"ray", "logs", "sockets"}
    assert [path for path in folders if path.stat().st_mode & 0o077] == [], "Ray opens its folders to everybody"
    assert secret not in "".join(path.read_text(errors="replace") for path in made.rglob("*.log"))
    assert list((folder / "home").iterdir()) == []
    assert program("close") is None
    until(lambda: len(longreach.processes()) == 1, "only the program is left", 10.0)
    assert {path.name for path in folder.iterdir()} == {"home"}
    program.process.communicate(timeout=30)


@pytest.mark.parametrize(("victim", "orphan"), [("gcs_server", True), ("raylet", True), ("ray_owner.py", False)])
def test_a_ray_that_dies_is_noticed_and_replaced(
    longreach: CommandLine, folder: Path, victim: str, orphan: bool
) -> None:
    program = Program(longreach, folder, orphan)
    before = program("connect")
    program.daemon(victim).kill()
    until(lambda: program("lost"), "the loss is told", 5.0)
    reason = {"gcs_server": "gcs_server ended (signal 9)", "raylet": "raylet ended (signal 9)"}
    assert reason.get(victim, "the process that owns Ray has ended") in str(program("lost"))
    until(lambda: len(longreach.processes()) == 1, "all of that Ray is gone", 10.0)
    after = program("connect")
    assert isinstance(after, list)
    assert after != before
    assert program("close") is None
    program.process.communicate(timeout=30)
    longreach.assert_nothing_left(5.0)
    assert {path.name for path in folder.iterdir()} == {"home"}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_its_program(longreach: CommandLine, folder: Path, how: signal.Signals) -> None:
    program = Program(longreach, folder)
    program("connect")
    program.process.send_signal(how)
    program.process.wait()
    longreach.assert_nothing_left(5.0)
    assert {path.name for path in folder.iterdir()} == {"home"}
