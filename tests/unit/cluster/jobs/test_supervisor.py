"""Heads that die, pipelines that break, disks that refuse: every job runs once, to its end."""

from __future__ import annotations

import sqlite3
from typing import Any

import pytest

from cluster.common.errors import JobStoreError
from cluster.engine.runtime import Ask
from cluster.jobs import recorder as recorder_module
from cluster.jobs import supervisor as recovery_module
from cluster.jobs.model import (
    Busy,
    JobInput,
    JobSpec,
    JobState,
)
from tests.support.fakes.stage import eventually
from tests.support.rigs.service import Bench

S = JobState


def test_next_head_goes_on(bench: Bench) -> None:
    bench.session.shard.hold()
    document = bench.service.upload("a", [b"The code of dark river is 1. " * 20])
    given = JobInput(document_id=document.id, questions=("What?", "Where?"))
    jobs = [bench.submit(max_tokens=9), bench.service.submit(JobSpec(given, Ask(max_tokens=4))).id, bench.submit()]
    bench.session.shard.let(4)
    eventually(lambda: len(bench.ids(jobs[0])) >= 2)
    bench.service.drain(0.0)
    with pytest.raises(Busy, match="shutting down"):
        bench.submit()
    before = bench.ids(jobs[0])
    bench.restart()
    records = [bench.service.wait(job_id, 20) for job_id in jobs]
    assert [record.state for record in records] == [S.SUCCEEDED] * 3
    assert [record.restarts for record in records] == [1] * 3
    assert bench.ids(jobs[0]) == list(range(100, 109))
    assert bench.ids(jobs[0])[: len(before)] == before
    assert sorted(bench.ids(jobs[1])) == sorted([*range(100, 104)] * 2)
    bench.check_idle()
    bench.restart()  # nothing to do
    assert bench.service.get(jobs[0]) == records[0]


def test_job_whose_document_is_gone_fails(bench: Bench) -> None:
    bench.session.shard.hold()
    document = bench.service.upload("a", [b"The code of dark river is 1. " * 20])
    job_id = bench.service.submit(JobSpec(JobInput(document_id=document.id, questions=("What?",)), Ask())).id
    (bench.folder / "documents" / document.id).unlink()
    bench.restart()
    record = bench.service.wait(job_id, 20)
    assert record.state is S.FAILED
    assert "upload it again" in record.error
    bench.check_idle()


def test_broken_pipeline_is_replaced(bench: Bench) -> None:
    """Jobs of before, of meanwhile and cancelled meanwhile; every one runs once."""
    bench.session.shard.hold()
    jobs = [bench.submit(max_tokens=9), bench.submit(max_tokens=4)]
    doomed = bench.submit(max_tokens=5)
    bench.session.shard.let(4)
    eventually(lambda: len(bench.ids(jobs[0])) >= 2)
    during: list[object] = []

    def meanwhile() -> None:
        during.append(bench.service.status()["kv_usage"])
        jobs.append(bench.submit(max_tokens=6))
        during.append(bench.service.cancel(doomed).state)
        unwanted = bench.submit(max_tokens=6)
        during.append(bench.service.cancel(unwanted).state)
        during.append(bench.state(jobs[0]))

    bench.session.before_start = meanwhile
    bench.session.break_down()
    records = [bench.service.wait(job_id, 20) for job_id in jobs]
    eventually(lambda: len(jobs) == 3)
    records = [bench.service.wait(job_id, 20) for job_id in jobs]
    assert [record.state for record in records] == [S.SUCCEEDED] * 3
    assert [record.restarts for record in records] == [1, 1, 0]
    assert [bench.ids(job_id) for job_id in jobs] == [list(range(100, 100 + n)) for n in (9, 4, 6)]
    assert during == [0.0, S.CANCELLED, S.CANCELLED, S.RECOVERING]
    assert bench.session.starts == 2
    bench.check_idle()


def test_pipeline_that_breaks_while_nothing_runs(bench: Bench) -> None:
    first = bench.submit()
    assert bench.service.wait(first, 20).state is S.SUCCEEDED
    bench.check_idle()
    bench.session.break_down()
    eventually(lambda: bench.session.starts == 2)  # without any job
    jobs = [bench.submit(max_tokens=2 + n) for n in range(3)]
    assert [bench.service.wait(job_id, 20).state for job_id in jobs] == [S.SUCCEEDED] * 3
    assert [len(bench.ids(job_id)) for job_id in jobs] == [2, 3, 4]
    assert bench.session.starts == 2
    bench.check_idle()


def test_status_says_that_the_pipeline_starts_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.session, "status", lambda: {"stages": [{"stage": 0, "state": "unreachable"}]})
    seen: list[str] = []
    bench.session.before_start = lambda: seen.append(bench.service.status()["stages"][0]["state"])
    bench.session.break_down()
    eventually(lambda: bench.service.status()["stages"][0]["state"] == "unreachable" and bool(seen))
    assert seen == ["restarting"]


def test_a_start_that_fails_is_tried_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery_module, "PAUSES_S", (0.0, 0.01, 0.01))
    tries: list[int] = []

    def fail_twice() -> None:
        tries.append(1)
        if len(tries) <= 2:
            raise RuntimeError("a port is still taken")

    bench.session.before_start = fail_twice
    bench.session.shard.hold()
    job_id = bench.submit(max_tokens=4)
    bench.session.break_down()
    assert bench.service.wait(job_id, 20).state is S.SUCCEEDED
    assert len(tries) == 3
    bench.check_idle()


def test_pipeline_that_cannot_be_started_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery_module, "PAUSES_S", (0.0, 0.01))
    bench.session.shard.hold()
    jobs = [bench.submit(), bench.submit()]

    def fail() -> None:
        jobs.append(bench.submit())
        raise RuntimeError("no room\nat all")

    bench.session.before_start = fail
    bench.session.break_down()
    eventually(lambda: len(jobs) == 4)
    for job_id in jobs:
        record = bench.service.wait(job_id, 20)
        assert record.state is S.FAILED
        assert record.error == "stage 0 shard 0 is gone; starting again failed: no room at all"
    with pytest.raises(Busy, match="the head must be restarted"):
        bench.submit()
    assert not bench.service._live


def test_disk_that_refuses_for_a_while_delays_only(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "_RETRY_S", 0.01)
    commit = bench.store.commit_step
    refused: list[Any] = []

    def full(*args: Any) -> Any:
        if len(refused) < 5:
            refused.append(args)
            raise JobStoreError("database or disk is full") from sqlite3.OperationalError("full")
        return commit(*args)

    monkeypatch.setattr(bench.store, "commit_step", full)
    jobs = [bench.submit(max_tokens=n) for n in (1, 2, 9)]
    assert [bench.service.wait(job_id, 20).state for job_id in jobs] == [S.SUCCEEDED] * 3
    assert [bench.ids(job_id) for job_id in jobs] == [list(range(100, 100 + n)) for n in (1, 2, 9)]
    assert len(refused) == 5
    bench.check_idle()


def test_failed_pipeline_twice_in_a_row(bench: Bench) -> None:
    bench.session.shard.hold()
    job_id = bench.submit(max_tokens=50)
    bench.session.shard.let(5)
    eventually(lambda: len(bench.ids(job_id)) >= 2)
    for starts in (2, 3):
        bench.session.break_down()
        eventually(lambda starts=starts: bench.session.starts == starts)  # type: ignore[misc]
    bench.session.shard.let(1000)
    assert bench.service.wait(job_id, 20).state is S.SUCCEEDED
    assert bench.ids(job_id) == list(range(100, 150))
    bench.check_idle()
