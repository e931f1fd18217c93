"""Who is woken when: followers of one job, memory of the rest."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from cluster.engine.outputs import AnswerOptions
from cluster.jobs.model import JobInput, JobRecord, JobSpec, JobState, JobToken, new_id
from cluster.jobs.recorder import Watch
from cluster.jobs.store import JobStore
from cluster.jobs.subscriptions import Following


def test_news_reach_the_followers_of_their_job_only():
    watch = Watch()
    with watch.follow("a") as one, watch.follow("a") as other, watch.follow("b") as stranger:
        watch.touch(["a"])
        assert one.wait(0)
        assert not one.wait(0)  # once
        assert other.wait(0)
        assert not stranger.wait(0)
        watch.forget("b")
        assert stranger.wait(0)
        watch.close()
        assert one.wait(0)
        assert stranger.wait(0)


def test_a_sleeping_follower_is_not_woken_by_other_jobs():
    watch = Watch()
    checks: list[float] = []

    class Counting(list):
        def __bool__(self) -> bool:
            checks.append(time.monotonic())
            return False

    with watch.follow("a") as follower:
        follower._news = Counting()  # type: ignore[assignment]
        waiting = threading.Thread(target=follower.wait, args=(0.5,))
        waiting.start()
        while not checks:
            time.sleep(0.001)
        for _ in range(1000):
            watch.touch(["b", "c"])
        waiting.join()
    assert len(checks) <= 4, "other jobs woke it"


def test_nothing_is_kept_of_jobs_that_nobody_follows():
    watch = Watch()
    watch.touch([f"job_{number}" for number in range(10_000)])
    assert watch.num_jobs == 0
    with watch.follow("a"):
        with watch.follow("a"):
            assert watch.num_jobs == 1
        assert watch.num_jobs == 1
    assert watch.num_jobs == 0


def test_jobs_followed_to_their_end_leave_no_memory(tmp_path: Path):
    store = JobStore(tmp_path / "jobs.sqlite")
    watch = Watch()

    def get(job_id: str) -> JobRecord:
        record = store.get(job_id)
        assert record is not None
        return record

    following = Following(store, watch, get, lambda job_id: {}, lambda job_id: None)
    ids = []
    for _ in range(101):
        record, _ = store.create(JobSpec(JobInput(prompt="p"), AnswerOptions()), new_id("job"), 1, {})
        store.commit_step([(record.id, JobToken(1, 0, 5, "x"))], [], [])
        store.transition(record.id, [JobState.QUEUED], JobState.CANCELLED)
        ids.append(record.id)
    for job_id in ids:
        kinds = [type(event).__name__ for event in following.events(job_id, 0, False)]
        assert kinds == ["list", "JobRecord"]
        assert following.wait(job_id, 5).state is JobState.CANCELLED
    store.expire(time.time() + 10, 1)
    assert watch.num_jobs == 0
    assert not following.is_followed(ids[0])
    store.close()
