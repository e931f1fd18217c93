"""The interceptor around every method of the gRPC server: strict parsing, a bound on long calls, status codes.

Nothing else reaches clients: no traceback, no UNKNOWN; INTERNAL only with a reference to the log.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import secrets
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from cluster.common.errors import JobStoreError, JobStoreFull
from cluster.common.text_format import escape_unprintable
from cluster.jobs.model import InvalidJob, JobConflict, JobNotFound, NotAllowedNow, ServiceBusy
from protos.errors import InvalidRequest

_MAX_DETAILS = 1000  # characters; details travel as a header
_RETRY_AFTER_S = 5.0  # of a store that cannot be used now
_CODES: dict[type[Exception], grpc.StatusCode] = {  # the first one that fits
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    JobNotFound: grpc.StatusCode.NOT_FOUND,
    JobConflict: grpc.StatusCode.ALREADY_EXISTS,
    NotAllowedNow: grpc.StatusCode.FAILED_PRECONDITION,
    ServiceBusy: grpc.StatusCode.RESOURCE_EXHAUSTED,
    JobStoreFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    JobStoreError: grpc.StatusCode.UNAVAILABLE,
}

_log = logging.getLogger(__name__)


class ConcurrencyLimit:
    """Bounds the number of calls at a time: a context manager for any thread that raises ServiceBusy at the limit."""

    def __init__(self, count: int, what: str) -> None:
        self._free = threading.BoundedSemaphore(count)
        self._message = f"{count} long calls are open, the limit ({what}): try again, or close one"

    def __enter__(self) -> None:
        if not self._free.acquire(blocking=False):
            raise ServiceBusy(self._message, 1.0)

    def __exit__(self, *_: object) -> None:
        self._free.release()


class CallGuard(grpc.ServerInterceptor):  # type: ignore[misc, unused-ignore]
    """Wraps every method of every service; see the module."""

    def __init__(
        self, streams: ConcurrencyLimit, long_methods: Collection[str],
        own: Mapping[str, tuple[ConcurrencyLimit, ThreadPoolExecutor]],
    ) -> None:  # fmt: skip
        """
        Args:
            streams: the limit of calls with streams of messages, which may last for hours.
            long_methods: methods of one message each way that may last for hours too.
            own: services with a limit and threads of their own, by name.
        """
        self._streams = streams
        self._long_methods = frozenset(long_methods)
        self._own = own

    def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Any], details: grpc.HandlerCallDetails
    ) -> Any:
        handler = continuation(details)
        if handler is None:
            return None  # UNIMPLEMENTED
        limit, pool = self._own.get(details.method.split("/")[1], (self._streams, None))
        is_long = handler.request_streaming or handler.response_streaming or details.method in self._long_methods
        return _guard(handler, details.method, limit if is_long else contextlib.nullcontext(), pool)


def _guard(
    handler: Any, method: str, limit: contextlib.AbstractContextManager[None], pool: ThreadPoolExecutor | None
) -> Any:
    """Return a handler of the same kind that parses requests itself: gRPC would answer broken ones with INTERNAL."""
    name = "_".join("stream" if many else "unary" for many in (handler.request_streaming, handler.response_streaming))
    behavior = getattr(handler, name)

    def parse(raw: bytes) -> Any:
        try:
            return handler.request_deserializer(raw)
        except DecodeError as error:
            raise InvalidJob("request: not a message of this method (malformed protobuf)") from error

    def argument(raw: Any) -> Any:
        return map(parse, raw) if handler.request_streaming else parse(raw)

    def unary(raw: Any, context: grpc.ServicerContext) -> Any:
        with _status_codes(method, context), limit:
            return behavior(argument(raw), context)

    def stream(raw: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        with _status_codes(method, context), limit:
            yield from behavior(argument(raw), context)

    guarded: Any = stream if handler.response_streaming else unary
    if pool is not None:
        guarded.experimental_thread_pool = pool
    make = getattr(grpc, f"{name}_rpc_method_handler")
    return make(guarded, request_deserializer=None, response_serializer=handler.response_serializer)


@contextlib.contextmanager
def _status_codes(method: str, context: grpc.ServicerContext) -> Iterator[None]:
    """End the call with the status of the error that leaves the block."""
    try:
        yield
    except Exception as raised:  # noqa: BLE001 - clients get a status whatever it is; closing a generator is none
        error = _of_the_store(raised)
        if isinstance(error, (ServiceBusy, JobStoreError)):
            retry_after_s = error.retry_after_s if isinstance(error, ServiceBusy) else _RETRY_AFTER_S
            context.set_trailing_metadata((("retry-after-ms", str(max(1, round(retry_after_s * 1000)))),))
        if isinstance(error, JobStoreError):
            _log.error("%s: %s", method, error)
        context.abort(*_status(error, method, context))  # raises


def _of_the_store(error: Exception) -> Exception:
    """Return an error of the disk or of SQLite that nobody has explained as one of the store; others as they are."""
    if isinstance(error, (OSError, sqlite3.Error)):
        kind = JobStoreFull if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) else JobStoreError
        return kind(f"the head cannot do this now: {getattr(error, 'strerror', None) or error}")
    return error


def _status(error: Exception, method: str, context: grpc.ServicerContext) -> tuple[grpc.StatusCode, str]:
    for kind, code in _CODES.items():
        if isinstance(error, kind):
            return code, escape_unprintable(str(error))[:_MAX_DETAILS]
    if isinstance(error, NotImplementedError):
        return grpc.StatusCode.UNIMPLEMENTED, "this method is not implemented here"
    if not context.is_active():
        return grpc.StatusCode.CANCELLED, "the client has gone"
    reference = secrets.token_hex(4)
    _log.error("%s failed, reference %s", method, reference, exc_info=error)
    return grpc.StatusCode.INTERNAL, f"internal error, reference {reference}: see the log of the head"
