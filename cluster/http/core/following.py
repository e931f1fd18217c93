"""Submit a job and follow it for a client: what comes ends with the job, and the job ends when the client goes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Protocol, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.common.text_format import one_line
from cluster.http.core.backend import Backend
from cluster.http.core.calls import call_of
from cluster.http.core.errors import SERVER, ApiError
from cluster.jobs.model import JobError, JobRecord, JobSpec, JobState
from cluster.jobs.subscriptions import JobEvent

KEEP_ALIVE_S = 10.0  # the longest silence of a stream
_EARLY_S = 2.0  # a stream is asked for news at least this often, so it says something so much before
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class JobEvents(Protocol):
    """A job of which an answer is made: its events come once, and its record is that of its end afterwards."""

    record: JobRecord

    def events(self) -> AsyncIterator[JobEvent]: ...


class Followed:
    """A job that one request follows.

    Attributes:
        record: the job, at last as it ended.
    """

    def __init__(
        self, backend: Backend, record: JobRecord, ends_job: bool = True, stream: Generator[JobEvent] | None = None
    ) -> None:
        """
        Args:
            ends_job: the job is cancelled at the end of the request, unless it has ended by then.
            stream: its events, where they do not begin with its first token.
        """
        self.record = record
        self._backend = backend
        self._ends_job = ends_job
        self._stream = stream
        # the first event at once: from then on the job counts as followed
        self._pull: Future[JobEvent | bool] = backend.followers.submit(self._next)

    def _next(self) -> JobEvent | bool:
        """Return the next event, False if there is none; blocks. The job is read here: it may have a long prompt."""
        if self._stream is None:
            self._stream = self._backend.service.stream(self.record.id)
        return next(self._stream, False)

    async def events(self) -> AsyncIterator[JobEvent]:
        """Yield the events of the job until the record of its end; called once.

        None, at least every two seconds, says that there is nothing new. Raises ApiError: the head is stopping.
        """
        while True:
            event = await asyncio.wrap_future(self._pull)
            if event is False:
                problem = "the head is stopping: ask again in a moment"
                raise ApiError(503, problem, kind=SERVER, code="stopping", retry_after_s=5.0)
            is_last = False
            if isinstance(event, JobRecord):
                self.record = event
                is_last = event.state.is_final
            yield event  # type: ignore[misc]
            if is_last:
                return
            self._pull = self._backend.followers.submit(self._next)

    def leave(self) -> None:
        """Let a thread end what is left."""
        with suppress(RuntimeError):  # the head is stopping
            self._backend.followers.submit(self._leave)

    def _leave(self) -> None:
        try:
            if self._ends_job and not self.record.state.is_final:
                self._backend.service.cancel(self.record.id)  # wakes the thread that waits for news
            if not self._pull.cancel():
                with suppress(Exception):  # was raised to who asked for it
                    self._pull.result()
            if self._stream is not None:
                self._stream.close()
        except JobError as error:
            _log.warning("job %s: cannot be left: %s", self.record.id, one_line(error))
        except Exception:  # noqa: BLE001 - nobody waits for this
            _log.exception("job %s: cannot be left", self.record.id)


async def store(backend: Backend, request: Request, make_spec: Callable[[], JobSpec]) -> JobRecord:
    """Return the job of a request, stored and queued. Raises what making the spec and submitting raise.

    Args:
        make_spec: called in a thread.
    """
    return await asyncio.wrap_future(_storing(backend, request, make_spec))


def _storing(backend: Backend, request: Request, make_spec: Callable[[], JobSpec]) -> Future[JobRecord]:
    """Have a thread store the job of a request."""
    service = call_of(request).service
    return backend.calls.submit(lambda: service.submit(make_spec()))


def follow(
    backend: Backend, request: Request, record: JobRecord, ends_job: bool, stream: Generator[JobEvent] | None = None
) -> Followed:
    """Return a job that is followed until the end of the request. Args: as of `Followed`."""
    followed = Followed(backend, record, ends_job, stream)
    call_of(request).at_end(followed.leave)
    return followed


async def submit(backend: Backend, request: Request, make_spec: Callable[[], JobSpec]) -> Followed:
    """Return the job of a request, which ends with the request. Args and errors: as of `store`.

    A client that goes while the job is being stored ends it too.
    """
    storing = _storing(backend, request, make_spec)
    try:
        record = await asyncio.wrap_future(storing)
    except asyncio.CancelledError:
        storing.add_done_callback(partial(_end_unseen, backend))
        raise
    return follow(backend, request, record, ends_job=True)


def _end_unseen(backend: Backend, storing: Future[JobRecord]) -> None:
    """End a job that was stored for a client who had gone; a submission that was given up or failed has none."""
    if storing.cancelled() or storing.exception() is not None:
        return
    job_id = storing.result().id
    try:
        backend.service.cancel(job_id)
    except JobError as error:
        _log.warning("job %s: cannot be left: %s", job_id, one_line(error))


async def submit_all(backend: Backend, request: Request, make_specs: Callable[[], Sequence[JobSpec]]) -> list[Followed]:
    """Return the jobs of a request, all of which end with it. Args and errors: as of `store`."""
    specs = await backend.call(make_specs)
    return [await submit(backend, request, partial(specs.__getitem__, at)) for at in range(len(specs))]


async def merge(sources: Sequence[AsyncIterator[_T]]) -> AsyncIterator[_T]:
    """Yield what several iterators do, as it comes. Raises what the first of them raises."""

    async def step(at: int) -> tuple[int, list[_T]]:
        async for piece in sources[at]:
            return at, [piece]
        return at, []

    if len(sources) == 1:
        async for piece in sources[0]:
            yield piece
        return
    pending = {asyncio.ensure_future(step(at)) for at in range(len(sources))}
    try:
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for at, pieces in sorted(task.result() for task in done):
                if pieces:
                    pending.add(asyncio.ensure_future(step(at)))
                    yield pieces[0]
    finally:
        for task in pending:
            task.cancel()


def check_outcome(record: JobRecord) -> None:
    """Refuse a job that has ended without an answer (ApiError)."""
    if record.state is JobState.FAILED:
        raise ApiError(500, record.error or "the job failed", kind=SERVER, code="job_failed")
    if record.state is JobState.CANCELLED:
        raise ApiError(409, "the job was cancelled", code="job_cancelled")


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """Cancel the block when the client goes; raises `ClientGone` then."""
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not gone:
            raise
        task.uncancel()
        raise ClientGone from None
    finally:
        watcher.cancel()


class ClientGone(Exception):
    """The client has closed its connection."""


async def collect(request: Request, work: Awaitable[_T]) -> _T:
    """Return the result of `work`; it is cancelled when the client goes (raises ClientGone)."""
    async with while_connected(request.receive):
        return await work


class EventStream(Response):
    """Server-sent events: whatever the iterator yields, a comment when it has nothing for a while, `[DONE]`.

    An error while it runs is one more event.
    """

    media_type = "text/event-stream"

    def __init__(
        self, pieces: AsyncIterator[bytes], show_error: Callable[[Exception], bytes],
        last: bytes = b"data: [DONE]\n\n", keep_alive: bytes = b": keep-alive\n\n",
    ) -> None:  # fmt: skip
        """
        Args:
            pieces: whole events, b"" where there is nothing to say.
            show_error: returns the event of an error.
            last: what ends the stream, however it ends.
            keep_alive: what is sent when nothing else has been for a while.
        """
        self._pieces = pieces
        self._show_error = show_error
        self._last = last
        self._keep_alive = keep_alive
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGone):
            async with while_connected(receive):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                try:
                    await self._send_all(send)
                    last = self._last
                except Exception as error:  # noqa: BLE001 - clients get an error object whatever it is
                    last = self._show_error(error) + self._last
                await send({"type": "http.response.body", "body": last})

    async def _send_all(self, send: Send) -> None:
        quiet_since = time.monotonic()
        async for piece in self._pieces:
            now = time.monotonic()
            if not piece:
                if now - quiet_since < KEEP_ALIVE_S - _EARLY_S:
                    continue
                piece = self._keep_alive
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            quiet_since = now
