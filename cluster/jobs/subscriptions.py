"""Following jobs: streams that begin at any token, and waiting. Followers read the store; nothing is kept for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping

from cluster.engine.outputs import Progress
from cluster.jobs.api import JobEvent, ProgressUpdate
from cluster.jobs.model import JobRecord, JobState
from cluster.jobs.recorder import Follower, Watch
from cluster.jobs.store import JobStore

HEARTBEAT_S = 10.0  # a stream repeats the progress at least this often
_PAGE = 500  # tokens read at once


class Following:
    """Who follows which job. A slow reader holds one position in the store, and no memory."""

    def __init__(
        self, store: JobStore, watch: Watch, get: Callable[[str], JobRecord],
        progress: Callable[[str], Mapping[int, Progress]], on_alone: Callable[[str], None],
    ) -> None:  # fmt: skip
        """Args: `on_alone` is called when the last follower of an attached job has gone."""
        self._store = store
        self._watch = watch
        self._get = get
        self._progress = progress
        self._on_alone = on_alone
        self._lock = threading.Lock()
        self._followers: dict[str, int] = {}

    def is_followed(self, job_id: str) -> bool:
        return job_id in self._followers

    def wait(self, job_id: str, timeout_s: float) -> JobRecord:
        """The job once it has ended, or as it is after `timeout_s`."""
        until = time.monotonic() + timeout_s
        with self._watch.follow(job_id) as follower:
            while True:
                record = self._get(job_id)
                left = until - time.monotonic()
                if record.state.is_final or left <= 0 or self._watch.closed:
                    return record
                follower.wait(min(left, HEARTBEAT_S))

    def events(self, job_id: str, after: int, attached: bool) -> Iterator[JobEvent]:
        """Tokens after `after` in groups, progress and changes of state in between; ends with the ended job."""
        with self._lock:
            self._followers[job_id] = self._followers.get(job_id, 0) + 1
        try:
            with self._watch.follow(job_id) as follower:
                yield from self._news(job_id, after, follower)
        finally:
            self._leave(job_id, attached)

    def _news(self, job_id: str, after: int, follower: Follower) -> Iterator[JobEvent]:
        state: JobState | None = None
        shown: dict[int, Progress] = {}
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
            if self._watch.closed:
                return
            if not follower.wait(HEARTBEAT_S):
                shown.clear()

    def _leave(self, job_id: str, attached: bool) -> None:
        with self._lock:
            self._followers[job_id] -= 1
            alone = not self._followers[job_id]
            if alone:
                del self._followers[job_id]
        if attached and alone and not self._watch.closed:
            self._on_alone(job_id)
