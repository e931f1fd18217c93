"""Heads that die, pipelines that break, disks that refuse: every job runs once, to its end."""

from __future__ import annotations

import sqlite3
import threading
from typing import Any

import pytest

from cluster.common.errors import JobStoreError
from cluster.engine import supervisor as supervisor_module
from cluster.jobs import store_retry as store_retry_module
from cluster.jobs.model import (
    JobInput,
    JobSpec,
    JobState,
    NotReady,
)
from protos.jobs.sampling import AnswerOptions
from tests.support.fakes.stage import eventually
from tests.support.rigs.service import Bench

S = JobState


def test_next_head_goes_on(bench: Bench) -> None:
    bench.runtime.shard.hold()
    document = bench.service.documents.put("a", [b"The code of dark river is 1. " * 20], 1 << 20)
    given = JobInput(document_id=document.id, questions=("What?", "Where?"))
    jobs = [
        bench.submit(max_tokens=9),
        bench.service.submit(JobSpec(given, AnswerOptions(max_tokens=4))).id,
        bench.submit(),
    ]
    bench.runtime.shard.let(4)
    eventually(lambda: len(bench.ids(jobs[0])) >= 2)
    bench.service.drain(0.0)
    with pytest.raises(NotReady, match="shutting down"):
        bench.submit()
    before = bench.ids(jobs[0])
    bench.restart()
    records = [bench.service.wait(job_id, 20) for job_id in jobs]
    assert [record.state for record in records] == [S.SUCCEEDED] * 3
    assert [record.restarts for record in records] == [1, 1, 0]  # the last one had only waited
    assert bench.ids(jobs[0]) == list(range(100, 109))
    assert bench.ids(jobs[0])[: len(before)] == before
    assert sorted(bench.ids(jobs[1])) == sorted([*range(100, 104)] * 2)
    bench.check_idle()
    bench.restart()  # nothing to do
    assert bench.service.get(jobs[0]) == records[0]


def test_job_whose_document_is_gone_fails(bench: Bench) -> None:
    bench.runtime.shard.hold()
    document = bench.service.documents.put("a", [b"The code of dark river is 1. " * 20], 1 << 20)
    job_id = bench.service.submit(JobSpec(JobInput(document_id=document.id, questions=("What?",)), AnswerOptions())).id
    (bench.folder / "documents" / document.id).unlink()
    bench.restart()
    record = bench.service.wait(job_id, 20)
    assert record.state is S.FAILED
    assert "upload it again" in record.error
    bench.check_idle()


def test_broken_pipeline_is_replaced(bench: Bench) -> None:
    """Jobs of before, of meanwhile and cancelled meanwhile; every one runs once."""
    bench.runtime.shard.hold()
    jobs = [bench.submit(max_tokens=9), bench.submit(max_tokens=4)]
    doomed = bench.submit(max_tokens=5)
    bench.runtime.shard.let(4)
    eventually(lambda: len(bench.ids(jobs[0])) >= 2)
    during: list[object] = []

    def meanwhile() -> None:
        during.append(bench.service.status()["kv_usage"])
        jobs.append(bench.submit(max_tokens=6))
        during.append(bench.service.cancel(doomed).state)
        unwanted = bench.submit(max_tokens=6)
        during.append(bench.service.cancel(unwanted).state)
        during.append(bench.state(jobs[0]))

    bench.runtime.before_start = meanwhile
    bench.runtime.fail()
    records = [bench.service.wait(job_id, 20) for job_id in jobs]
    eventually(lambda: len(jobs) == 3)
    records = [bench.service.wait(job_id, 20) for job_id in jobs]
    assert [record.state for record in records] == [S.SUCCEEDED] * 3
    assert [record.restarts for record in records] == [1, 1, 0]
    assert [bench.ids(job_id) for job_id in jobs] == [list(range(100, 100 + n)) for n in (9, 4, 6)]
    assert during == [0.0, S.CANCELLED, S.CANCELLED, S.RECOVERING]
    assert bench.runtime.starts == 2
    bench.check_idle()


def test_pipeline_that_breaks_while_nothing_runs(bench: Bench) -> None:
    first = bench.submit()
    assert bench.service.wait(first, 20).state is S.SUCCEEDED
    bench.check_idle()
    bench.runtime.fail()
    eventually(lambda: bench.runtime.starts == 2)  # without any job
    jobs = [bench.submit(max_tokens=2 + n) for n in range(3)]
    assert [bench.service.wait(job_id, 20).state for job_id in jobs] == [S.SUCCEEDED] * 3
    assert [len(bench.ids(job_id)) for job_id in jobs] == [2, 3, 4]
    assert bench.runtime.starts == 2
    bench.check_idle()


def test_status_says_that_the_pipeline_starts_again(bench: Bench) -> None:
    seen: list[str] = []
    bench.runtime.before_start = lambda: seen.append(bench.service.status()["stages"][0]["state"])
    bench.runtime.fail()
    eventually(lambda: bench.service.status()["stages"][0]["state"] == "running" and bool(seen))
    assert seen == ["restarting"]


def test_tokens_are_durable_before_the_replacement_starts(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the failed pipeline has emitted is committed first, however long the disk takes."""
    bench.runtime.shard.hold()
    job_id = bench.submit(max_tokens=9)
    go = threading.Event()
    commit = bench.store.commit_step

    def slow(*args: Any) -> Any:
        go.wait(20)
        return commit(*args)

    monkeypatch.setattr(bench.store, "commit_step", slow)
    seen: list[list[int]] = []
    bench.runtime.before_start = lambda: seen.append(bench.ids(job_id))
    (handle,) = bench.service._live[job_id].handles
    bench.runtime.shard.let(4)
    eventually(lambda: len(handle.request.output) >= 3)
    bench.runtime.fail()
    assert handle.done.wait(20)
    emitted = list(handle.request.output)
    assert (seen, bench.ids(job_id)) == ([], [])
    go.set()
    assert bench.service.wait(job_id, 20).state is S.SUCCEEDED
    assert seen == [emitted]
    assert bench.ids(job_id) == list(range(100, 109))
    bench.check_idle()


def test_a_job_that_failed_in_the_same_moment_is_forgotten(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its deadline passed, but the pipeline failed before the engine had stopped it."""
    bench.runtime.shard.hold()
    job_id = bench.submit(max_tokens=9)
    monkeypatch.setattr(bench.runtime.engine, "cancel", lambda handle: None)
    bench.service._cancel(job_id, "deadline exceeded")
    assert bench.service._live
    bench.runtime.fail()
    eventually(lambda: bench.runtime.starts == 2 and bench.runtime.supervisor.running is not None)
    assert (bench.state(job_id), bench.service.get(job_id).error) == (S.FAILED, "deadline exceeded")
    bench.check_idle()


def test_close_while_the_pipeline_restarts(bench: Bench) -> None:
    """The next head goes on with the job; this one leaves it as it is."""
    bench.runtime.shard.hold()
    job_id = bench.submit(max_tokens=9)
    bench.runtime.shard.let(4)
    eventually(lambda: len(bench.ids(job_id)) >= 2)
    closing = threading.Thread(target=bench.head.close)

    def close() -> None:
        closing.start()
        eventually(bench.runtime.supervisor._stopping.is_set)

    bench.runtime.before_start = close
    bench.runtime.fail()
    eventually(closing.is_alive)
    closing.join(20)
    assert bench.runtime.supervisor.running is None
    bench.restart()
    assert bench.service.wait(job_id, 20).state is S.SUCCEEDED
    assert bench.ids(job_id) == list(range(100, 109))
    bench.check_idle()


def test_a_start_that_fails_is_tried_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "PAUSES_S", (0.0, 0.01, 0.01))
    tries: list[int] = []

    def fail_twice() -> None:
        tries.append(1)
        if len(tries) <= 2:
            raise RuntimeError("a port is still taken")

    bench.runtime.before_start = fail_twice
    bench.runtime.shard.hold()
    job_id = bench.submit(max_tokens=4)
    bench.runtime.fail()
    assert bench.service.wait(job_id, 20).state is S.SUCCEEDED
    assert len(tries) == 3
    bench.check_idle()


def test_pipeline_that_cannot_be_started_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "PAUSES_S", (0.0, 0.01))
    bench.runtime.shard.hold()
    jobs = [bench.submit(), bench.submit()]

    def fail() -> None:
        jobs.append(bench.submit())
        raise RuntimeError("no room\nat all")

    bench.runtime.before_start = fail
    bench.runtime.fail()
    eventually(lambda: len(jobs) == 4)
    for job_id in jobs:
        record = bench.service.wait(job_id, 20)
        assert record.state is S.FAILED
        assert record.error == "stage 0 shard 0 is gone; starting again failed: no room at all"
    with pytest.raises(NotReady, match="the head must be restarted"):
        bench.submit()
    assert not bench.service._live
    assert [stage["state"] for stage in bench.service.status()["stages"]] == ["down"]


def test_disk_that_refuses_for_a_while_delays_only(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_retry_module, "RETRY_S", 0.01)
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
    bench.runtime.shard.hold()
    job_id = bench.submit(max_tokens=50)
    bench.runtime.shard.let(5)
    eventually(lambda: len(bench.ids(job_id)) >= 2)
    for starts in (2, 3):
        bench.runtime.fail()
        eventually(lambda starts=starts: bench.runtime.starts == starts)  # type: ignore[misc]
    bench.runtime.shard.let(1000)
    assert bench.service.wait(job_id, 20).state is S.SUCCEEDED
    assert bench.ids(job_id) == list(range(100, 150))
    bench.check_idle()
