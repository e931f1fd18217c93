"""Joining a Ray that somebody else runs, with stages on different nodes: links go over TCP."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import MARK, ROOT, CommandLine

NEEDLE = ROOT / "configs" / "needle"


@pytest.fixture
def two_nodes(longreach: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Two Ray nodes of one CPU each on this machine; yields the head's address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray = str(Path(sys.executable).with_name("ray"))
    # without what a local cluster of an earlier test in this process has set
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # `ray start` makes a token, which others use only when told to
    environment = os.environ | {MARK: longreach.mark, "RAY_USAGE_STATS_ENABLED": "0"}
    common = ["--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats"]
    address = f"127.0.0.1:{port}"
    head = [ray, "start", "--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--include-dashboard=false"]
    subprocess.run([*head, *common], check=True, env=environment, capture_output=True, timeout=120)
    try:
        worker = [ray, "start", f"--address={address}", "--node-ip-address=127.0.0.1"]
        subprocess.run([*worker, *common], check=True, env=environment, capture_output=True, timeout=120)
        yield address
    finally:
        for process in longreach.processes():
            process.kill()
        longreach.assert_nothing_left()


def test_stages_on_two_nodes(longreach: CommandLine, two_nodes: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model:\n  path: {NEEDLE}\ncluster:\n  address: {two_nodes}\n  pipeline_parallel_size: 2\n"
        f"  cpus_per_actor: 1\n  threads_per_actor: 1\nkv_cache:\n  bytes: 64MiB\ndata_dir: {tmp_path / 'data'}\n"
    )
    document = tmp_path / "document.txt"
    document.write_text("And he went.\nThe secret code of dark river is 48213.\nAnd it was so.\n" * 1)
    for _ in range(2):  # the cluster is left as it was found: a second run finds the same room
        done = longreach("run", config, "--document", document, "--question", "What is the secret code of dark river?")
        assert done.code == 0, done.err
        assert done.out.strip().endswith("The secret code of dark river is 48213.")
