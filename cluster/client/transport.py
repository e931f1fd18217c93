"""gRPC under the clients: channel, metadata, errors by type. The only client module that imports grpc.

Every call may be repeated safely: Submit carries an idempotency key, uploads are content-addressed, the rest reads or
is idempotent. So UNAVAILABLE is tried again with backoff everywhere, by the clients.
"""

from __future__ import annotations

from typing import Any

import grpc

from cluster.client.connection import Connection
from cluster.client.errors import (
    START_HINT,
    Busy,
    Conflict,
    InvalidRequest,
    LongreachError,
    NotFound,
    TlsError,
    Unauthenticated,
    Unavailable,
)
from cluster.client.tls import explain_failure, is_handshake_failure, read_files
from cluster.common.text_format import one_line
from protos.jobs.jobs_pb2_grpc import JobsStub
from protos.stage.channel import CHANNEL_OPTIONS

# grpc's own pauses between connection attempts start at 1 s and reach 2 min: longer than ours, they would decide
_OPTIONS = [*CHANNEL_OPTIONS, ("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 2000)]
_UPLOAD_FACTOR = 20  # an upload may take this many times the usual timeout
_UPLOADS = {"UploadDocument", "AppendDocument", "CountTokens"}
_UNLIMITED = {"ImportDocument"}  # gigabytes; a peer that has gone is noticed by keep-alive
_MAX_RETRY_AFTER_S = 3600.0
_Stub: Any = JobsStub  # generated code has no types
_Code = grpc.StatusCode
_RETRY_AFTER = "retry-after-ms"  # trailing metadata of a head that cannot take a call now
_SIMPLE: dict[grpc.StatusCode, type[LongreachError]] = {
    _Code.INVALID_ARGUMENT: InvalidRequest,
    _Code.OUT_OF_RANGE: InvalidRequest,
    _Code.NOT_FOUND: NotFound,
    _Code.ALREADY_EXISTS: Conflict,
    _Code.FAILED_PRECONDITION: Conflict,
    _Code.UNAUTHENTICATED: Unauthenticated,
    _Code.PERMISSION_DENIED: Unauthenticated,
}


class Transport:
    """A channel to the head. What its calls return is awaitable when it was opened for asyncio."""

    RpcError = grpc.RpcError

    def __init__(self, connection: Connection, is_async: bool = False) -> None:
        """Open a channel for the running event loop, or one whose calls block; that may be used from several threads.

        Raises:
            InvalidRequest: TLS files cannot be used.
        """
        self._connection = connection
        self._metadata = [("authorization", f"Bearer {connection.secret}")] if connection.secret else []
        self._channel = _open_channel(connection, grpc.aio if is_async else grpc)
        self._stub = _Stub(self._channel)
        self.has_answered = False  # a head that has once answered is no matter of TLS

    def call(self, method: str, request: Any, extra_s: float) -> Any:
        """Start a call with one reply; `extra_s` is the time the head is asked to take.

        With asyncio the messages of an upload are read on the event loop, one at a time.
        """
        timeout_s = self._connection.timeout_s * (_UPLOAD_FACTOR if method in _UPLOADS else 1) + extra_s
        limit = None if method in _UNLIMITED else timeout_s
        return getattr(self._stub, method)(request, timeout=limit, metadata=self._metadata)

    def stream(self, method: str, request: Any) -> Any:
        """Start a call with many replies, without a time limit."""
        return getattr(self._stub, method)(request, metadata=self._metadata)

    def close(self) -> Any:
        """Close the channel."""
        return self._channel.close()

    def is_transient(self, error: grpc.RpcError) -> bool:
        """Whether another try of the same call may succeed."""
        return error.code() == _Code.UNAVAILABLE and not is_handshake_failure(error.details() or "")

    def typed_error(self, error: grpc.RpcError) -> LongreachError:
        """Return the error of a failed call as one of the client's types."""
        address = self._connection.address
        code, details = error.code(), one_line(error.details() or "")
        trailing = dict(error.trailing_metadata() or ())
        kind = _SIMPLE.get(code)
        if kind is Unauthenticated:
            problem = (
                "the API key that was given is not one of the head's" if self._metadata else "an API key is needed"
            )
            way_out = "set LONGREACH_API_KEY or api_key to a key of the head's security.api_keys_file"
            return Unauthenticated(f"{address}: {problem}: {way_out}")
        if kind is not None:
            return kind(details or code.name.lower())
        if code == _Code.RESOURCE_EXHAUSTED:
            if "larger than max" in details:  # by grpc itself, about the size of a message
                return InvalidRequest(f"request: {details}")
            return Busy(details or "the queue is full", _retry_after_s(trailing))
        if code == _Code.UNAVAILABLE and _RETRY_AFTER in trailing:  # by the head itself, which cannot serve now
            return Unavailable(f"{address}: {details}")
        if code == _Code.UNAVAILABLE:
            if not self.has_answered and (problem := explain_failure(details, self._connection.tls)):
                return TlsError(f"{address}: {problem}")
            return Unavailable(f"{address}: cannot be reached ({details[:200]}): {START_HINT}")
        if code == _Code.CANCELLED:  # by the head: the clients do not hear of their own
            return Unavailable(f"{address}: the call was ended by the head")
        if code == _Code.DEADLINE_EXCEEDED and details not in ("", "Deadline Exceeded"):  # by the head
            return Unavailable(f"{address}: {details}")
        if code == _Code.DEADLINE_EXCEEDED:
            return Unavailable(f"{address}: did not answer in time; a larger timeout_s waits longer")
        if code == _Code.UNIMPLEMENTED:
            return LongreachError(f"{address}: the head does not know this call: start one of this version")
        return LongreachError(f"{address}: {code.name}: {details}")


def _retry_after_s(trailing: dict[str, Any]) -> float:
    """Return the seconds that a head asks to wait, 1 when it says nothing usable, at most `_MAX_RETRY_AFTER_S`."""
    value = str(trailing.get("retry-after-ms", ""))
    return min(int(value) / 1000, _MAX_RETRY_AFTER_S) if value.isdecimal() and len(value) < 20 else 1.0


def _open_channel(connection: Connection, api: Any) -> Any:
    if connection.tls is None:
        return api.insecure_channel(connection.address, options=_OPTIONS)
    options: list[tuple[str, Any]] = [*_OPTIONS]
    if connection.server_name:
        options.append(("grpc.ssl_target_name_override", connection.server_name))
    credentials = grpc.ssl_channel_credentials(*read_files(connection.tls))
    return api.secure_channel(connection.address, credentials, options=options)
