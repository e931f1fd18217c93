"""Streams of a job's events that begin at any token, and waiting for its end.

Subscribers read the store: a slow one holds one position in it, and no memory.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.engine.outputs import OutputToken, PrefillProgress
from cluster.jobs.model import JobRecord, JobState
from cluster.jobs.store import JobStore

HEARTBEAT_S = 10.0  # a stream repeats the progress at least this often
_PAGE = 500  # tokens read at once


@dataclass(frozen=True, slots=True)
class ProgressUpdate:
    """Prefill of one question of a job."""

    question: int
    progress: PrefillProgress


JobEvent = ProgressUpdate | Sequence[OutputToken] | JobRecord


class Subscription:
    """One subscriber of one job; `wait` returns at the next commit about this job, and at no other."""

    def __init__(self, lock: threading.Lock) -> None:
        self._condition = threading.Condition(lock)
        self._changed = False

    def wait(self, timeout_s: float) -> bool:
        """Wait for a change since the last `wait`; False after the timeout."""
        with self._condition:
            self._condition.wait_for(lambda: self._changed, timeout_s)
            changed, self._changed = self._changed, False
            return changed

    def notify(self) -> None:
        """Wake the subscriber (lock held)."""
        self._changed = True
        self._condition.notify_all()


class ChangeNotifier:
    """Wakes the subscribers of the jobs that changed. Keeps nothing about jobs without subscribers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._subscriptions: dict[str, set[Subscription]] = {}
        self.closed = False

    @contextlib.contextmanager
    def subscribe(self, job_id: str) -> Iterator[Subscription]:
        """Subscribe for the time of the block: no commit after its beginning is missed."""
        subscription = Subscription(self._lock)
        with self._lock:
            self._subscriptions.setdefault(job_id, set()).add(subscription)
        try:
            yield subscription
        finally:
            with self._lock:
                others = self._subscriptions[job_id]
                others.discard(subscription)
                if not others:
                    del self._subscriptions[job_id]

    def notify(self, job_ids: Sequence[str]) -> None:
        """Wake the subscribers of these jobs: something about them was committed, or they were deleted."""
        with self._lock:
            for job_id in job_ids:
                for subscription in self._subscriptions.get(job_id, ()):
                    subscription.notify()

    def close(self) -> None:
        """Wake everybody for the last time."""
        with self._lock:
            self.closed = True
            job_ids = list(self._subscriptions)
        self.notify(job_ids)


class Subscriptions:
    """Serves streams and waits of many clients on many jobs; all methods may be called from any thread."""

    def __init__(
        self, store: JobStore, changes: ChangeNotifier, get: Callable[[str], JobRecord],
        progress: Callable[[str], Mapping[int, PrefillProgress]], on_unfollowed: Callable[[str], None],
    ) -> None:  # fmt: skip
        """
        Args:
            get: reads a job; raises JobNotFound.
            progress: newest prefill progress of a job by question.
            on_unfollowed: called when the last stream of an attached job has ended.
        """
        self._store = store
        self._changes = changes
        self._get = get
        self._progress = progress
        self._on_unfollowed = on_unfollowed
        self._lock = threading.Lock()
        self._num_streams: dict[str, int] = {}  # by job

    def is_followed(self, job_id: str) -> bool:
        """Whether a stream of the job is open."""
        return job_id in self._num_streams

    def wait(self, job_id: str, timeout_s: float) -> JobRecord:
        """Return the job once it has ended, or as it is after `timeout_s`."""
        until = time.monotonic() + timeout_s
        with self._changes.subscribe(job_id) as subscription:
            while True:
                record = self._get(job_id)
                left = until - time.monotonic()
                if record.state.is_final or left <= 0 or self._changes.closed:
                    return record
                subscription.wait(min(left, HEARTBEAT_S))

    def events(self, job_id: str, after: int, attached: bool) -> Generator[JobEvent]:
        """Yield tokens after `after` in groups, progress and changes of state in between; ends with the ended job."""
        with self._lock:
            self._num_streams[job_id] = self._num_streams.get(job_id, 0) + 1
        try:
            with self._changes.subscribe(job_id) as subscription:
                yield from self._follow(job_id, after, subscription)
        finally:
            with self._lock:
                self._num_streams[job_id] -= 1
                is_last = not self._num_streams[job_id]
                if is_last:
                    del self._num_streams[job_id]
            if attached and is_last and not self._changes.closed:
                self._on_unfollowed(job_id)

    def _follow(self, job_id: str, after: int, subscription: Subscription) -> Iterator[JobEvent]:
        state: JobState | None = None
        shown: dict[int, PrefillProgress] = {}
        while True:
            record = None
            if self._store.state(job_id) is not state:  # the whole record has the prompt in it
                record = self._get(job_id)  # before the tokens: when it has ended, they are all there
            for question, progress in sorted(self._progress(job_id).items()):
                if shown.get(question) != progress:
                    shown[question] = progress
                    yield ProgressUpdate(question, progress)
            page = self._store.tokens(job_id, after, _PAGE)
            if page:
                after = page[-1].number
                yield page
            if len(page) == _PAGE:
                continue
            if record is not None:
                state = record.state
                yield record
                if state.is_final:
                    return
            if self._changes.closed:
                return
            if not subscription.wait(HEARTBEAT_S):
                shown.clear()
