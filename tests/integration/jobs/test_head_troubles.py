"""A head in trouble: its database is locked, a thread of it fails, the machine's clock jumps. No job is lost."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.rigs.head import LONG, HeadProcess, tokens_of, until

# the files `broken` and `later` beside the head's data make its recorder fail and its clock a day fast; a write waits
# for a lock for two seconds instead of ten
_TROUBLES = """
import pathlib, time
import cluster.jobs.sqlite.database as database
from cluster.jobs.recorder import Recorder
database._BUSY_TIMEOUT_S = 2.0
folder = pathlib.Path({folder!r})
commit, now = Recorder._commit_first, time.time
def broken(recorder):
    if (folder / "broken").exists():
        raise KeyError("injected")
    commit(recorder)
Recorder._commit_first = broken
time.time = lambda: now() + 86400 * (folder / "later").exists()
"""
_LOCK = (
    "import sqlite3, sys; db = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60);"
    "db.execute('BEGIN EXCLUSIVE'); print(flush=True); sys.stdin.read()"
)


@contextmanager
def locked(head: HeadProcess) -> Iterator[None]:
    command = [sys.executable, "-c", _LOCK, str(head.data / "jobs.sqlite")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        yield
        process.stdin.close()


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HeadProcess]:
    folder = tmp_path_factory.mktemp("head")
    made = HeadProcess(folder, server="  drain_timeout_s: 1")
    made.prelude = _TROUBLES.format(folder=str(folder))
    with made as running:
        yield running


def test_locked_clock_and_thread(head: HeadProcess) -> None:
    folder: Path = head.data.parent
    with head.client() as client:
        answer = {"max_tokens": 300, "ignore_eos": True}
        expected = tokens_of(client.submit(prompt="Once upon a time", **answer))
        jobs = [client.submit(prompt="Once upon a time", **answer) for _ in range(3)]
        until(lambda: jobs[0].refresh().data.last_event >= 5, "a decoding job")
        with locked(head):  # for longer than a write waits, while a stage dies
            head.actors()[0].kill()
            time.sleep(4.0)
            assert not jobs[2].refresh().done
        assert [tokens_of(job) for job in jobs] == [expected] * 3
        assert head.process.poll() is None
        assert client.status().problem == ""

        job = client.submit(prompt="Once upon a time", deadline_s=3600.0, **answer)
        (folder / "later").touch()
        assert tokens_of(job) == expected
        assert tokens_of(client.submit(prompt="Once upon a time", deadline_s=60.0, **answer)) == expected
        (folder / "later").unlink()

        job = client.submit(prompt="Once upon a time", **answer)
        until(lambda: job.refresh().data.last_event >= 5, "a decoding job")
        with locked(head):  # for as long as the head lives
            began = time.monotonic()
            head.terminate()
            assert head.process.wait(LONG) == 0
            assert time.monotonic() - began < 25.0
        head.start()
        assert tokens_of(job) == expected

        job = client.submit(prompt="Once upon a time", **answer)
        until(lambda: job.refresh().data.last_event >= 5, "a decoding job")
        (folder / "broken").touch()
        assert head.process.wait(LONG) == 3
        said = head.log.read_text().splitlines()[-1]
        assert said.startswith("longreach: error: the recorder thread has ended: KeyError: 'injected'")
        (folder / "broken").unlink()
        head.start()
        assert tokens_of(job) == expected
