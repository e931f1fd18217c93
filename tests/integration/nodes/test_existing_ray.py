"""Joining a Ray that somebody else runs, with stages on different nodes of one address: links go over TCP.

test_two_nodes has nodes with addresses of their own, where this process may make network namespaces.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.bench.head_process import marking
from tests.integration.conftest import ROOT, CommandLine
from tests.support.nodes.network import why_no_namespaces
from tests.support.rigs.head import HeadProcess, tokens_of, until
from tests.support.rigs.shard_processes import ShardProcess, shard_processes

NEEDLE = ROOT / "configs" / "needle"


class Nodes:
    """Ray nodes of one CPU each on this machine."""

    def __init__(self, line: CommandLine) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self._line = line
        self.raylets: list[psutil.Process] = []  # that of the first node first
        self._start("--head", f"--port={self.address.rpartition(':')[2]}", "--include-dashboard=false")

    def add(self) -> None:
        self._start(f"--address={self.address}")

    def _start(self, *options: str) -> None:
        ray = str(Path(sys.executable).with_name("ray"))
        command = [ray, "start", *options, "--node-ip-address=127.0.0.1", "--num-cpus=1", "--disable-usage-stats"]
        environment = os.environ | marking(self._line.mark) | {"RAY_USAGE_STATS_ENABLED": "0"}
        command.append("--object-store-memory=80000000")
        subprocess.run(command, check=True, env=environment, capture_output=True, timeout=120)
        self.raylets += [p for p in self._line.processes() if p.name() == "raylet" and p not in self.raylets]

    def stages(self) -> dict[tuple[int, int], ShardProcess]:
        return shard_processes(p for p in self._line.processes() if "StageActor" in " ".join(p.cmdline()))


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """Two nodes, which all tests use one after the other."""
    line = CommandLine()
    with pytest.MonkeyPatch.context() as patch:
        # without what a local cluster of an earlier test in this process has set
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else it would be one of the home directory
        try:
            made = Nodes(line)
            made.add()
            yield made
        finally:
            for process in line.processes():
                process.kill()
            line.assert_nothing_left()


def test_stages_on_two_nodes(longreach: CommandLine, nodes: Nodes, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model:\n  path: {NEEDLE}\ncluster:\n  address: {nodes.address}\n  pipeline_parallel_size: 2\n"
        f"  cpus_per_actor: 1\n  threads_per_actor: 1\nkv_cache:\n  bytes: 64MiB\ndata_dir: {tmp_path / 'data'}\n"
    )
    document = tmp_path / "document.txt"
    document.write_text("And he went.\nThe secret code of dark river is 48213.\nAnd it was so.\n" * 1)
    done = longreach("run", config, "--document", document, "--question", "What is the secret code of dark river?")
    assert done.code == 0, done.err
    assert done.out.strip().endswith("The secret code of dark river is 48213.")


@pytest.mark.skipif(not why_no_namespaces(), reason="test_two_nodes loses a machine with an address of its own")
def test_a_node_is_lost_and_its_stage_goes_on_elsewhere(nodes: Nodes, tmp_path: Path) -> None:
    """The test before has left the nodes as it found them: they have room for these stages."""
    head = HeadProcess(tmp_path, stages=2)
    config = head.config.read_text().replace("cpus_per_actor: 0.5", f"cpus_per_actor: 1\n  address: {nodes.address}")
    head.config.write_text(config)
    with head, head.client() as client:
        nodes.add()
        answer = {"max_tokens": 300, "ignore_eos": True}
        expected = tokens_of(client.submit(prompt="The code of dark river is", **answer))
        job = client.submit(prompt="The code of dark river is", **answer)
        until(lambda: job.refresh().data.last_event >= 5, "a decoding job")
        before = nodes.stages()
        (lost,) = [at for at, found in before.items() if found.process.parent() in nodes.raylets[1:]][:1]
        raylet = before[lost].process.parent()
        assert raylet is not None
        for process in (*raylet.children(recursive=True), raylet):  # all of that machine
            process.kill()
        assert tokens_of(job) == expected
        after = nodes.stages()
        (kept,) = set(before) - {lost}
        assert after[kept] == before[kept]
        assert after[lost].epoch == 2
        assert after[lost].process.parent() not in (raylet, None)
        status = client.status()
        assert (status.repairs, status.full_restarts, status.epoch) == (1, 0, 2)
