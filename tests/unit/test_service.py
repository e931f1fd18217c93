"""The job service over a pipeline that moves only when the test says so: every state, every way to end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import service as service_module
from cluster.documents import Documents
from cluster.job_store import JobStore
from cluster.jobs import (
    Busy,
    Conflict,
    InvalidJob,
    JobInput,
    JobRecord,
    JobSpec,
    JobState,
    JobToken,
    NotAllowedNow,
    NotFound,
    new_id,
)
from cluster.service import JobService
from cluster.service_api import ServiceLimits
from cluster.session import Ask
from tests.support.engine_rig import eventually
from tests.support.fake_session import CHUNK, FakeSession

S = JobState


class Bench:
    """A service over a fake session and a folder; `restart` is the death of a head and the start of the next."""

    def __init__(self, folder: Path, seqs: int = 2, limits: ServiceLimits | None = None) -> None:
        self.folder, self.seqs, self.limits = folder, seqs, limits or ServiceLimits()
        self.ahead = 0.0  # the clock of the service runs ahead of this machine's by so many seconds
        self.open()

    def open(self) -> None:
        self.session = FakeSession(self.folder, self.seqs)
        self.session.start()
        self.store = JobStore(self.folder / "jobs.sqlite")
        self.documents = Documents(self.folder / "documents", self.store, 100.0, self.clock)
        self.service = JobService(self.session, self.store, self.documents, self.limits, self.clock)
        self.service.start()

    def clock(self) -> float:
        return time.time() + self.ahead

    def close(self) -> None:
        self.service.close()
        self.session.close()
        self.store.close()

    def restart(self) -> None:
        self.close()
        self.open()

    def submit(self, tokens: int = 5, max_tokens: int = 3, first: int = 7, **spec: object) -> str:
        given = JobInput(token_ids=(first,) * tokens)
        return self.service.submit(replace(JobSpec(given, Ask(max_tokens=max_tokens)), **spec)).id  # type: ignore[arg-type]

    def state(self, job_id: str) -> JobState:
        return self.service.get(job_id).state

    def reaches(self, job_id: str, state: JobState) -> None:
        eventually(lambda: self.state(job_id) is state)

    def ids(self, job_id: str) -> list[int]:
        return [token.token_id for token in self.service.tokens(job_id)]

    def check_idle(self) -> None:
        """Every block is back, and nothing is kept for a job."""
        eventually(lambda: not self.service._live and not self.session.kv_usage)
        assert not self.service._tickets
        assert not self.service._queued_tokens
        self.service.check_integrity()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def build(**options: object) -> Bench:
        made.append(Bench(tmp_path, **options))  # type: ignore[arg-type]
        return made[-1]

    yield build
    for one in made:
        one.close()


def test_states_in_order(bench: Bench) -> None:
    bench.session.shard.hold()
    job_id = bench.submit(tokens=3 * CHUNK, max_tokens=3)
    bench.session.shard.let(1)
    bench.reaches(job_id, S.PREFILLING)
    assert bench.service.counts() == (0, 1)
    assert bench.service.progress(job_id)[0].processed <= 2 * CHUNK
    bench.session.shard.let(2)
    bench.reaches(job_id, S.DECODING)
    bench.session.shard.let(100)
    record = bench.service.wait(job_id, 20)
    assert (record.state, bench.ids(job_id)) == (S.SUCCEEDED, [100, 101, 102])
    assert record.answers[0].finish_reason == "length"
    bench.check_idle()


@pytest.mark.parametrize("state", [S.QUEUED, S.PREFILLING, S.DECODING, S.SUCCEEDED])
def test_cancel_in_every_state(make: Callable[..., Bench], state: JobState) -> None:
    bench = make(seqs=1)
    shard = bench.session.shard
    if state is S.QUEUED:
        shard.hold()
        bench.submit()
    elif state is S.PREFILLING:
        shard.hold()
    job_id = bench.submit(tokens=8 * CHUNK, max_tokens=100 if state is S.DECODING else 2, first=9)
    if state is S.PREFILLING:
        shard.let(1)
    elif state is S.DECODING:
        eventually(lambda: len(shard.plans) > 0)
    bench.reaches(job_id, state) if state is not S.DECODING else None
    with ThreadPoolExecutor(1) as threads:
        cancelling = threads.submit(bench.service.cancel, job_id)
        before = len(shard.plans)
        if state is S.PREFILLING:
            shard.let(2)  # what is in flight; no further chunk is needed
        record = cancelling.result(20)
    if state is S.SUCCEEDED:
        assert record.state is S.SUCCEEDED
    elif state is S.DECODING:
        assert record.state in (S.CANCELLED, S.SUCCEEDED)
    else:
        assert record.state is S.CANCELLED
        assert len(shard.plans) <= before + 1
    assert bench.service.cancel(job_id) == record == bench.service.cancel(job_id)
    shard.let(1000)
    bench.check_idle()


def test_cancel_while_decoding_stops_within_the_steps_in_flight(bench: Bench) -> None:
    job_id = bench.submit(max_tokens=3000, first=1)
    bench.reaches(job_id, S.DECODING)
    record = bench.service.cancel(job_id)
    assert record.state is S.CANCELLED
    assert 0 < len(bench.ids(job_id)) == record.last_event < 3000
    bench.check_idle()


def test_deadline_while_queued_and_while_decoding(make: Callable[..., Bench]) -> None:
    bench = make(seqs=1)
    bench.session.shard.hold()
    decoding = bench.submit(max_tokens=500, deadline=bench.clock() + 50)
    bench.session.shard.let(3)
    bench.reaches(decoding, S.DECODING)
    queued = bench.submit(deadline=bench.clock() + 50)
    alive = bench.submit(deadline=bench.clock() + 1000)
    bench.ahead = 60.0
    bench.service._keeper.at(0, lambda: None)  # wakes it: a clock that jumps does not
    bench.reaches(queued, S.FAILED)
    bench.reaches(decoding, S.FAILED)
    bench.session.shard.let(1000)
    for job_id in (queued, decoding):
        assert bench.service.get(job_id).error == "deadline exceeded"
    assert bench.ids(decoding)
    assert bench.service.wait(alive, 20).state is S.SUCCEEDED
    with pytest.raises(InvalidJob, match="deadline_s: already over"):
        bench.submit(deadline=bench.clock() - 1)
    bench.check_idle()


def test_priority_decides_among_the_waiting(make: Callable[..., Bench]) -> None:
    bench = make(seqs=1)
    bench.session.shard.hold()
    first = bench.submit()
    jobs = {bench.submit(priority=priority, first=priority + 20): priority for priority in (0, 5, -3, 5, 9)}
    bench.session.shard.let(1000)
    for job_id in (first, *jobs):
        assert bench.service.wait(job_id, 20).state is S.SUCCEEDED
    started = sorted(jobs, key=lambda job_id: bench.service.get(job_id).started or 0.0)
    assert [jobs[job_id] for job_id in started] == [9, 5, 5, 0, -3]


def test_bounded_queue(make: Callable[..., Bench]) -> None:
    bench = make(seqs=1, limits=ServiceLimits(max_queued_jobs=3))
    bench.session.shard.hold()
    running = bench.submit(tokens=4 * CHUNK)
    bench.session.shard.let(1)
    bench.reaches(running, S.PREFILLING)
    jobs = [bench.submit() for _ in range(3)]
    with pytest.raises(Busy, match="max_queued_jobs") as caught:
        bench.submit()
    assert caught.value.retry_after_s > 0
    bench.service.cancel(jobs[0])
    jobs.append(bench.submit())
    bench.session.shard.let(1000)
    assert [bench.service.wait(job_id, 20).state for job_id in jobs] == [S.CANCELLED, *[S.SUCCEEDED] * 3]
    bench.check_idle()


def test_parallel_duplicates_are_one_job(bench: Bench) -> None:
    with ThreadPoolExecutor(50) as threads:
        ids = set(threads.map(lambda _: bench.submit(idempotency_key="k"), range(50)))
    assert len(ids) == 1
    assert len(bench.service.jobs([], {}, 100, "")[0]) == 1
    with pytest.raises(Conflict):
        bench.submit(idempotency_key="k", max_tokens=4)
    assert bench.service.wait(ids.pop(), 20).last_event == 3
    bench.check_idle()


def test_attached_job_ends_with_its_last_follower(bench: Bench) -> None:
    bench.session.shard.hold()
    attached, free = bench.submit(max_tokens=100, attached=True), bench.submit(max_tokens=3)
    first, second = bench.service.stream(attached), bench.service.stream(attached)
    other = bench.service.stream(free)
    for stream in (first, second, other):
        assert isinstance(next(stream), JobRecord)
    first.close()  # type: ignore[attr-defined]
    other.close()  # type: ignore[attr-defined]
    bench.session.shard.let(2)
    bench.reaches(attached, S.DECODING)
    second.close()  # type: ignore[attr-defined]
    bench.session.shard.let(1000)
    assert bench.service.wait(attached, 20).state is S.CANCELLED
    assert bench.service.wait(free, 20).state is S.SUCCEEDED
    bench.check_idle()


def test_attached_job_that_nobody_follows(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "_ATTACH_WITHIN_S", 0.05)
    bench.session.shard.hold()
    job_id = bench.submit(attached=True)
    assert threading.Event().wait(0.1) is False
    bench.session.shard.let(1000)
    assert bench.service.wait(job_id, 20).state in (S.CANCELLED, S.SUCCEEDED)
    bench.session.shard.hold()
    lonely = bench.submit(tokens=20 * CHUNK, attached=True, first=3)
    eventually(lambda: bench.service._live[lonely].cancelled)
    bench.session.shard.let(1000)
    assert bench.service.wait(lonely, 20).state is S.CANCELLED
    bench.check_idle()


def test_stream_begins_anywhere_and_loses_nothing(bench: Bench) -> None:
    bench.session.shard.hold()
    job_id = bench.submit(max_tokens=7)
    stream = bench.service.stream(job_id)
    bench.session.shard.let(1000)
    events = list(stream)
    numbers = [event.number for event in events if isinstance(event, JobToken)]
    assert numbers == list(range(1, 8))
    assert isinstance(events[-1], JobRecord)
    assert events[-1].state is S.SUCCEEDED
    for after in range(8):
        rest = [e.number for e in bench.service.stream(job_id, after) if isinstance(e, JobToken)]
        assert rest == numbers[after:]
    with pytest.raises(InvalidJob, match="between 0 and 7"):
        bench.service.stream(job_id, 8)


def test_delete_and_expiry(make: Callable[..., Bench]) -> None:
    bench = make(limits=ServiceLimits(result_ttl_s=100.0, document_ttl_s=100.0))
    document = bench.service.upload("a", [b"The code of dark river is 1."])
    bench.session.shard.hold()
    job_id = bench.submit()
    with pytest.raises(NotAllowedNow, match="cancel it first"):
        bench.service.delete(job_id)
    bench.session.shard.let(1000)
    bench.service.wait(job_id, 20)
    kept = bench.submit()
    bench.service.wait(kept, 20)
    bench.service.delete(job_id)
    for call in (bench.service.get, bench.service.delete, bench.service.cancel):
        with pytest.raises(NotFound):
            call(job_id)
    assert bench.store.tokens(job_id) == []
    bench.ahead = 99.0
    bench.service._sweep(bench.clock())
    assert bench.state(kept) is S.SUCCEEDED
    bench.ahead = 110.0
    bench.service._sweep(bench.clock())
    with pytest.raises(NotFound, match="may have expired"):
        bench.service.get(kept)
    with pytest.raises(NotFound):
        bench.service.document(document.id)
    assert not list((bench.folder / "documents").iterdir())


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
    job_id = bench.service.submit(JobSpec(JobInput(document_id=document.id, questions=("What?",)))).id
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


def test_pipeline_that_cannot_be_started_again(bench: Bench) -> None:
    bench.session.shard.hold()
    jobs = [bench.submit(), bench.submit()]

    def fail() -> None:
        jobs.append(bench.submit())
        raise RuntimeError("no room\nat all")

    bench.session.before_start = fail
    bench.session.break_down()
    eventually(lambda: len(jobs) == 3)
    for job_id in jobs:
        record = bench.service.wait(job_id, 20)
        assert record.state is S.FAILED
        assert record.error == "stage 0 shard 0 is gone; starting again failed: no room at all"
    with pytest.raises(Busy, match="the head must be restarted"):
        bench.submit()
    assert not bench.service._live


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


@pytest.mark.parametrize(
    ("given", "ask", "message"),
    [
        (JobInput(token_ids=()), Ask(), "prompt: 0 tokens"),
        (JobInput(token_ids=(1, 4096)), Ask(), "token_ids: 4096 at index 1: must be between 0 and 4095"),
        (JobInput(token_ids=(1,) * 4000), Ask(max_tokens=97), "4000 tokens .* 97 = 4097, .* is 4096: .* at most 3999"),
        (JobInput(prompt=""), Ask(), "prompt: 0 tokens"),
        (JobInput(token_ids=(1,)), Ask(stop_token_ids=(9999,)), "stop_token_ids: 9999 at index 0"),
        (JobInput(document_id="doc_../../etc/passwd", questions=("?",)), Ask(), "doc id"),
    ],
)
def test_bad_requests_are_not_stored(bench: Bench, given: JobInput, ask: Ask, message: str) -> None:
    with pytest.raises(InvalidJob, match=message):
        bench.service.submit(JobSpec(given, ask))
    assert bench.store.count() == 0
    bench.check_idle()


def test_unknown_ids(bench: Bench) -> None:
    with pytest.raises(NotFound):
        bench.service.get(new_id("job"))
    with pytest.raises(NotFound):
        bench.service.submit(JobSpec(JobInput(document_id=new_id("doc"), questions=("?",))))
    for bad in ("", "../../etc/passwd", "job_../x", "job_" + "g" * 32, new_id("doc")):
        with pytest.raises(InvalidJob):
            bench.service.get(bad)
        with pytest.raises(InvalidJob):
            bench.service.cancel(bad)


def test_metrics_hear_of_every_end_once(bench: Bench) -> None:
    heard: list[tuple[str, str, int]] = []
    bench.service.on_ended(lambda record, counts: heard.append((record.id, record.state, sum(counts.values()))))
    bench.session.shard.hold()
    jobs = [bench.submit(), bench.submit(max_tokens=1), bench.submit()]
    bench.service._cancel(jobs[2])
    bench.session.shard.let(1000)
    for job_id in jobs:
        bench.service.wait(job_id, 20)
    eventually(lambda: len(heard) == 3)
    assert {job_id: rest for job_id, *rest in heard} == {
        jobs[0]: [S.SUCCEEDED, 3], jobs[1]: [S.SUCCEEDED, 1], jobs[2]: [S.CANCELLED, 0],
    }  # fmt: skip
