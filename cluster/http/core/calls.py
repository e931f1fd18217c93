"""One open HTTP request: who makes it, its place among the others, and how it is ended before its time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING

from fastapi import Request
from starlette.types import Scope

from cluster.access.call_pool import CallEnd, Caller, OpenCall
from cluster.http.core.backend import Backend
from cluster.http.core.errors import BUSY, SERVER, ApiError

if TYPE_CHECKING:
    from cluster.jobs.service import JobService

_SCOPE_KEY = "longreach.call"
_STATUS = {CallEnd.NO_ROOM: (429, BUSY), CallEnd.NOT_READ: (503, SERVER), CallEnd.NOT_SENT: (408, SERVER)}


class HttpCall:
    """A request from its first byte to the end of its response; lives on the event loop.

    Attributes:
        key_name: of the API key, empty without.
        ended: why the server has ended it, None while it has not.
    """

    def __init__(self, backend: Backend, caller: Caller, key_name: str) -> None:
        self.caller = caller
        self.key_name = key_name
        self.ended: ApiError | None = None
        self._backend = backend
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._places = ExitStack()
        self._at_end = ExitStack()
        self._open: OpenCall | None = None

    @property
    def service(self) -> JobService:
        """The job service as the caller sees it."""
        return self._backend.service

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place among the short calls, or the streams, until the end of the block. Raises ServiceBusy."""
        with self._places, self._at_end:
            self._open = self._places.enter_context(self._backend.short.open(self.caller, self._end))
            yield

    def become_stream(self) -> None:
        """Exchange the place for one among the calls that may last for hours. Raises ServiceBusy."""
        self._places.close()
        self._open = self._places.enter_context(self._backend.streams.open(self.caller, self._end))

    def at_end(self, callback: Callable[[], None]) -> None:
        """Call back once the response has ended, however it did."""
        self._at_end.callback(callback)

    def waiting(self, action: str) -> AbstractContextManager[None]:
        """Return a block in which the head waits for the client to "send" or to "read"."""
        return self._open.client(action) if self._open is not None else nullcontext()

    def _end(self, reason: CallEnd, details: str) -> None:
        """End the call, from any thread."""
        status, kind = _STATUS[reason]
        error = ApiError(status, details, kind=kind, code=reason.value, retry_after_s=1.0)
        self._loop.call_soon_threadsafe(self._cancel, error)

    def _cancel(self, error: ApiError) -> None:
        if self.ended is None and self._task is not None and not self._task.done():
            self.ended = error
            self._task.cancel()

    def attach(self, scope: Scope) -> None:
        """Let the routes find the call."""
        scope[_SCOPE_KEY] = self


def call_of(request: Request) -> HttpCall:
    """Return the call that a request belongs to."""
    call: HttpCall = request.scope[_SCOPE_KEY]
    return call
