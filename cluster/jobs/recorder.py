"""Writes what the engine produces into the job store, then wakes those who follow.

The engine's callbacks only put events into a queue. One thread takes all that wait, commits them in one transaction and
then tells the followers: a token is on disk before anybody sees it, and a busy disk makes transactions larger, not
more.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from cluster.common.errors import JobStoreError
from cluster.engine.outputs import Generation, Progress, TokenEvent
from cluster.engine.request_handle import Event
from cluster.jobs.model import ACTIVE, JobAnswer, JobState, JobToken
from cluster.jobs.store import JobStore, StateChange
from cluster.scheduler.request import FinishReason
from protos.stage.messages import SampledToken

_log = logging.getLogger(__name__)
_RETRY_S = 1.0  # between attempts to write to a disk that refuses
_DETAILED = 16  # answers of a job that keep figures of every layer and head: tens of kilobytes each
_PAGE = 1000  # tokens read at once when a job is taken up again


@dataclass(slots=True)
class LiveJob:
    """A job of this head that has not ended: counters, newest progress, and how its answers ended so far."""

    job_id: str
    num_answers: int
    last_event: int
    on_end: Callable[[JobState], None]
    cancelled: bool = False  # somebody wants it to end
    generation: int = 0  # rises with every pipeline; events of an earlier one are dropped
    decodes: bool = False  # the store has heard of its first token
    progress: dict[int, Progress] = field(default_factory=dict)
    ended: dict[int, FinishReason] = field(default_factory=dict)
    generated: dict[int, int] = field(default_factory=dict)  # tokens of this head by question

    def restore(self, finished: Mapping[int, str]) -> None:
        """Begin again with the answers that had ended before."""
        self.ended = {question: FinishReason(reason) for question, reason in finished.items()}
        self.progress = {}
        self.decodes = False


class Follower:
    """One who follows a job: `wait` returns at the next commit about this job, and at no other."""

    def __init__(self, lock: threading.Lock) -> None:
        self._changed = threading.Condition(lock)
        self._news = False

    def wait(self, timeout_s: float) -> bool:
        """Wait for news since the last `wait`; False after the timeout."""
        with self._changed:
            self._changed.wait_for(lambda: self._news, timeout_s)
            news, self._news = self._news, False
            return news

    def wake(self) -> None:
        """Say that there is news (lock held)."""
        self._news = True
        self._changed.notify_all()


class Watch:
    """Who waits for news about which job. Keeps nothing about jobs that nobody follows."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._followers: dict[str, set[Follower]] = {}
        self._closed = False

    @contextlib.contextmanager
    def follow(self, job_id: str) -> Iterator[Follower]:
        """A follower inside the block: no commit that comes after its beginning is missed."""
        follower = Follower(self._lock)
        with self._lock:
            self._followers.setdefault(job_id, set()).add(follower)
        try:
            yield follower
        finally:
            with self._lock:
                others = self._followers[job_id]
                others.discard(follower)
                if not others:
                    del self._followers[job_id]

    def touch(self, job_ids: Sequence[str]) -> None:
        """Something about these jobs was committed."""
        with self._lock:
            for job_id in job_ids:
                for follower in self._followers.get(job_id, ()):
                    follower.wake()

    def forget(self, job_id: str) -> None:
        """The job was deleted: its followers find that out now."""
        self.touch([job_id])

    def close(self) -> None:
        """Wake everybody for the last time."""
        with self._lock:
            self._closed = True
            for followers in self._followers.values():
                for follower in followers:
                    follower.wake()

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def num_jobs(self) -> int:
        """How many jobs are followed."""
        return len(self._followers)


_Item = tuple[LiveJob, int, int, Event]  # job, its generation, question, event
_Report = Callable[[], str]  # why the pipeline failed, or nothing when another one runs by now


class Recorder:
    """The committing thread. `close` commits what is queued and ends it; may be called twice."""

    def __init__(self, store: JobStore, watch: Watch, on_broken: Callable[[str], None]) -> None:
        self._store = store
        self._watch = watch
        self._on_broken = on_broken
        self._closing = threading.Event()
        self._queue: queue.SimpleQueue[_Item | _Report | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self.commit_seconds = 0.0
        self.num_commits = 0

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def callback(self, job: LiveJob, question: int) -> Callable[[Event], None]:
        """What the engine calls for one question of a job."""
        generation = job.generation
        return lambda event: self._queue.put((job, generation, question, event))

    def report(self, failure: _Report) -> None:
        """The pipeline failed, maybe while no job ran; asked for the error when its last tokens are committed."""
        self._queue.put(failure)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            items: list[_Item | _Report] = [item]
            while not self._queue.empty():
                following = self._queue.get()
                if following is None:
                    self._commit(items)
                    return
                items.append(following)
            self._commit(items)

    def _commit(self, queued: Sequence[_Item | _Report]) -> None:
        if events := [item for item in queued if isinstance(item, tuple)]:
            self._commit_events(events)
        for report in queued:
            if not isinstance(report, tuple) and (error := report()):
                self._on_broken(error)

    def _commit_events(self, items: Sequence[_Item]) -> None:
        tokens: list[tuple[str, JobToken]] = []
        states: list[StateChange] = []
        answers: list[tuple[str, JobAnswer]] = []
        ended: list[tuple[LiveJob, JobState]] = []
        for job, generation, question, event in items:
            if generation != job.generation:
                continue  # of a pipeline that is gone
            if isinstance(event, Progress):
                job.progress[question] = event
                states.append((job.job_id, frozenset({JobState.QUEUED, JobState.RECOVERING}), JobState.PREFILLING))
            elif isinstance(event, TokenEvent):
                job.last_event += 1
                job.generated[question] = job.generated.get(question, 0) + 1
                sample = event.token
                token = JobToken(job.last_event, question, sample.token_id, event.text, sample.logprob, sample.top)
                tokens.append((job.job_id, token))
                if not job.decodes:
                    job.decodes = True
                    states.append((job.job_id, frozenset({JobState.PREFILLING}), JobState.DECODING))
            elif event.finish_reason is not FinishReason.ERROR:  # of a failure there is a report
                answers.append((job.job_id, _answer(question, event, detailed=len(job.ended) < _DETAILED)))
                job.ended[question] = event.finish_reason
                if len(job.ended) == job.num_answers:
                    final = _final_state(job)
                    states.append((job.job_id, ACTIVE, final))
                    ended.append((job, final))
        began = time.perf_counter()
        self._write(tokens, states, answers)
        self.commit_seconds += time.perf_counter() - began
        self.num_commits += 1
        for job, final in ended:
            job.on_end(final)
        self._watch.touch(list({job.job_id for job, *_ in items}))

    def _write(
        self, tokens: Sequence[tuple[str, JobToken]], states: Sequence[StateChange],
        answers: Sequence[tuple[str, JobAnswer]],
    ) -> None:  # fmt: skip
        """Commit, however long the disk refuses: jobs wait for it and lose nothing. Raises only when closing."""
        while True:
            try:
                self._store.commit_step(tokens, states, answers)
                return
            except JobStoreError as error:
                if not isinstance(error.__cause__, (sqlite3.Error, OSError)):
                    raise  # a step that does not follow the last one: our own bug
                _log.error("%s; trying again", error)
                if self._closing.wait(_RETRY_S):
                    raise


def _answer(question: int, result: Generation, detailed: bool) -> JobAnswer:
    attention = result.attention.to_json() if result.attention else {}
    if not detailed:
        attention.pop("layers", None)
    return JobAnswer(
        question=question,
        prompt_tokens=result.prompt_tokens,
        cached_tokens=result.cached_tokens,
        finish_reason=result.finish_reason.value,
        text=result.text,
        reasoning=result.reasoning,
        timings=asdict(result.timings),
        attention=attention,
    )


def _final_state(job: LiveJob) -> JobState:
    if FinishReason.CANCELLED in job.ended.values():
        return JobState.CANCELLED
    return JobState.SUCCEEDED


def committed_tokens(store: JobStore, job_id: str) -> dict[int, list[SampledToken]]:
    """What a job has already, by question: it is queued again after them."""
    done: dict[int, list[SampledToken]] = {}
    after = 0
    while page := store.tokens(job_id, after, _PAGE):
        for token in page:
            done.setdefault(token.question, []).append(SampledToken(0, token.token_id, token.logprob, token.top))
        after = page[-1].number
    return done
