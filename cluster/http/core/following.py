"""Submit a job and follow it for a client: what comes ends with the job, and the job ends when the client goes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

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
_KEEP_ALIVE = b": keep-alive\n\n"
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Followed:
    """A job that one request follows; one that belongs to the request is cancelled with it unless it has ended by then.

    Attributes:
        record: the job, at last as it ended.
    """

    def __init__(self, backend: Backend, record: JobRecord, after: int = 0, is_own: bool = True) -> None:
        """
        Args:
            after: number of the token after which its events begin.
            is_own: whether the job belongs to the request.

        Raises InvalidJob: there is no such token yet.
        """
        self.record = record
        self._backend = backend
        self._is_own = is_own
        self._stream = backend.service.stream(record.id, after)
        # the first event at once: from then on the job counts as followed
        self._pull: Future[JobEvent | bool] = backend.followers.submit(next, self._stream, False)

    async def events(self) -> AsyncIterator[JobEvent]:
        """Yield the events of the job until it has ended; called once.

        None, at least every two seconds, says that there is nothing new. Raises ApiError: the head is stopping.
        """
        while True:
            event = await asyncio.wrap_future(self._pull)
            if event is False:
                problem = "the head is stopping: ask again in a moment"
                raise ApiError(503, problem, kind=SERVER, code="stopping", retry_after_s=5.0)
            if isinstance(event, JobRecord):
                self.record = event
            yield event  # type: ignore[misc]
            if self.record.state.is_final:
                return
            self._pull = self._backend.followers.submit(next, self._stream, False)

    def leave(self) -> None:
        """Let a thread end what is left."""
        with suppress(RuntimeError):  # the head is stopping
            self._backend.followers.submit(self._leave)

    def _leave(self) -> None:
        try:
            if self._is_own and not self.record.state.is_final:
                self._backend.service.cancel(self.record.id)  # wakes the thread that waits for news
            if not self._pull.cancel():
                with suppress(Exception):  # was raised to who asked for it
                    self._pull.result()
            self._stream.close()
        except JobError as error:
            _log.warning("job %s: cannot be left: %s", self.record.id, one_line(error))
        except Exception:  # noqa: BLE001 - nobody waits for this
            _log.exception("job %s: cannot be left", self.record.id)


async def submit(backend: Backend, request: Request, make_spec: Callable[[], JobSpec]) -> Followed:
    """Return the job of a request, stored and queued. Raises what making the spec and submitting raise.

    Args:
        make_spec: called in a thread.
    """
    call = call_of(request)
    record = await backend.call(lambda: backend.service.submit(make_spec(), call.key_name))
    followed = Followed(backend, record)
    call.at_end(followed.leave)
    _log.info("%s %s by %s", request.url.path, record.id, call.caller)
    return followed


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
        self, pieces: AsyncIterator[bytes], show_error: Callable[[Exception], bytes], last: bytes = b"data: [DONE]\n\n"
    ) -> None:
        """
        Args:
            pieces: whole events, b"" where there is nothing to say.
            show_error: returns the event of an error.
            last: what ends the stream, however it ends.
        """
        self._pieces = pieces
        self._show_error = show_error
        self._last = last
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
                piece = _KEEP_ALIVE
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            quiet_since = now
