"""The stream of a response: numbered events that can be read again from any number on.

Numbers follow from what is stored of the job alone: `created`, `queued` in the background, `in_progress`, then what the
tokens of the answer say one by one (see `OutputWriter`), then the end. Another head counts the same. Progress has no
number of its own: it repeats `in_progress` under the number of the event before it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from cluster.engine.outputs import PrefillProgress
from cluster.http.core.backend import Backend
from cluster.http.core.errors import to_api_error
from cluster.http.core.following import KEEP_ALIVE_S, Followed, check_outcome
from cluster.http.core.sse import named_event
from cluster.http.responses.output import Event
from cluster.http.responses.response import (
    has_answer,
    has_started,
    is_complete,
    make_writer,
    said_of,
    show_response,
    status_of,
)
from cluster.jobs.subscriptions import ProgressUpdate

_PROGRESS_S = 1.0  # between events about progress, each of which has the whole response in it
_PROGRESS_RATE = 1 << 17  # characters a second that long instructions and many tools may take for it


class ResponseStream:
    """One reader of one response."""

    def __init__(self, backend: Backend, job: Followed, after: int = -1) -> None:
        """
        Args:
            after: the number of the last event that the client has.
        """
        self._job = job
        self._after = after
        self._writer = make_writer(backend, job.record)
        self._is_background = bool(said_of(job.record)["background"])
        self._count = 0  # of the numbered events so far
        self._has_begun = False  # `in_progress` was said
        self._next_progress = 0.0

    async def whole(self) -> dict[str, Any]:
        """Return the response once it has ended. Raises ApiError: it failed."""
        async for news in self._job.events():
            if isinstance(news, Sequence):
                for token in news:
                    self._writer.push(token)
        check_outcome(self._job.record)
        self._writer.end(is_complete(self._job.record))
        return show_response(self._job.record, self._writer)

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield the events as they come, b"" where there is nothing new. Raises ApiError: the head is stopping."""
        yield self._first()
        async for news in self._job.events():
            if isinstance(news, Sequence):
                yield self._begin() + b"".join(self._number(e) for token in news for e in self._writer.push(token))
            elif isinstance(news, ProgressUpdate):
                yield self._begin() + self._progress(news.progress)
            elif has_started(self._job.record):
                yield self._begin()
            else:
                yield b""
        yield self._begin() + self._last()

    def error_event(self, error: Exception) -> bytes:
        """Return the event of an error that is not the end of the response."""
        shown = to_api_error(error)
        problem = {"code": shown.code, "message": shown.message, "param": shown.param}
        return named_event({"type": "error", **problem, "sequence_number": self._newest})

    @property
    def _newest(self) -> int:
        """The number of the newest event that the client has."""
        return max(self._count - 1, self._after)

    def _first(self) -> bytes:
        status = "queued" if self._is_background else "in_progress"
        said = self._lifecycle("created", status)
        return said + (self._lifecycle("queued", status) if self._is_background else self._begin())

    def _begin(self) -> bytes:
        """Return the event that the response is in progress, once."""
        if self._has_begun:
            return b""
        self._has_begun = True
        return self._lifecycle("in_progress", "in_progress")

    def _progress(self, progress: PrefillProgress) -> bytes:
        now = time.monotonic()
        if now < self._next_progress:
            return b""
        pause_s = max(_PROGRESS_S, len(self._job.record.spec.request) / _PROGRESS_RATE)
        self._next_progress = now + min(pause_s, KEEP_ALIVE_S)
        response = show_response(self._job.record, self._writer, progress, "in_progress")
        return named_event({"type": "response.in_progress", "response": response, "sequence_number": self._newest})

    def _last(self) -> bytes:
        record = self._job.record
        events = self._writer.end(is_complete(record), not has_answer(record))
        name = status_of(record) if has_answer(record) else "failed"  # of a cancelled one too: nothing else is known
        return b"".join(map(self._number, events)) + self._lifecycle(name)

    def _lifecycle(self, name: str, status: str = "") -> bytes:
        if self._count <= self._after:  # the object is not made for nothing
            self._count += 1
            return b""
        return self._number({
            "type": f"response.{name}", "response": show_response(self._job.record, self._writer, status=status),
        })  # fmt: skip

    def _number(self, event: Event) -> bytes:
        number = self._count
        self._count += 1
        return named_event({**event, "sequence_number": number}) if number > self._after else b""
