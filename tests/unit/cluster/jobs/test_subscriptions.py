"""Who is woken when: subscribers of one job, memory of the rest."""

from __future__ import annotations

import threading
import time

import pytest

from cluster.engine.outputs import OutputToken
from cluster.jobs import subscriptions
from cluster.jobs.model import JobInput, JobRecord, JobSpec, JobState, new_id
from cluster.jobs.store import JobStore
from cluster.jobs.subscriptions import Subscriptions
from protos.jobs.sampling import AnswerOptions


@pytest.fixture
def changes(store: JobStore) -> Subscriptions:
    def get(job_id: str) -> JobRecord:
        record = store.get(job_id)
        assert record is not None
        return record

    return Subscriptions(store, get, lambda job_id: {}, lambda job_id: None)


def test_changes_reach_the_subscribers_of_their_job_only(changes: Subscriptions) -> None:
    with changes._subscribe("a") as one, changes._subscribe("a") as other, changes._subscribe("b") as stranger:
        changes.notify(["a"])
        assert one.wait(0)
        one.clear()
        assert other.wait(0)
        assert not stranger.wait(0)
        changes.notify(["b"])
        assert not one.wait(0)
        assert stranger.wait(0)
        stranger.clear()
        changes.close()
        assert changes._closed
        assert one.wait(0)
        assert stranger.wait(0)


def test_a_sleeping_subscriber_is_not_woken_by_other_jobs(changes: Subscriptions) -> None:
    with changes._subscribe("a") as changed:
        woken: list[bool] = []
        waiting = threading.Thread(target=lambda: woken.append(changed.wait(0.5)))
        waiting.start()
        for _ in range(1000):
            changes.notify(["b", "c"])
        waiting.join()
    assert woken == [False], "other jobs woke it"


def test_nothing_is_kept_of_jobs_without_subscribers(changes: Subscriptions) -> None:
    changes.notify([f"job_{number}" for number in range(10_000)])
    assert len(changes._subscribers) == 0
    with changes._subscribe("a"):
        with changes._subscribe("a"):
            assert len(changes._subscribers) == 1
        assert len(changes._subscribers) == 1
    assert len(changes._subscribers) == 0


def test_jobs_followed_to_their_end_leave_no_memory(store: JobStore, changes: Subscriptions) -> None:
    ids = []
    for _ in range(101):
        record, _ = store.create(JobSpec(JobInput(prompt="p"), AnswerOptions()), new_id("job"), 1, {})
        store.commit_step([(record.id, OutputToken(1, 0, 5, "x"))], [], [])
        store.transition(record.id, [JobState.QUEUED], JobState.CANCELLED)
        ids.append(record.id)
    for job_id in ids:
        kinds = [type(event).__name__ for event in changes.events(job_id, 0, False)]
        assert kinds == ["list", "JobRecord"]
        assert changes.wait(job_id, 5).state is JobState.CANCELLED
    store.expire(time.time() + 10, 1)
    assert len(changes._subscribers) == 0
    assert not changes.is_followed(ids[0])


def test_a_stream_without_news_can_be_left(
    store: JobStore, changes: Subscriptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriptions, "_POLL_S", 0.01)
    monkeypatch.setattr(subscriptions, "HEARTBEAT_S", 0.05)
    record, _ = store.create(JobSpec(JobInput(prompt="p"), AnswerOptions()), new_id("job"), 1, {})
    events = changes.events(record.id, 0, False)
    first, *rest = (next(events) for _ in range(10))
    assert isinstance(first, JobRecord)
    assert rest == [None] * 9  # and the record is not read again
    events.close()
    assert not changes.is_followed(record.id)
