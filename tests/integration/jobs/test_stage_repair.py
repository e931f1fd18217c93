"""Shards of two stages of two are killed or stopped while jobs run: their stage alone is replaced."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.client.client import Client, Job
from tests.support.rigs.head import HeadProcess, tokens_of, until
from tests.support.rigs.shard_processes import shard_processes

PROMPT = [5 + 7 * i % 4000 for i in range(6000)]
SHARDS = [(0, 0), (0, 1), (1, 0), (1, 1)]
# hangs are noticed after two seconds instead of twenty, and steps are slow while a file is there
_PRELUDE = """
import os, time
from functools import partial
from cluster.engine import pipeline
from cluster.scheduler.scheduler import Scheduler
pipeline.HangDetector = partial(pipeline.HangDetector, floor_s=2.0)
schedule = Scheduler.schedule
def slowly(self):
    if os.path.exists({slow!r}):
        time.sleep(0.25)
    return schedule(self)
Scheduler.schedule = slowly
"""

Tokens = list[list[tuple[int, ...]]]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HeadProcess]:
    made = HeadProcess(tmp_path_factory.mktemp("head"), stages=2, shards=2)
    made.prelude = _PRELUDE.format(slow=str(slow_file(made)))
    with made as running:
        yield running


@pytest.fixture(scope="module")
def expected(head: HeadProcess) -> Tokens:
    """Tokens of the jobs when nothing disturbs them."""
    with head.client() as client:
        return [tokens_of(job) for job in two_jobs(client)]


def slow_file(head: HeadProcess) -> Path:
    return head.config.with_name("slow")


def two_jobs(client: Client, slow: Path | None = None) -> list[Job]:
    """A job that decodes for long, and then one with a long prompt; steps are slow from there on with `slow`."""
    decoding = client.submit(prompt="The code of dark river is", max_tokens=150, ignore_eos=True)
    until(lambda: decoding.refresh().data.last_event >= 5, "a decoding job")
    if slow is not None:
        slow.touch()
    return [decoding, client.submit(token_ids=PROMPT, max_tokens=20, ignore_eos=True)]


@pytest.mark.parametrize(("shard", "how"), [*((at, signal.SIGKILL) for at in SHARDS), ((0, 1), signal.SIGSTOP)])
def test_its_stage_alone_is_replaced(
    head: HeadProcess, expected: Tokens, shard: tuple[int, int], how: signal.Signals
) -> None:
    """While a job decodes and another one prefills; both end as if nothing had been."""
    before = shard_processes(head.actors())
    assert sorted(before) == SHARDS
    epoch = max(found.epoch for found in before.values())
    with head.client() as client:
        jobs = two_jobs(client, slow_file(head))
        until(lambda: jobs[1].refresh().state == "prefilling", "a job in prefill")
        before[shard].process.send_signal(how)
        slow_file(head).unlink()
        assert [tokens_of(job) for job in jobs] == expected
        assert [job.data.restarts for job in jobs] == [1, 1]
    after = shard_processes(head.actors())
    assert sorted(after) == SHARDS
    for at in SHARDS:
        if at[0] == shard[0]:
            assert after[at].epoch == epoch + 1
            assert after[at].process.pid != before[at].process.pid
        else:
            assert after[at] == before[at], "it is the process that it was"


def test_nothing_stays_behind(head: HeadProcess) -> None:
    shared = set(os.listdir("/dev/shm"))
    folders = {found.folder for found in shard_processes(head.actors()).values()}
    assert head.stop() == 0
    until(lambda: not head.processes(), "no process is left")
    assert [folder for folder in folders if folder.exists()] == []
    assert set(os.listdir("/dev/shm")) <= shared
