"""Running the command line as a user does, and proving that nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cluster.bench.head_process import marked_processes, marking
from tests.support.fakes.server import FakeHead
from tests.support.paths import ROOT
from tests.support.rigs.stage_processes import Stages

# A shell that starts the tests in the background has them ignore Ctrl-C, and what they start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass
class Finished:
    code: int
    out: str
    err: str
    seconds: float


class CommandLine:
    """Starts `longreach` with a mark in its environment, which every process it starts inherits."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "cluster.cli", *map(str, arguments)]
        environment = os.environ | marking(self.mark)
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def __call__(self, *arguments: str | Path, timeout_s: float = 240) -> Finished:
        began = time.monotonic()
        process = self.start(*arguments)
        out, err = process.communicate(timeout=timeout_s)
        return Finished(process.returncode, out, err, time.monotonic() - began)

    def processes(self) -> list[psutil.Process]:
        """Processes of this launch that still run."""
        return marked_processes(self.mark)

    def assert_nothing_left(self, within_s: float = 15.0) -> None:
        _, alive = psutil.wait_procs(self.processes(), timeout=within_s)
        assert not alive, [process.cmdline()[:3] for process in alive]


def read_at_least(process: subprocess.Popen[str], count: int) -> str:
    """What a process has printed once that is `count` characters (ASCII); leaves nothing in a buffer of ours.

    `process.stdout.read(count)` would: `communicate` afterwards reads past what the buffer took ahead.
    """
    assert process.stdout is not None
    shown = b""
    while len(shown) < count:
        more = os.read(process.stdout.fileno(), 1 << 16)
        assert more, f"ended after {shown!r}"
        shown += more
    return shown.decode()


@pytest.fixture
def longreach() -> Iterator[CommandLine]:
    line = CommandLine()
    yield line
    left = line.processes()
    for process in left:
        process.kill()
    assert not left, "processes had to be killed after the test"


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    """Write a YAML over the needle checkpoint; `text` replaces the cluster part."""

    def write(cluster: str = "", rest: str = "", model_path: Path | None = None) -> Path:
        path = tmp_path / "config.yaml"
        model = model_path or ROOT / "configs" / "needle"
        path.write_text(
            f"model:\n  path: {model}\ncluster:\n  address: local\n{cluster}\n"
            f"kv_cache:\n  bytes: 64MiB\ndata_dir: {tmp_path / 'data'}\n{rest}\n"
        )
        return path

    return write


@pytest.fixture
def stages() -> Iterator[Stages]:
    with tempfile.TemporaryDirectory(prefix="lr") as folder:  # short: a Unix socket's path has at most 107 bytes
        made = Stages(Path(folder))
        try:
            yield made
        finally:
            made.close()


@pytest.fixture
def running(stages: Stages) -> Stages:
    """Two stages of one shard each, ready for an engine."""
    stages.spawn()
    stages.load()
    stages.start()
    return stages


@pytest.fixture
def head() -> Iterator[FakeHead]:
    """Yield a service in memory; most tests of real heads have another `head`."""
    running = FakeHead()
    yield running
    running.jobs.released.set()
    running.stop()


@pytest.fixture
def verb(head: FakeHead, longreach: CommandLine, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """Return the command line of that service."""
    monkeypatch.setenv("LONGREACH_ADDRESS", head.address)
    return longreach
