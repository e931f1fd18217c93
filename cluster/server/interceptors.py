"""The interceptor around every method of the gRPC server: strict parsing, bounds on open calls, status codes.

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
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from cluster.access.call_pool import CallEnd, Caller, CallPool, EndCall, KeyRefused, OpenCall
from cluster.common.errors import JobStoreError, JobStoreFull
from cluster.common.text_format import escape_unprintable
from cluster.jobs.model import InvalidJob, JobConflict, JobNotFound, NotAllowedNow, NotReady, ServiceBusy
from cluster.server.wire import check_raw
from protos.errors import InvalidRequest

_MAX_DETAILS = 1000  # characters; details travel as a header
_RETRY_AFTER_S = 5.0  # of a store that cannot be used now
_CODES: dict[type[Exception], grpc.StatusCode] = {  # the first one that fits
    KeyRefused: grpc.StatusCode.UNAUTHENTICATED,
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    JobNotFound: grpc.StatusCode.NOT_FOUND,
    JobConflict: grpc.StatusCode.ALREADY_EXISTS,
    NotAllowedNow: grpc.StatusCode.FAILED_PRECONDITION,
    ServiceBusy: grpc.StatusCode.RESOURCE_EXHAUSTED,
    NotReady: grpc.StatusCode.UNAVAILABLE,
    JobStoreFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    JobStoreError: grpc.StatusCode.UNAVAILABLE,
}
_END_CODES = {
    CallEnd.NO_ROOM: grpc.StatusCode.RESOURCE_EXHAUSTED,
    CallEnd.NOT_READ: grpc.StatusCode.UNAVAILABLE,  # a reader may come back at once, at the token where it was
    CallEnd.NOT_SENT: grpc.StatusCode.DEADLINE_EXCEEDED,
    CallEnd.REVOKED: grpc.StatusCode.UNAUTHENTICATED,
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pools:
    """Where the calls of a service go: `long` ones, which may last for hours, and `short` ones.

    Attributes:
        running: bounds the short calls that run at a time; the others wait for their turn.
        threads: of the service alone; None: the server's.
    """

    long: CallPool
    short: CallPool
    running: threading.Semaphore
    threads: ThreadPoolExecutor | None = None


class CallGuard(grpc.ServerInterceptor):  # type: ignore[misc, unused-ignore]
    """Wraps every method of every service; see the module."""

    def __init__(
        self, pools: Pools, long_methods: Collection[str], own: Mapping[str, Pools],
        identify: Callable[[grpc.ServicerContext], Caller],
    ) -> None:  # fmt: skip
        """
        Args:
            long_methods: methods of one message each way that may last for hours, as those with streams may.
            own: services with pools of their own, by name.
            identify: says who makes a call.
        """
        self._pools = pools
        self._long_methods = frozenset(long_methods)
        self._own = own
        self._identify = identify

    def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Any], details: grpc.HandlerCallDetails
    ) -> Any:
        handler = continuation(details)
        if handler is None:
            return None  # UNIMPLEMENTED
        pools = self._own.get(details.method.split("/")[1], self._pools)
        is_long = handler.request_streaming or handler.response_streaming or details.method in self._long_methods
        return _guard(handler, details.method, pools, is_long, self._identify)


def _guard(
    handler: Any, method: str, pools: Pools, is_long: bool, identify: Callable[[grpc.ServicerContext], Caller]
) -> Any:
    """Return a handler of the same method that takes its messages itself.

    gRPC would answer broken ones with INTERNAL, and would wait for the message of a call for ever.
    """
    name = "_".join("stream" if many else "unary" for many in (handler.request_streaming, handler.response_streaming))
    behavior = getattr(handler, name)
    pool, running = (pools.long, contextlib.nullcontext()) if is_long else (pools.short, pools.running)

    def messages(raw: Iterator[bytes], call: OpenCall) -> Iterator[Any]:
        while True:
            with call.client("send"):
                data = next(raw, None)
            if call.is_ended:
                raise InvalidJob("request: cut off")
            if data is None:
                return
            check_raw(method, data)
            try:
                yield handler.request_deserializer(data)
            except DecodeError as error:
                raise InvalidJob("request: not a message of this method (malformed protobuf)") from error

    def argument(raw: Iterator[bytes], call: OpenCall) -> Any:
        parsed = messages(raw, call)
        if handler.request_streaming:
            return parsed
        for message in parsed:
            return message
        raise InvalidJob("request: (missing): must be one message")

    def unary(raw: Iterator[bytes], context: grpc.ServicerContext) -> Any:
        with _status_codes(method, context):
            with pool.open(identify(context), _ending(context)) as call:
                request = argument(raw, call)
                with running:
                    reply = behavior(request, context)
            return reply

    def stream(raw: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[Any]:
        with _status_codes(method, context), pool.open(identify(context), _ending(context)) as call:
            for reply in behavior(argument(raw, call), context):
                with call.client("read"):
                    yield reply

    guarded: Any = stream if handler.response_streaming else unary
    if pools.threads is not None:
        guarded.experimental_thread_pool = pools.threads
    make = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
    return make(guarded, request_deserializer=None, response_serializer=handler.response_serializer)


def _ending(context: grpc.ServicerContext) -> EndCall:
    """Return what ends a call with a status, from any thread."""

    def end(reason: CallEnd, details: str) -> None:
        try:  # `ServicerContext.abort` is for the call's own thread, and `cancel` has no status
            context._rpc_event.call.cancel(_END_CODES[reason].value[0], details)
        except (AttributeError, TypeError):  # another grpc: the client then sees CANCELLED
            context.cancel()

    return end


@contextlib.contextmanager
def _status_codes(method: str, context: grpc.ServicerContext) -> Iterator[None]:
    """End the call with the status of the error that leaves the block."""
    try:
        yield
    except Exception as raised:  # noqa: BLE001 - clients get a status whatever it is; closing a generator is none
        error = _of_the_store(raised)
        if isinstance(error, (ServiceBusy, NotReady, JobStoreError)):
            retry_after_s = _RETRY_AFTER_S if isinstance(error, JobStoreError) else error.retry_after_s
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
