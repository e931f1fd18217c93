"""The job service over a pipeline that moves only when the test says so: every state, every way to end."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.engine.outputs import OutputToken
from cluster.jobs import service as service_module
from cluster.jobs.model import (
    InvalidJob,
    JobConflict,
    JobInput,
    JobNotFound,
    JobRecord,
    JobSpec,
    JobState,
    NotAllowedNow,
    ServiceBusy,
    new_id,
)
from cluster.text.tokenizer import TextTokenizer
from protos.jobs.sampling import AnswerOptions
from tests.support.fakes.runtime import CHUNK, FakeRuntime
from tests.support.fakes.stage import eventually
from tests.support.oracles.integrity import check_engine
from tests.support.paths import NEEDLE
from tests.support.rigs.service import Bench

S = JobState


def test_states_in_order(bench: Bench) -> None:
    bench.runtime.shard.hold()
    job_id = bench.submit(tokens=3 * CHUNK, max_tokens=3)
    bench.runtime.shard.let(1)
    bench.reaches(job_id, S.PREFILLING)
    assert bench.service.counts() == (0, 1)
    assert bench.service.progress(job_id)[0].processed <= 2 * CHUNK
    bench.runtime.shard.let(2)
    bench.reaches(job_id, S.DECODING)
    bench.runtime.shard.let(100)
    record = bench.service.wait(job_id, 20)
    assert (record.state, bench.ids(job_id)) == (S.SUCCEEDED, [100, 101, 102])
    assert record.answers[0].finish_reason == "length"
    bench.check_idle()


@pytest.mark.parametrize("state", [S.QUEUED, S.PREFILLING, S.DECODING, S.SUCCEEDED])
def test_cancel_in_every_state(make: Callable[..., Bench], state: JobState) -> None:
    bench = make(seqs=1)
    shard = bench.runtime.shard
    shard.hold()
    if state is S.QUEUED:
        bench.submit()
    job_id = bench.submit(tokens=8 * CHUNK, max_tokens=100, first=9)
    if state is not S.QUEUED:
        shard.let({S.PREFILLING: 2, S.DECODING: 12, S.SUCCEEDED: 1000}[state])
    bench.reaches(job_id, state)
    if state is S.QUEUED:
        assert bench.service.cancel(job_id).state is S.CANCELLED  # although the shard stands still
    bench.service._cancel(job_id)
    with contextlib.suppress(AssertionError):  # behind the cancellation in the engine's queue
        check_engine(bench.runtime.engine)
    shard.let(2)  # the steps in flight: no further one is needed
    record = bench.service.wait(job_id, 20)
    assert record.state is (S.SUCCEEDED if state is S.SUCCEEDED else S.CANCELLED)
    assert bench.service.cancel(job_id) == record == bench.service.cancel(job_id)
    assert len(bench.ids(job_id)) == record.last_event
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
    bench.runtime.shard.hold()
    decoding = bench.submit(max_tokens=500, deadline=bench.clock() + 50)
    bench.runtime.shard.let(3)
    bench.reaches(decoding, S.DECODING)
    queued = bench.submit(deadline=bench.clock() + 50)
    alive = bench.submit(deadline=bench.clock() + 1000)
    bench.ahead = 60.0
    bench.reaches(queued, S.FAILED)
    bench.reaches(decoding, S.FAILED)
    bench.runtime.shard.let(1000)
    for job_id in (queued, decoding):
        assert bench.service.get(job_id).error == "deadline exceeded"
    assert bench.ids(decoding)
    assert bench.service.wait(alive, 20).state is S.SUCCEEDED
    with pytest.raises(InvalidJob, match="deadline_s: already over"):
        bench.submit(deadline=bench.clock() - 1)
    bench.check_idle()


def test_priority_decides_among_the_waiting(make: Callable[..., Bench]) -> None:
    bench = make(seqs=1)
    bench.runtime.shard.hold()
    first = bench.submit()
    priorities = [0, 5, -3, 5, 9]
    jobs = [bench.submit(priority=priority, first=at + 20) for at, priority in enumerate(priorities)]
    bench.runtime.shard.let(1000)
    for job_id in (first, *jobs):
        assert bench.service.wait(job_id, 20).state is S.SUCCEEDED
    sequences = list(dict.fromkeys(part.sequence for plan in bench.runtime.shard.plans for part in plan.slices))
    submitted = sorted(sequences)
    assert [submitted.index(sequence) for sequence in sequences] == [0, 5, 2, 4, 1, 3]  # equal ones as they came


def test_bounded_queue(make: Callable[..., Bench]) -> None:
    bench = make(seqs=1, max_queued_jobs=3)
    bench.runtime.shard.hold()
    running = bench.submit(tokens=4 * CHUNK)
    bench.runtime.shard.let(1)
    bench.reaches(running, S.PREFILLING)
    jobs = [bench.submit() for _ in range(3)]
    with pytest.raises(ServiceBusy, match="max_queued_jobs") as caught:
        bench.submit()
    assert caught.value.retry_after_s > 0
    bench.service.cancel(jobs[0])
    jobs.append(bench.submit())
    bench.runtime.shard.let(1000)
    assert [bench.service.wait(job_id, 20).state for job_id in jobs] == [S.CANCELLED, *[S.SUCCEEDED] * 3]
    bench.check_idle()


def test_the_bound_of_the_queue_holds_for_parallel_submissions(make: Callable[..., Bench]) -> None:
    bench = make(seqs=1, max_queued_jobs=3)
    bench.runtime.shard.hold()
    running = bench.submit(tokens=4 * CHUNK)
    bench.runtime.shard.let(1)
    bench.reaches(running, S.PREFILLING)

    def attempt(first: int) -> bool:
        try:
            return bool(bench.submit(first=first))
        except ServiceBusy:
            return False

    with ThreadPoolExecutor(20) as threads:
        assert sum(threads.map(attempt, range(10, 50))) == 3
    bench.runtime.shard.let(1000)


def test_a_submission_takes_few_transactions(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a document that is counted: reads of what is known and of its record, and one write."""
    bench.runtime.shard.hold()
    taken: list[str] = []
    database = bench.store._db

    def counting(kind: str) -> Callable[[], object]:
        method = getattr(database, kind)

        def call() -> object:
            if threading.current_thread() is threading.main_thread():  # the recorder writes, too
                taken.append(kind)
            return method()

        return call

    for kind in ("reading", "writing"):
        monkeypatch.setattr(database, kind, counting(kind))
    document = bench.service.documents.put("a", [b"The code of dark river is 1."], 1 << 20)
    assert taken == ["reading", "writing"]
    bench.service.count_document(document.id)
    taken.clear()
    bench.ahead = 50.0
    bench.service.submit(JobSpec(JobInput(document_id=document.id, questions=("What?",)), AnswerOptions()))
    assert taken == ["reading", "reading", "reading", "reading", "writing", "reading"]
    assert bench.service.documents.get(document.id).expires > document.expires + 40
    taken.clear()
    bench.submit()
    assert taken == ["reading", "writing"]
    bench.runtime.shard.let(1000)


def test_parallel_duplicates_are_one_job(bench: Bench) -> None:
    with ThreadPoolExecutor(50) as threads:
        ids = set(threads.map(lambda _: bench.submit(idempotency_key="k"), range(50)))
    assert len(ids) == 1
    assert len(bench.service.jobs([], {}, 100, "")[0]) == 1
    with pytest.raises(JobConflict):
        bench.submit(idempotency_key="k", max_tokens=4)
    assert bench.service.wait(ids.pop(), 20).last_event == 3
    bench.check_idle()


def test_attached_job_ends_with_its_last_follower(bench: Bench) -> None:
    bench.runtime.shard.hold()
    attached, free = bench.submit(max_tokens=100, attached=True), bench.submit(max_tokens=3)
    first, second = bench.service.stream(attached), bench.service.stream(attached)
    other = bench.service.stream(free)
    for stream in (first, second, other):
        next(stream)
    first.close()
    other.close()
    bench.runtime.shard.let(2)
    bench.reaches(attached, S.DECODING)
    second.close()
    bench.runtime.shard.let(1000)
    assert bench.service.wait(attached, 20).state is S.CANCELLED
    assert bench.service.wait(free, 20).state is S.SUCCEEDED
    bench.check_idle()


def test_attached_job_that_nobody_follows(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "_ATTACH_WITHIN_S", 0.05)
    bench.runtime.shard.hold()
    job_id = bench.submit(attached=True)
    assert threading.Event().wait(0.1) is False
    bench.runtime.shard.let(1000)
    assert bench.service.wait(job_id, 20).state in (S.CANCELLED, S.SUCCEEDED)
    bench.runtime.shard.hold()
    lonely = bench.submit(tokens=20 * CHUNK, attached=True, first=3)
    assert bench.service.wait(lonely, 20).state is S.CANCELLED
    bench.runtime.shard.let(1000)
    bench.check_idle()


def test_stream_begins_anywhere_and_loses_nothing(bench: Bench) -> None:
    bench.runtime.shard.hold()
    job_id = bench.submit(max_tokens=7)
    stream = bench.service.stream(job_id)
    bench.runtime.shard.let(1000)
    events = list(stream)
    numbers = [token.number for event in events if isinstance(event, list) for token in event]
    assert numbers == list(range(1, 8))
    assert isinstance(events[-1], JobRecord)
    assert events[-1].state is S.SUCCEEDED
    for after in range(8):
        rest = [t.number for e in bench.service.stream(job_id, after) if isinstance(e, list) for t in e]
        assert rest == numbers[after:]
    with pytest.raises(InvalidJob, match="between 0 and 7"):
        bench.service.stream(job_id, 8)


@pytest.mark.parametrize("opened", [False, True])
def test_streams_split_reasoning_alike_wherever_they_begin(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, opened: bool
) -> None:
    """Fresh, re-attached, and after the death of the head in the middle of the reasoning or of the answer."""
    text = "why not</think>\n\nso it is"
    ids = TextTokenizer.open(NEEDLE).encode(text if opened else f" <think> {text}")
    monkeypatch.setattr(FakeRuntime, "script", staticmethod(lambda sequence, index: ids[index]))
    spec = JobSpec(JobInput(prompt="why? <think>\n" if opened else "why?"), AnswerOptions(max_tokens=len(ids)))
    bench = make(seqs=1)

    def tokens(job_id: str, after: int = 0) -> list[OutputToken]:
        return [t for event in bench.service.stream(job_id, after) if isinstance(event, list) for t in event]

    job_id = bench.service.submit(spec).id
    fresh = tokens(job_id)
    assert [token.number for token in fresh] == list(range(1, len(ids) + 1))
    assert "".join(token.reasoning for token in fresh) == "why not"
    assert "".join(token.answer for token in fresh) == "so it is"
    answer = bench.service.get(job_id).answers[0]
    assert (answer.reasoning, answer.text) == ("why not", "so it is")
    for after in range(len(ids)):
        assert tokens(job_id, after) == fresh[after:]
    for done in (2, len(ids) - 2):
        bench.runtime.shard.hold()
        job_id = bench.service.submit(spec).id
        bench.runtime.shard.let(done)
        eventually(lambda job_id=job_id, done=done: len(bench.ids(job_id)) == done)  # type: ignore[misc]
        bench.restart()
        assert tokens(job_id) == fresh
        assert bench.service.get(job_id).answers[0].reasoning == "why not"
        assert tokens(job_id, done + 1) == fresh[done + 1 :]


def test_tokens_of_an_earlier_version_are_split_at_the_start(bench: Bench) -> None:
    job_id = bench.service.submit(JobSpec(JobInput(prompt="why? <think>\n"), AnswerOptions(max_tokens=3))).id
    bench.service.wait(job_id, 20)
    before = bench.service.tokens(job_id)
    assert {token.part for token in before} == {"reasoning"}
    with bench.store._db.writing() as db:  # as version 3 left it
        db.execute("UPDATE tokens SET part = '', reasoning = '', answer = ''")
    bench.restart()
    assert bench.service.tokens(job_id) == before


def test_delete_and_expiry(make: Callable[..., Bench]) -> None:
    bench = make(result_ttl_s=100.0, document_ttl_s=100.0)
    document = bench.service.documents.put("a", [b"The code of dark river is 1."], 1 << 20)
    bench.runtime.shard.hold()
    job_id = bench.submit()
    with pytest.raises(NotAllowedNow, match="cancel it first"):
        bench.service.delete(job_id)
    bench.runtime.shard.let(1000)
    bench.service.wait(job_id, 20)
    kept = bench.submit()
    bench.service.wait(kept, 20)
    bench.service.delete(job_id)
    for call in (bench.service.get, bench.service.delete, bench.service.cancel):
        with pytest.raises(JobNotFound):
            call(job_id)
    assert bench.store.tokens(job_id) == []
    bench.ahead = 99.0
    bench.service._sweep(bench.clock())
    assert bench.state(kept) is S.SUCCEEDED
    bench.ahead = 110.0
    bench.service._sweep(bench.clock())
    with pytest.raises(JobNotFound, match="may have expired"):
        bench.service.get(kept)
    with pytest.raises(JobNotFound):
        bench.service.documents.get(document.id)
    assert not list((bench.folder / "documents").iterdir())


def test_sweeps_go_on_after_a_failure_until_the_close(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    times: list[float] = []
    begun, go = threading.Event(), threading.Event()

    def expire(now: float, ttl_s: float) -> None:
        times.append(now)
        if len(times) == 1:
            raise KeyError("locked")
        begun.set()
        go.wait(20)
        times.append(0.0)

    assert threading.Event().wait(service_module._TICK_S) is False  # the first sweep is at the start
    monkeypatch.setattr(bench.store, "expire", expire)
    for ahead, count in ((50.0, 0), (70.0, 1), (120.0, 1)):
        bench.ahead = ahead
        eventually(lambda count=count: len(times) == count)  # type: ignore[misc]
        assert threading.Event().wait(2 * service_module._TICK_S) is False
        assert len(times) == count, "not before it is due"
    assert "a timed action failed" in caplog.text
    bench.ahead = 140.0
    assert begun.wait(20)
    closing = threading.Thread(target=bench.service.close)
    closing.start()
    eventually(bench.service._closing.is_set)
    go.set()
    closing.join(20)
    assert times[2:] == [0.0], "a close waits for the action that runs"


@pytest.mark.parametrize(
    ("given", "ask", "message"),
    [
        (JobInput(token_ids=()), AnswerOptions(), "prompt: 0 tokens"),
        (JobInput(token_ids=(1, 4096)), AnswerOptions(), "token_ids: 4096 at index 1: must be between 0 and 4095"),
        (
            JobInput(token_ids=(1,) * 4000),
            AnswerOptions(max_tokens=97),
            "4000 tokens .* 97 = 4097, .* is 4096: .* at most 3999",
        ),
        (JobInput(prompt=""), AnswerOptions(), "prompt: 0 tokens"),
        (JobInput(token_ids=(1,)), AnswerOptions(stop_token_ids=(9999,)), "stop_token_ids: 9999 at index 0"),
        (JobInput(document_id="doc_../../etc/passwd", questions=("?",)), AnswerOptions(), "doc id"),
    ],
)
def test_bad_requests_are_not_stored(bench: Bench, given: JobInput, ask: AnswerOptions, message: str) -> None:
    with pytest.raises(InvalidJob, match=message):
        bench.service.submit(JobSpec(given, ask))
    assert bench.store.count() == 0
    bench.check_idle()


def test_unknown_ids(bench: Bench) -> None:
    with pytest.raises(JobNotFound):
        bench.service.get(new_id("job"))
    with pytest.raises(JobNotFound):
        bench.service.submit(JobSpec(JobInput(document_id=new_id("doc"), questions=("?",)), AnswerOptions()))
    for bad in ("", "../../etc/passwd", "job_../x", "job_" + "g" * 32, new_id("doc")):
        with pytest.raises(InvalidJob):
            bench.service.get(bad)
        with pytest.raises(InvalidJob):
            bench.service.cancel(bad)


def test_metrics_hear_of_every_end_once(bench: Bench) -> None:
    heard: list[tuple[str, str, int]] = []
    bench.service.on_ended(lambda record, counts: heard.append((record.id, record.state, sum(counts.values()))))
    bench.runtime.shard.hold()
    jobs = [bench.submit(), bench.submit(max_tokens=1), bench.submit()]
    bench.service._cancel(jobs[2])
    bench.runtime.shard.let(1000)
    for job_id in jobs:
        bench.service.wait(job_id, 20)
    eventually(lambda: len(heard) == 3)
    assert {job_id: rest for job_id, *rest in heard} == {
        jobs[0]: [S.SUCCEEDED, 3], jobs[1]: [S.SUCCEEDED, 1], jobs[2]: [S.CANCELLED, 0],
    }  # fmt: skip
