"""A whole cluster whose stages exchange hidden states from device to device, over gloo between CPUs."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.integration.jobs.test_stage_repair import two_jobs
from tests.support.rigs.head import HeadProcess, tokens_of, until
from tests.support.rigs.shard_processes import shard_processes

# hangs are noticed after two seconds instead of twenty; links are those of shards that each have a GPU
_PRELUDE = """
from functools import partial
from cluster.engine import pipeline
from cluster.stages import launcher
pipeline.HangDetector = partial(pipeline.HangDetector, floor_s=2.0)
links_of = launcher.links_of
def with_gpus(shard, addresses, gpus, run_dir, epoch):
    return links_of(shard, addresses, {at: f"GPU-{at}" for at in addresses}, run_dir, epoch)
launcher.links_of = with_gpus
"""


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[list[tuple[int, ...]]]:
    """Tokens over ordinary links."""
    with HeadProcess(tmp_path_factory.mktemp("plain"), stages=2, shards=2) as head, head.client() as client:
        assert not meetings(head)
        return [tokens_of(job) for job in two_jobs(client)]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HeadProcess]:
    made = HeadProcess(tmp_path_factory.mktemp("direct"), stages=2, shards=2)
    made.prelude = _PRELUDE
    with made as running:
        yield running


def meetings(head: HeadProcess) -> set[str]:
    """The rendezvous files of links."""
    (folder,) = {found.folder for found in shard_processes(head.actors()).values()}
    return {path.stem for path in folder.glob("link*.store")}


def test_tokens_are_those_of_other_links(expected: list[list[tuple[int, ...]]], head: HeadProcess) -> None:
    with head.client() as client:
        assert [tokens_of(job) for job in two_jobs(client)] == expected
    assert meetings(head) == {"link0r0e1", "link0r1e1"}


@pytest.mark.parametrize(
    ("shard", "how"), [((0, 1), signal.SIGKILL), ((1, 0), signal.SIGKILL), ((1, 1), signal.SIGSTOP)]
)
def test_a_stage_is_replaced(
    expected: list[list[tuple[int, ...]]], head: HeadProcess, shard: tuple[int, int], how: signal.Signals
) -> None:
    before = shard_processes(head.actors())
    epoch = max(found.epoch for found in before.values())
    with head.client() as client:
        jobs = two_jobs(client)
        before[shard].process.send_signal(how)
        assert [tokens_of(job) for job in jobs] == expected
    after = shard_processes(head.actors())
    assert {at for at in before if after[at] != before[at]} == {at for at in before if at[0] == shard[0]}
    assert {f"link0r{rank}e{epoch + 1}" for rank in range(2)} <= meetings(head)


def test_nothing_stays_behind(head: HeadProcess) -> None:
    folders = {found.folder for found in shard_processes(head.actors()).values()}
    assert head.stop() == 0
    until(lambda: not head.processes(), "no process is left")
    assert [folder for folder in folders if folder.exists()] == []
