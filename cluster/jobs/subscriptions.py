"""Streams of a job's events that begin at any token, and waiting for its end.

Subscribers read the store: a slow one holds one position in it, and no memory.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.engine.outputs import OutputToken, PrefillProgress
from cluster.jobs.model import JobRecord, JobState
from cluster.jobs.store import JobStore

HEARTBEAT_S = 10.0  # a stream repeats the progress at least this often
_PAGE = 500  # tokens read at once
_POLL_S = 2.0  # how soon a stream without news can be left


@dataclass(frozen=True, slots=True)
class ProgressUpdate:
    """Prefill of one question of a job."""

    question: int
    progress: PrefillProgress


JobEvent = ProgressUpdate | Sequence[OutputToken] | JobRecord | None  # None: nothing new, the stream may be left


class Subscriptions:
    """Serves streams and waits of many clients on many jobs; all methods may be called from any thread.

    Keeps nothing about jobs that nobody follows or waits for.
    """

    def __init__(
        self, store: JobStore, get: Callable[[str], JobRecord],
        progress: Callable[[str], Mapping[int, PrefillProgress]], on_unfollowed: Callable[[str], None],
    ) -> None:  # fmt: skip
        """
        Args:
            get: reads a job; raises JobNotFound.
            progress: newest prefill progress of a job by question.
            on_unfollowed: called when the last stream of an attached job has ended.
        """
        self._store = store
        self._get = get
        self._progress = progress
        self._on_unfollowed = on_unfollowed
        self._lock = threading.Lock()
        self._subscribers: dict[str, set[threading.Event]] = {}  # by job, as `_num_streams`
        self._num_streams: Counter[str] = Counter()
        self._closed = False

    def notify(self, job_ids: Iterable[str]) -> None:
        """Wake the subscribers of these jobs: something about them was committed, or they were deleted."""
        with self._lock:
            for job_id in job_ids:
                for changed in self._subscribers.get(job_id, ()):
                    changed.set()

    def close(self) -> None:
        """Wake everybody for the last time."""
        self._closed = True
        self.notify(list(self._subscribers))

    def is_followed(self, job_id: str) -> bool:
        """Whether a stream of the job is open."""
        return job_id in self._num_streams

    def wait(self, job_id: str, timeout_s: float) -> JobRecord:
        """Return the job once it has ended, or as it is after `timeout_s`."""
        until = time.monotonic() + timeout_s
        with self._subscribe(job_id) as changed:
            while True:
                changed.clear()
                record = self._get(job_id)
                left = until - time.monotonic()
                if record.state.is_final or left <= 0 or self._closed:
                    return record
                changed.wait(min(left, HEARTBEAT_S))

    def events(self, job_id: str, after: int, attached: bool) -> Generator[JobEvent]:
        """Yield tokens after `after` in groups, progress and changes of state in between; ends with the ended job."""
        with self._lock:
            self._num_streams[job_id] += 1
        try:
            with self._subscribe(job_id) as changed:
                yield from self._follow(job_id, after, changed)
        finally:
            with self._lock:
                self._num_streams[job_id] -= 1
                is_last = not self._num_streams[job_id]
                if is_last:
                    del self._num_streams[job_id]
            if attached and is_last and not self._closed:
                self._on_unfollowed(job_id)

    @contextlib.contextmanager
    def _subscribe(self, job_id: str) -> Iterator[threading.Event]:
        """Yield an event that is set at every change of the job; the subscriber clears it, then reads the store."""
        changed = threading.Event()
        with self._lock:
            self._subscribers.setdefault(job_id, set()).add(changed)
        try:
            yield changed
        finally:
            with self._lock:
                others = self._subscribers[job_id]
                others.discard(changed)
                if not others:
                    del self._subscribers[job_id]

    def _follow(self, job_id: str, after: int, changed: threading.Event) -> Iterator[JobEvent]:
        state: JobState | None = None
        shown: dict[int, PrefillProgress] = {}
        while True:
            changed.clear()
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
            if self._closed:
                return
            until = time.monotonic() + HEARTBEAT_S
            while not changed.wait(_POLL_S) and time.monotonic() < until:
                yield None
            if not changed.is_set():
                shown.clear()
