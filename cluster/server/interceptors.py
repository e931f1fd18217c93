"""What stands around every method of a gRPC server: strict parsing, a bound on long calls, errors as status codes.

Nothing else reaches clients: no traceback, no UNKNOWN; INTERNAL only with a reference to the log.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from cluster.common.text_format import escape_unprintable
from cluster.jobs.model import Busy, Conflict, InvalidJob, JobError, NotAllowedNow, NotFound

_MAX_DETAILS = 1000  # characters; details travel as a header
_CODES: dict[type[JobError], grpc.StatusCode] = {
    InvalidJob: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    Conflict: grpc.StatusCode.ALREADY_EXISTS,
    NotAllowedNow: grpc.StatusCode.FAILED_PRECONDITION,
    Busy: grpc.StatusCode.RESOURCE_EXHAUSTED,
}

_log = logging.getLogger(__name__)


class Places:
    """A bounded number of calls at a time; a context manager for any thread that raises Busy when all are taken."""

    def __init__(self, count: int, what: str) -> None:
        self._free = threading.BoundedSemaphore(count)
        self._message = f"{count} long calls are open, the limit ({what}): try again, or close one"

    def __enter__(self) -> None:
        if not self._free.acquire(blocking=False):
            raise Busy(self._message, 1.0)

    def __exit__(self, *_: object) -> None:
        self._free.release()


class Boundary(grpc.ServerInterceptor):
    """Wraps every method of every service."""

    def __init__(
        self, streams: Places, waiting: Collection[str], own: Mapping[str, tuple[Places, ThreadPoolExecutor]]
    ) -> None:
        """
        Args:
            streams: taken by calls with streams of messages, which may last for hours.
            waiting: methods of one message each way that may last for hours too.
            own: services with places and threads of their own, by name.
        """
        self._streams = streams
        self._waiting = frozenset(waiting)
        self._own = own

    def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Any], details: grpc.HandlerCallDetails
    ) -> Any:
        handler = continuation(details)
        if handler is None:
            return None  # UNIMPLEMENTED
        method = details.method
        places, pool = self._own.get(method.split("/")[1], (self._streams, None))
        is_long = handler.request_streaming or handler.response_streaming or method in self._waiting
        return _guard(handler, method, places if is_long else contextlib.nullcontext(), pool)


def _guard(
    handler: Any, method: str, places: contextlib.AbstractContextManager[None], pool: ThreadPoolExecutor | None
) -> Any:
    """A handler of the same kind that takes bytes: gRPC itself would answer broken ones with INTERNAL."""
    name = "_".join("stream" if many else "unary" for many in (handler.request_streaming, handler.response_streaming))
    behave = getattr(handler, name)

    def parse(raw: bytes) -> Any:
        try:
            return handler.request_deserializer(raw)
        except DecodeError as error:
            raise InvalidJob("request: not a message of this method (malformed protobuf)") from error

    def argument(raw: Any) -> Any:
        return map(parse, raw) if handler.request_streaming else parse(raw)

    def unary(raw: Any, context: grpc.ServicerContext) -> Any:
        with _StatusCodes(method, context), places:
            return behave(argument(raw), context)

    def stream(raw: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        with _StatusCodes(method, context), places:
            yield from behave(argument(raw), context)

    guarded: Any = stream if handler.response_streaming else unary
    if pool is not None:
        guarded.experimental_thread_pool = pool
    make = getattr(grpc, f"{name}_rpc_method_handler")
    return make(guarded, request_deserializer=None, response_serializer=handler.response_serializer)


class _StatusCodes:
    """Ends the call with the status of the error that leaves the block."""

    def __init__(self, method: str, context: grpc.ServicerContext) -> None:
        self._method = method
        self._context = context

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):  # not when the generator is closed
            code, details = self._status(error)
            if isinstance(error, Busy):
                retry_ms = max(1, round(error.retry_after_s * 1000))
                self._context.set_trailing_metadata((("retry-after-ms", str(retry_ms)),))
            self._context.abort(code, details)  # raises

    def _status(self, error: Exception) -> tuple[grpc.StatusCode, str]:
        for kind, code in _CODES.items():
            if isinstance(error, kind):
                return code, escape_unprintable(str(error))[:_MAX_DETAILS]
        if isinstance(error, NotImplementedError):
            return grpc.StatusCode.UNIMPLEMENTED, "this method is not implemented here"
        if not self._context.is_active():
            return grpc.StatusCode.CANCELLED, "the client has gone"
        reference = secrets.token_hex(4)
        _log.error("%s failed, reference %s", self._method, reference, exc_info=error)
        return grpc.StatusCode.INTERNAL, f"internal error, reference {reference}: see the log of the head"
