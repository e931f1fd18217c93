"""`serve`, `up` and `down` as a user runs them; the head itself is replaced by one that only waits."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cluster.jobs.model import JobInput, JobSpec, new_id
from cluster.jobs.store import JobStore
from protos.jobs.sampling import AnswerOptions
from tests.integration.conftest import CommandLine, read_at_least
from tests.support.rigs.head import free_port, until

# imported by every Python below this test before anything else
SITE = """
import os, signal, sys, threading, types

def run_head(config_path, on_status, on_ready, on_warning):
    from cluster.stages.launcher import LaunchStatus
    assert config_path.is_absolute() or os.environ["FAKE_HEAD"] == "foreground"
    on_status(LaunchStatus("loading weights", 1, 2))
    if os.environ["FAKE_HEAD"] == "broken":
        from protos.errors import UserError
        raise UserError("model.path: not today")
    if os.environ["FAKE_HEAD"] == "lossy":
        on_warning("3 commits are lost")
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    if os.environ["FAKE_HEAD"] == "slow":
        stop.wait()
        return 0
    on_ready("0.0.0.0:4242", "http://127.0.0.1:8000")
    stop.wait()
    if os.environ["FAKE_HEAD"] == "deaf":
        threading.Event().wait()
    return 0

head = types.ModuleType("cluster.server.head")
head.run_head = run_head
sys.modules["cluster.server.head"] = head
"""


DOOR = "server:\n  port: 4242"


@pytest.fixture
def fake_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("FAKE_HEAD", "good")
    return lambda mode: monkeypatch.setenv("FAKE_HEAD", mode)


def test_up_and_down_each_twice(
    longreach: CommandLine, write_config: Callable[..., Path], fake_head: Callable[[str], None], tmp_path: Path
) -> None:
    config, data = write_config(rest=DOOR), tmp_path / "data"
    done = longreach("up", config, "--json")
    assert done.code == 0, done.err
    state = json.loads((data / "head.json").read_text())
    assert (state["address"], state["http_url"]) == ("127.0.0.1:4242", "http://127.0.0.1:8000")
    assert int((data / "head.pid").read_text()) == state["pid"]
    process = psutil.Process(state["pid"])
    assert abs(process.create_time() - state["started"]) < 1
    assert json.loads(done.out) == state | {"log": str(data / "log" / "head.log")}
    assert "head ready at 0.0.0.0:4242" in (data / "log" / "head.log").read_text()

    done = longreach("up", config)
    assert done.code == 0
    assert "already running at 127.0.0.1:4242, HTTP at http://127.0.0.1:8000 (pid " in done.out
    done = longreach("serve", config)
    assert done.code == 3
    assert "longreach down" in done.err
    assert process.is_running()

    modes = {path.relative_to(data).as_posix(): path.stat().st_mode & 0o777 for path in (data, *data.rglob("*"))}
    assert modes == {".": 0o700, "head.json": 0o600, "head.pid": 0o600, "log": 0o700, "log/head.log": 0o600}
    for age in (-1e6, 1e6):  # whatever the clocks say
        for path in data.iterdir():
            os.utime(path, (time.time() + age,) * 2)
        assert "already running" in longreach("up", config).out
    (data / "head.pid").rename(data / "away")
    done = longreach("serve", config)
    assert (done.code, done.err.count("\n")) == (3, 1), "the lock decides, not the files"
    (data / "away").rename(data / "head.pid")

    done = longreach("down", config)
    assert (done.code, done.out) == (0, f"stopped (pid {state['pid']})\n")
    assert not process.is_running()
    assert not (data / "head.json").exists()
    for arguments in ([config], ["--data-dir", data]):
        done = longreach("down", *arguments)
        assert (done.code, done.out) == (0, "no head is running\n")
    longreach.assert_nothing_left()


def test_up_passes_on_why_a_head_cannot_start(
    longreach: CommandLine, write_config: Callable[..., Path], fake_head: Callable[[str], None], tmp_path: Path
) -> None:
    fake_head("broken")
    done = longreach("up", write_config(rest=DOOR))
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("longreach: error: model.path: not today (log: ")
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["log"]
    done = longreach("up", tmp_path / "missing.yaml")
    assert done.code == 2


def test_up_passes_on_what_is_lost(
    longreach: CommandLine, write_config: Callable[..., Path], fake_head: Callable[[str], None]
) -> None:
    config = write_config(rest=DOOR)
    fake_head("lossy")
    done = longreach("up", config, "--json")
    assert done.code == 0
    assert "longreach: warning: 3 commits are lost\n" in done.err
    assert longreach("down", config).code == 0


@pytest.mark.parametrize("wrong", ["data", "data/log", "data/head.pid/folder", "data/log/head.log/folder"])
def test_a_data_directory_that_cannot_be_used_is_one_line(
    longreach: CommandLine, write_config: Callable[..., Path], fake_head: Callable[[str], None], tmp_path: Path,
    wrong: str,
) -> None:  # fmt: skip
    path = tmp_path / wrong
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a file where a folder should be, or in a folder where a file should be")
    done = longreach("up", write_config(rest=DOOR))
    assert done.code == 3, done.err
    assert done.err.splitlines()[-1].startswith("longreach: error: data_dir: ")
    assert "Traceback" not in done.err


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:8192])


def _foreign(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE photos (id)")


@pytest.mark.parametrize(
    ("damage", "message"), [(_truncated, "is damaged: restore a copy"), (_foreign, "a database of something else")]
)
def test_a_store_that_cannot_be_used_is_one_line_before_anything_starts(
    longreach: CommandLine, write_config: Callable[..., Path], tmp_path: Path, damage: Callable[[Path], None],
    message: str,
) -> None:  # fmt: skip
    path = tmp_path / "data" / "jobs.sqlite"
    store = JobStore(path)
    for _ in range(20):
        store.create(JobSpec(JobInput(token_ids=(1,) * 1000), AnswerOptions()), new_id("job"), 1, {})
    store.close()
    damage(path)
    before = path.read_bytes()
    done = longreach("up", write_config(rest=DOOR))
    assert done.code == 3
    assert message in done.err.splitlines()[-1]
    log = (tmp_path / "data" / "log" / "head.log").read_text()
    assert "Traceback" not in log
    assert "loading weights" not in log
    assert path.read_bytes() == before


def test_interrupted_up_stops_the_head(
    longreach: CommandLine, write_config: Callable[..., Path], fake_head: Callable[[str], None], tmp_path: Path
) -> None:
    fake_head("slow")
    process = longreach.start("up", write_config(rest=DOOR))
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("loading weights"):
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    longreach.assert_nothing_left()
    assert not (tmp_path / "data" / "head.pid").exists()


def test_down_kills_a_head_that_does_not_stop(
    longreach: CommandLine, write_config: Callable[..., Path], fake_head: Callable[[str], None]
) -> None:
    fake_head("deaf")
    config = write_config(rest=DOOR)
    assert longreach("up", config).code == 0
    done = longreach("down", config, "--timeout", "0.5")
    assert done.code == 0
    assert done.out.startswith("killed")
    longreach.assert_nothing_left()


def test_down_of_a_head_that_nobody_reaps(
    longreach: CommandLine, write_config: Callable[..., Path], fake_head: Callable[[str], None]
) -> None:
    """As in a container without an init: it stays a zombie."""
    fake_head("foreground")
    config = write_config(rest=DOOR)
    process = longreach.start("serve", config)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("head ready"):
            break
    done = longreach("down", config)
    assert (done.code, done.out) == (0, f"stopped (pid {process.pid})\n")
    assert done.seconds < 20
    assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
    assert longreach("down", config).out == "no head is running\n"
    process.communicate(timeout=30)


def test_one_of_many_heads_that_start_together_wins(
    longreach: CommandLine, write_config: Callable[..., Path], fake_head: Callable[[str], None], tmp_path: Path
) -> None:
    fake_head("foreground")
    config = write_config(rest=DOOR)
    heads = [longreach.start("serve", config) for _ in range(4)]
    until(lambda: len([head for head in heads if head.poll() is not None]) == 3, "all but one have ended")
    (winner,) = [head for head in heads if head.poll() is None]
    for head in heads:
        if head is not winner:
            _, err = head.communicate(timeout=30)
            assert head.returncode == 3
            assert err.startswith("longreach: error: a head is already running (")
            assert err.count("\n") == 1
    assert (tmp_path / "data" / "head.pid").read_text() == f"{winner.pid}\n"
    winner.terminate()
    winner.communicate(timeout=30)
    assert winner.returncode == 0


def test_serve_in_the_foreground(
    longreach: CommandLine, write_config: Callable[..., Path], fake_head: Callable[[str], None], tmp_path: Path
) -> None:
    fake_head("foreground")
    process = longreach.start("serve", write_config(rest=DOOR))
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("head ready"):
            break
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert not (tmp_path / "data" / "head.pid").exists()


def test_stream_survives_a_killed_head(
    longreach: CommandLine, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """The real head: killed while it answers, started again, and the stream that ran meanwhile misses nothing."""
    data = tmp_path / "data"
    config = write_config(rest=f"server:\n  port: {free_port()}")
    document = tmp_path / "document.txt"
    document.write_text("The secret code of dark river is 12345. The grass is green. " * 9)
    assert longreach("up", config).code == 0
    address = json.loads((data / "head.json").read_text())["address"]
    done = longreach(
        "submit", "--document", document, "--question", "What?", "--max-tokens", "1000", "--ignore-eos",
        "--data-dir", data,
    )  # fmt: skip
    job_id = done.out.strip()
    stream = longreach.start("stream", job_id, "--address", address)
    shown = read_at_least(stream, 100)
    psutil.Process(int((data / "head.pid").read_text())).kill()
    done = longreach("jobs", "--data-dir", data)
    assert (done.code, done.err.count("\n")) == (3, 1)
    assert "no longer runs" in done.err
    assert longreach("up", config).code == 0
    rest, err = stream.communicate(timeout=120)
    assert stream.returncode == 0, err
    job = json.loads(longreach("wait", job_id, "--data-dir", data, "--json").out)
    assert (job["state"], job["restarts"], job["last_event"]) == ("succeeded", 1, 1000)
    assert (shown + rest).strip() == job["answers"][0]["text"].strip()
    assert longreach("down", config).code == 0
    longreach.assert_nothing_left(5)


@pytest.mark.parametrize(("phase", "number"), [("starting Ray", signal.SIGTERM), ("starting stages", signal.SIGINT)])
def test_a_signal_while_the_head_starts(
    longreach: CommandLine, write_config: Callable[..., Path], tmp_path: Path, phase: str, number: signal.Signals
) -> None:
    """The real head: it ends in order, whatever native code runs at that moment."""
    process = longreach.start("serve", write_config(rest=f"server:\n  port: {free_port()}"))
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(phase):
            break
    process.send_signal(number)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "longreach: interrupted; nothing is left running"
    longreach.assert_nothing_left(5)
    assert not list((tmp_path / "data").glob("head.*"))


def test_a_head_needs_a_port(longreach: CommandLine, write_config: Callable[..., Path]) -> None:
    for verb in ("up", "serve"):
        done = longreach(verb, write_config())
        assert done.code == 2
        assert "server.port" in done.err


def test_stale_pid_files(longreach: CommandLine, tmp_path: Path) -> None:
    """Of a process that is gone, of one that is no head, and of one that looks like a head but has no lock."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    sleep = "import time; time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", sleep])
    younger = subprocess.Popen([sys.executable, "-c", sleep, "cluster.cli", "serve"])
    try:
        for pid, written in ((gone.pid, 0), (other.pid, 0), (younger.pid, -3600), ("nonsense", 0), (-1, 0)):
            path = tmp_path / "head.pid"
            path.write_text(f"{pid}\n")
            os.utime(path, (time.time() + written,) * 2)
            done = longreach("down", "--data-dir", tmp_path)
            assert done.code == 0
            assert "no longer runs" in done.out
            assert not path.exists()
        assert other.poll() is None
        assert younger.poll() is None
    finally:
        for process in (other, younger):
            process.kill()
            process.wait()
