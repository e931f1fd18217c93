"""Hand the body of a request to a blocking function piece by piece, as it comes, without holding it in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from typing import TypeVar

from fastapi import Request

from cluster.http.core.backend import Backend
from cluster.http.core.body import arriving
from cluster.http.core.calls import call_of
from cluster.http.core.errors import ApiError

_T = TypeVar("_T")


async def receive(backend: Backend, request: Request, take: Callable[[Iterator[bytes]], _T]) -> _T:
    """Return what `take` makes of the body, in a thread of its own; the call takes a place among the long ones.

    `take` gets ApiError from its iterator when the body is cut off or the request ends before its time.
    """
    call_of(request).become_stream()
    pieces = _Pieces(request)
    try:
        return await asyncio.get_running_loop().run_in_executor(backend.followers, take, pieces.iterate())
    finally:
        pieces.stop()


class _Pieces:
    """The pieces of a body for a thread that waits for each of them."""

    def __init__(self, request: Request) -> None:
        self._loop = asyncio.get_running_loop()
        self._pieces = arriving(request)
        self._next: Future[bytes | None] | None = None
        self._is_over = False

    def iterate(self) -> Iterator[bytes]:
        """Yield the pieces; called in a thread."""
        while True:
            self._next = asyncio.run_coroutine_threadsafe(self._pull(), self._loop)
            try:
                piece = self._next.result()
            except CancelledError as error:
                raise ApiError(400, "request: ended before its time") from error
            if piece is None:
                return
            yield piece

    async def _pull(self) -> bytes | None:
        if self._is_over:
            raise asyncio.CancelledError
        return await anext(self._pieces, None)

    def stop(self) -> None:
        """Let a thread that still waits go on with an error; called in the event loop."""
        self._is_over = True
        if self._next is not None:
            self._next.cancel()
