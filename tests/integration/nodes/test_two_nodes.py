"""Stages and shards on two machines with addresses of their own, and the loss of one of them."""

from __future__ import annotations

import contextlib
import os
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.client.client import Client, Job
from cluster.common.certificates import certificate_names
from protos.jobs.sampling import SamplingParams
from protos.stage.identity import shard_name
from tests.support.data.specs import generation_spec
from tests.support.fakes.pipeline import Pipeline
from tests.support.nodes.network import why_no_namespaces
from tests.support.nodes.ray_nodes import RayNodes
from tests.support.rigs.head import NEEDLE, PATIENT, HeadProcess, until
from tests.support.rigs.shard_processes import ShardProcess, shard_processes, tcp_ports

pytestmark = pytest.mark.skipif(bool(why_no_namespaces()), reason=why_no_namespaces())

PROMPT = [5 + 7 * i % 4000 for i in range(300)]
TOKENS = 200  # enough that a job is still at work when a machine is lost
PATIENCE_S = 400.0  # beside much other work; nothing waits that long when all is well
SHARDS = [(0, 0), (0, 1), (1, 0), (1, 1)]


class HeadOfNodes(HeadProcess):
    """A head on the first machine, of two stages of two shards; a machine of two CPUs has room for one stage."""

    def __init__(self, folder: Path, nodes: RayNodes) -> None:
        super().__init__(folder)
        self._nodes = nodes
        self.environment = nodes.environment
        self.address = f"{nodes.network.addresses[0]}:{self.port}"
        self.config.write_text(
            f"model:\n  path: {NEEDLE}\n  dtype: float32\n  max_model_len: 2048\n"
            f"cluster:\n  address: {nodes.address}\n  pipeline_parallel_size: 2\n  expert_parallel_size: 2\n"
            "  threads_per_actor: 1\n  cpus_per_actor: 1\n"
            "prefill: {max_num_batched_tokens: 256}\nkv_cache: {bytes: 64MiB}\n"
            f"server: {{host: {nodes.network.addresses[0]}, port: {self.port}}}\n"
            f"security: {{allow_insecure_bind: true}}\ndata_dir: {self.data}\n"
        )

    def start(self) -> None:
        self.command = [*self._nodes.network.inside(0), sys.executable, "-m", "cluster.cli"]
        super(HeadProcess, self).start()

    def client(self) -> Client:
        return Client(self.address, retries=PATIENT)


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with pytest.MonkeyPatch.context() as patch:
        # without what a local cluster of an earlier test in this process has set
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        with RayNodes(3) as made:
            made.start(0, cpus=2)
            made.start(1, cpus=2)
            yield made


@pytest.fixture(scope="module")
def head(nodes: RayNodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HeadOfNodes]:
    with HeadOfNodes(tmp_path_factory.mktemp("head"), nodes) as running:
        yield running


@pytest.fixture(scope="module")
def expected() -> tuple[int, ...]:
    """The tokens of one process without any cluster."""
    spec = generation_spec(PROMPT, TOKENS, SamplingParams(temperature=0.0), ignore_eos=True)
    with Pipeline(NEEDLE, 1, 1, pages=128) as pipeline:
        (result,) = pipeline.generate(spec)
    return tuple(sample.token_id for sample in result.samples)


def ask(client: Client) -> Job:
    return client.submit(token_ids=PROMPT, max_tokens=TOKENS, temperature=0.0, ignore_eos=True)


def tokens_of(job: Job) -> tuple[int, ...]:
    job.wait(PATIENCE_S).refresh()
    assert job.state == "succeeded", (job.state, job.error)
    (answer,) = job.answers
    return answer.token_ids


def machines(nodes: RayNodes) -> dict[tuple[int, int], int]:
    """The machine of every shard."""
    return {at: nodes.machine_of(shard.process) for at, shard in shard_processes(nodes.stages()).items()}


def names_behind(shard: ShardProcess, host: str) -> set[str]:
    """The names in certificates that the TCP ports of a shard show; Ray's own ports in that process show none."""
    names: set[str] = set()
    for port in tcp_ports(shard.process):
        with contextlib.suppress(OSError):
            pem = ssl.get_server_certificate((host, port), timeout=10.0)
            names.update(certificate_names(pem.encode()))
    return names


def test_the_same_tokens_as_one_process(nodes: RayNodes, head: HeadOfNodes, expected: tuple[int, ...]) -> None:
    placed = machines(nodes)
    assert sorted(placed) == SHARDS
    assert {stage: {placed[stage, 0], placed[stage, 1]} for stage in (0, 1)} in (
        {0: {0}, 1: {1}}, {0: {1}, 1: {0}},
    ), "a stage on each machine"  # fmt: skip
    with head.client() as client:
        assert tokens_of(ask(client)) == expected


def test_stages_listen_at_their_machine_with_certificates_of_their_own(nodes: RayNodes, head: HeadOfNodes) -> None:
    shards = shard_processes(nodes.stages())
    assert sorted(shards) == SHARDS
    for at, shard in shards.items():
        host = nodes.network.addresses[nodes.machine_of(shard.process)]
        assert names_behind(shard, host) == {shard_name(*at)}


def test_nobody_else_can_enter_rays_folders_or_read_its_token(nodes: RayNodes, head: HeadOfNodes) -> None:
    assert nodes.token.stat().st_mode & 0o777 == 0o600
    secret = nodes.token.read_text()
    assert len(secret) == 64
    for index in (0, 1):
        assert nodes.session(index).stat().st_mode & 0o777 == 0o700
        written = [path for path in nodes.session(index).rglob("*") if path.is_file() and not path.is_symlink()]
        assert written
        assert [path for path in written if path.stat().st_mode & 0o077] == []
        assert [path for path in written if secret in path.read_text(errors="replace")] == []
    log = "".join(path.read_text() for path in (head.data / "log").glob("*")) + head.log.read_text()
    assert "RAY_AUTH_MODE" not in log, "nothing to warn of"
    assert "--temp-dir" not in log


def test_a_machine_is_lost_and_its_stage_goes_on_elsewhere(
    nodes: RayNodes, head: HeadOfNodes, expected: tuple[int, ...]
) -> None:
    """The machine that takes its place joins after the loss, while the head waits for one."""
    before, placed = shard_processes(nodes.stages()), machines(nodes)
    (lost,) = {stage for (stage, _), machine in placed.items() if machine == 1}
    with head.client() as client:
        job = ask(client)
        until(lambda: job.refresh().data.last_event >= 5, "a decoding job")
        nodes.lose(1)
        nodes.start(2, cpus=2)
        assert tokens_of(job) == expected
        after, placed = shard_processes(nodes.stages()), machines(nodes)
        assert sorted(after) == SHARDS
        for at, shard in after.items():
            if at[0] == lost:
                assert (placed[at], shard.epoch) == (2, 2)
            else:
                assert shard == before[at], "it keeps its process, its weights and its KV"
        status = client.status()
        assert (status.repairs, status.full_restarts, status.epoch) == (1, 0, 2)
        assert tokens_of(ask(client)) == expected
