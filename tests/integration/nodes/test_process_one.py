"""A head as process 1, as in a container: SIGTERM drains it, and nothing of it is left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.bench.head_process import marking
from cluster.client.client import Client
from cluster.jobs.store import JobStore
from tests.integration.conftest import CommandLine
from tests.support.rigs.head import LONG, NEEDLE, PATIENT, free_port, until

_TOKENS = 150
_NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


def _why_not() -> str:
    if shutil.which("unshare") is None:
        return "needs the program unshare (package util-linux)"
    done = subprocess.run([*_NAMESPACE, "true"], capture_output=True, text=True, timeout=30, check=False)
    return f"process namespaces are not permitted here: {done.stderr.strip()}" if done.returncode else ""


@pytest.fixture
def line() -> Iterator[CommandLine]:
    made = CommandLine()
    yield made
    for process in made.processes():
        process.kill()


@pytest.mark.skipif(bool(_why_not()), reason=_why_not())
def test_sigterm_lets_running_jobs_finish(tmp_path: Path, line: CommandLine) -> None:
    port = free_port()
    config, log = tmp_path / "head.yaml", tmp_path / "head.log"
    config.write_text(
        f"model: {{path: {NEEDLE}, dtype: float32}}\ncluster: {{threads_per_actor: 1, cpus_per_actor: 0.5}}\n"
        f"kv_cache: {{bytes: 64MiB}}\nserver: {{port: {port}, drain_timeout_s: 500}}\ndata_dir: {tmp_path / 'data'}\n"
    )
    command = [*_NAMESPACE, sys.executable, "-m", "cluster.cli", "serve", str(config)]
    environment = os.environ | marking(line.mark)
    with log.open("wb") as out:
        outer = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        until(lambda: "head ready" in log.read_text() or outer.poll() is not None, "a ready head", 2 * LONG)
        assert outer.poll() is None, log.read_text()
        (head,) = psutil.Process(outer.pid).children()
        assert "NSpid:" in (status := Path(f"/proc/{head.pid}/status").read_text())
        assert status.partition("NSpid:")[2].splitlines()[0].split()[-1] == "1"
        with Client(f"127.0.0.1:{port}", retries=PATIENT) as client:
            job = client.submit(prompt="The code of dark river is", max_tokens=_TOKENS, ignore_eos=True)
            until(lambda: job.refresh().data.last_event >= 1, "a decoding job")
            head.send_signal(signal.SIGTERM)
        assert outer.wait(2 * LONG) == 0, log.read_text()
    finally:
        outer.kill()  # and with it all of its namespace
        outer.wait(LONG)
    line.assert_nothing_left()
    store = JobStore(tmp_path / "data" / "jobs.sqlite")
    try:
        record = store.get(job.id)
        assert record is not None
        assert record.state.value == "succeeded"
        assert len(store.tokens(job.id)) == _TOKENS
    finally:
        store.close()
