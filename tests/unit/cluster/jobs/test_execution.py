"""One bad job stays one bad job: whatever is wrong with it, at a start and when a pipeline was replaced."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.engine import supervisor as supervisor_module
from cluster.jobs import execution as execution_module
from cluster.jobs import store_retry as store_retry_module
from cluster.jobs.blame import MAX_FAILURES
from cluster.jobs.model import JobInput, JobSpec, JobState
from cluster.scheduler.scheduler import Scheduler
from protos.jobs.sampling import AnswerOptions
from protos.stage.messages import StepPlan
from tests.support.fakes.runtime import FakeRuntime
from tests.support.fakes.stage import eventually
from tests.support.rigs.service import Bench

S = JobState
TEXT = b"The code of dark river is 1. " * 20
POISON = 66  # first token of a prompt


class Panic(BaseException):
    """Such as extensions in Rust raise."""


def execute(bench: Bench, *statement: Any) -> None:
    database = sqlite3.connect(bench.folder / "jobs.sqlite", timeout=20)
    with database:
        database.execute(*statement)
    database.close()


def damage_file(change: Callable[[Path], object]) -> Callable[[Bench, str, str], None]:
    return lambda bench, job_id, document_id: change(bench.folder / "documents" / document_id) and None


def damage_row(sql: str) -> Callable[[Bench, str, str], None]:
    return lambda bench, job_id, document_id: execute(bench, sql, {"id": job_id})


_OF_JOB = "(SELECT seq FROM jobs WHERE id = :id)"
DAMAGES: dict[str, tuple[Callable[[Bench, str, str], None], str]] = {
    "a byte short": (damage_file(lambda path: path.write_bytes(TEXT[:-1])), "upload it again"),
    "gone": (damage_file(Path.unlink), "upload it again"),
    "a folder": (damage_file(lambda path: (path.unlink(), path.mkdir())), "upload it again"),
    "not text": (damage_file(lambda path: path.write_bytes(b"\xff" * len(TEXT))), "upload it again"),
    "spec is no JSON": (damage_row(f"UPDATE specs SET spec = 'x{{' WHERE job = {_OF_JOB}"), "damaged"),
    "spec of later": (damage_row(f"UPDATE specs SET spec = '{{\"what\": 1}}' WHERE job = {_OF_JOB}"), "damaged"),
    "spec is bytes": (damage_row(f"UPDATE specs SET spec = x'ff00' WHERE job = {_OF_JOB}"), "damaged"),
    "no figures": (damage_row(f"UPDATE summaries SET reproducibility = 'x' WHERE job = {_OF_JOB}"), "damaged"),
    "answers": (damage_row(f"UPDATE answers SET timings = '[' WHERE job = {_OF_JOB}"), "damaged"),
    "finish reason": (damage_row(f"UPDATE answers SET finish_reason = 'odd' WHERE job = {_OF_JOB}"), "odd"),
}


@pytest.mark.parametrize("how", ["next head", "next pipeline"])
@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_job_fails_with_its_reason_and_no_other(bench: Bench, what: str, how: str) -> None:
    damage, reason = DAMAGES[what]
    bench.runtime.shard.hold()
    document = bench.service.documents.put("a", [TEXT], 1 << 20).id
    given_ = JobInput(document_id=document, questions=("What?",))
    before = bench.submit(max_tokens=9)
    bad = bench.service.submit(JobSpec(given_, AnswerOptions())).id
    after = bench.submit(max_tokens=4)
    if how == "next head":
        bench.close()
        damage(bench, bad, document)
        bench.open()
    else:
        damage(bench, bad, document)
        bench.runtime.fail()
    assert [bench.service.wait(job_id, 20).state for job_id in (before, after)] == [S.SUCCEEDED] * 2
    record = bench.service.wait(bad, 20)
    assert (record.state, reason in record.error) == (S.FAILED, True), record.error
    listed, _ = bench.service.jobs([], {}, 10, "")
    assert {job.id: job.state for job in listed} == {before: S.SUCCEEDED, bad: S.FAILED, after: S.SUCCEEDED}
    assert bench.head.failure == bench.service.problem == ""
    bench.check_idle()


@pytest.mark.parametrize(
    "error", [KeyError("odd"), MemoryError(), RecursionError(), Panic("\ud800 odd"), SystemExit(1)]
)
def test_whatever_building_a_prompt_raises(bench: Bench, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.runtime.shard.hold()
    jobs = [bench.submit(max_tokens=2, first=first) for first in (7, POISON, 8)]
    build = execution_module.job_prompts

    def broken(runtime: Any, documents: Any, spec: JobSpec, *rest: Any) -> Any:
        if (spec.input.token_ids or ())[:1] == (POISON,):
            raise error
        return build(runtime, documents, spec, *rest)

    monkeypatch.setattr(execution_module, "job_prompts", broken)
    bench.runtime.fail()
    records = [bench.service.wait(job_id, 20) for job_id in jobs]
    assert [record.state for record in records] == [S.SUCCEEDED, S.FAILED, S.SUCCEEDED]
    assert type(error).__name__ in records[1].error
    bench.check_idle()


def test_an_error_of_the_engine_about_one_job(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.runtime.shard.hold()
    good = bench.submit(max_tokens=9)
    add = Scheduler.add

    def broken(scheduler: Scheduler, request: Any) -> None:
        if request.prompt[0] == POISON:
            raise KeyError("no slot")
        add(scheduler, request)

    monkeypatch.setattr(Scheduler, "add", broken)
    bad = bench.submit(first=POISON)
    record = bench.service.wait(bad, 20)
    assert (record.state, record.error) == (S.FAILED, "the request failed: KeyError: 'no slot'")
    bench.runtime.shard.let(1000)
    assert bench.service.wait(good, 20).state is S.SUCCEEDED
    assert bench.runtime.starts == 1
    bench.check_idle()


def test_a_job_that_breaks_the_scheduling_of_all_ends_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "PAUSES_S", (0.0,) * 5)
    schedule = Scheduler.schedule

    def broken(scheduler: Scheduler) -> Any:
        requests = [*scheduler._waiting, *scheduler._running.values()]
        if any(request.prompt[0] == POISON for request in requests):
            raise ZeroDivisionError("shares")
        return schedule(scheduler)

    monkeypatch.setattr(Scheduler, "schedule", broken)
    jobs = [bench.submit(max_tokens=3, first=first) for first in (7, POISON, 8, 9)]
    records = [bench.service.wait(job_id, 30) for job_id in jobs]
    assert [record.state for record in records] == [S.SUCCEEDED, S.FAILED, S.SUCCEEDED, S.SUCCEEDED]
    assert records[1].error.startswith("given up: the pipeline failed")
    bench.check_idle()


def test_a_job_that_the_scheduler_refuses_leaves_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(scheduler: Scheduler, request: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Scheduler, "prepare", refuse)
    with pytest.raises(MemoryError):
        bench.submit()
    assert bench.service.jobs([], {}, 10, "") == ([], "")
    bench.check_idle()


def poisoned(plan: StepPlan) -> bool:
    return any(POISON in part.token_ids for part in plan.slices)


def test_waiting_through_any_number_of_failures_costs_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "PAUSES_S", (0.0,) * 5)
    monkeypatch.setattr(FakeRuntime, "holds", True)
    bench.runtime.shard.hold()
    running = [bench.submit(max_tokens=3000) for _ in range(2)]
    waiting = [bench.submit() for _ in range(3)]

    def come_further() -> None:
        before = [len(bench.ids(job_id)) for job_id in running]
        bench.runtime.shard.let(4)
        eventually(lambda: all(len(bench.ids(id)) > n for id, n in zip(running, before, strict=True)))

    for starts in range(2, 2 + 2 * MAX_FAILURES):
        come_further()
        bench.runtime.fail()
        eventually(lambda starts=starts: bench.runtime.starts == starts)  # type: ignore[misc]
        eventually(lambda: not bench.service._recovering)
    for _ in range(2):
        come_further()  # a job that only waits to run again is not counted
        bench.restart()
    assert [bench.service.get(job_id).restarts for job_id in waiting] == [0] * 3
    for job_id in running:
        assert bench.service.get(job_id).restarts >= 2 * MAX_FAILURES
        assert bench.service.cancel(job_id).state is S.CANCELLED
    bench.runtime.shard.let(10_000)
    assert [bench.service.wait(job_id, 20).state for job_id in waiting] == [S.SUCCEEDED] * 3
    bench.check_idle()


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(before=st.integers(0, 4), after=st.integers(0, 4), seqs=st.integers(1, 4), late=st.booleans(), size=st.data())
def test_a_poison_among_many_ends_alone(
    before: int, after: int, seqs: int, late: bool, size: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervisor_module, "PAUSES_S", (0.0,) * 5)
        bench = Bench(tmp_path_factory.mktemp("poison"), seqs)
        try:
            bench.runtime.deadly = poisoned
            good = [bench.submit(size.draw(st.integers(1, 200)), max_tokens=9) for _ in range(before)]
            poison = bench.submit(size.draw(st.integers(1, 200)), first=POISON)
            if late:
                eventually(lambda: bench.runtime.starts >= 2)
            good += [bench.submit(size.draw(st.integers(1, 200)), max_tokens=9) for _ in range(after)]
            record = bench.service.wait(poison, 60)
            assert (record.state, "given up" in record.error) == (S.FAILED, True)
            assert [bench.service.wait(job_id, 60).state for job_id in good] == [S.SUCCEEDED] * len(good)
            assert all(bench.ids(job_id) == list(range(100, 109)) for job_id in good)
            bench.check_idle()
        finally:
            bench.close()


_LOCK = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1], isolation_level=None); db.execute('BEGIN EXCLUSIVE')"


@contextmanager
def locked(bench: Bench) -> Iterator[None]:
    """Another process holds the database."""
    code = f"{_LOCK}; print('locked', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(bench.folder / "jobs.sqlite")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        yield
        process.stdin.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes wait a quarter of a second for a lock, and are tried again soon after."""
    monkeypatch.setattr("cluster.jobs.sqlite.database._BUSY_TIMEOUT_S", 0.25)
    monkeypatch.setattr(store_retry_module, "RETRY_S", 0.1)


@pytest.mark.usefixtures("impatient")
def test_recovery_waits_for_a_locked_database_and_goes_on(bench: Bench) -> None:
    bench.runtime.shard.hold()
    jobs = [bench.submit(max_tokens=9), bench.submit(max_tokens=5), bench.submit(max_tokens=4)]
    bench.runtime.shard.let(4)
    eventually(lambda: len(bench.ids(jobs[0])) >= 2)
    with locked(bench):
        bench.runtime.shard.let(2)
        bench.runtime.fail()
        time.sleep(1.0)  # several times what one write waits
        assert all(not bench.state(job_id).is_final for job_id in jobs)
        assert bench.head.failure == ""
    assert [bench.service.wait(job_id, 20).state for job_id in jobs] == [S.SUCCEEDED] * 3
    assert [bench.ids(job_id) for job_id in jobs] == [list(range(100, 100 + n)) for n in (9, 5, 4)]
    bench.check_idle()


@pytest.mark.usefixtures("impatient")
def test_ends_that_a_locked_database_refuses_are_written_later(bench: Bench) -> None:
    bench.runtime.shard.hold()
    overdue = bench.submit(max_tokens=9, deadline=bench.clock() + 50)
    running, waiting = bench.submit(), bench.submit()
    cancelling = threading.Thread(target=bench.service.cancel, args=(waiting,))
    with locked(bench):
        bench.ahead = 60.0
        cancelling.start()
        time.sleep(1.0)
        assert bench.state(overdue) is not S.FAILED
    record = bench.service.wait(overdue, 20)
    assert (record.state, record.error) == (S.FAILED, "deadline exceeded")
    cancelling.join(20)
    assert bench.state(waiting) is S.CANCELLED
    bench.runtime.shard.let(1000)
    assert bench.service.wait(running, 20).state is S.SUCCEEDED
    bench.check_idle()


@pytest.mark.parametrize("when", ["running", "recovering"])
def test_a_head_ends_while_the_database_stays_locked(bench: Bench, when: str) -> None:
    """With the real time-out of 10 s: nobody waits for it."""
    bench.runtime.shard.hold()
    jobs = [bench.submit(max_tokens=9), bench.submit(max_tokens=4)]
    bench.runtime.shard.let(4)
    eventually(lambda: len(bench.ids(jobs[0])) >= 2)
    with locked(bench):
        if when == "recovering":
            bench.runtime.fail()
        bench.runtime.shard.let(2)
        time.sleep(0.3)
        began = time.monotonic()
        bench.close()
        assert time.monotonic() - began < 5
    bench.open()
    assert [bench.service.wait(job_id, 20).state for job_id in jobs] == [S.SUCCEEDED] * 2
    assert [bench.ids(job_id) for job_id in jobs] == [list(range(100, 109)), list(range(100, 104))]
    bench.check_idle()
