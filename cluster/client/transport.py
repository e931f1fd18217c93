"""gRPC under the clients: channels, metadata, errors by type, retries. The only client module that imports grpc.

Every call may be repeated safely: Submit carries an idempotency key, uploads are content-addressed, the rest reads or
is idempotent. So UNAVAILABLE is tried again with backoff everywhere; a Delete that then finds nothing was the first.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc

from cluster.client.connection import Connection
from cluster.client.errors import (
    CALL_RETRIES,
    WAY_OUT,
    Busy,
    Conflict,
    InvalidRequest,
    LongreachError,
    NotFound,
    RetryPolicy,
    TlsError,
    Unauthenticated,
    Unavailable,
)
from cluster.client.tls import check_files, find_mismatch
from cluster.common.text_format import one_line
from protos.jobs import jobs_pb2 as pb
from protos.jobs.jobs_pb2_grpc import JobsStub
from protos.stage.channel import CHANNEL_OPTIONS

# grpc's own pauses between connection attempts start at 1 s and reach 2 min: longer than ours, they would decide
_OPTIONS = [*CHANNEL_OPTIONS, ("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 2000)]
_UPLOAD_FACTOR = 20  # an upload may take this many times the usual timeout
_DELETES = {"Delete", "DeleteDocument"}
_Code = grpc.StatusCode
_SIMPLE: dict[grpc.StatusCode, type[LongreachError]] = {
    _Code.INVALID_ARGUMENT: InvalidRequest,
    _Code.OUT_OF_RANGE: InvalidRequest,
    _Code.NOT_FOUND: NotFound,
    _Code.ALREADY_EXISTS: Conflict,
    _Code.FAILED_PRECONDITION: Conflict,
    _Code.UNAUTHENTICATED: Unauthenticated,
    _Code.PERMISSION_DENIED: Unauthenticated,
}


def typed_error(error: grpc.RpcError, connection: Connection) -> LongreachError:
    """The error of a failed call as one of the client's types."""
    address = connection.address
    code, details = error.code(), one_line(error.details() or "")
    if code in _SIMPLE:
        if _SIMPLE[code] is Unauthenticated:
            return _wrong_key(connection)
        return _SIMPLE[code](details or code.name.lower())
    if code == _Code.RESOURCE_EXHAUSTED:
        if "larger than max" in details:  # by grpc itself, about the size of a message
            return InvalidRequest(f"request: {details}")
        trailing = dict(error.trailing_metadata() or ())
        return Busy(details or "the queue is full", int(trailing.get("retry-after-ms", 1000)) / 1000)
    if code == _Code.UNAVAILABLE:
        return Unavailable(f"{address}: cannot be reached ({details[:200]}): {WAY_OUT}")
    if code == _Code.DEADLINE_EXCEEDED:
        return Unavailable(f"{address}: did not answer in time; a larger timeout_s waits longer")
    return LongreachError(f"{address}: {code.name}: {details}")


def _wrong_key(connection: Connection) -> Unauthenticated:
    given = "the API key that was given is not one of the head's" if connection.secret else "an API key is needed"
    return Unauthenticated(
        f"{connection.address}: {given}: set LONGREACH_API_KEY or api_key to a key of the head's security.api_keys_file"
    )


def _is_worth_retrying(error: grpc.RpcError) -> bool:
    return bool(error.code() == _Code.UNAVAILABLE)


class _Wire:
    """What both wires have in common: credentials and metadata."""

    def __init__(self, connection: Connection, retries: RetryPolicy = CALL_RETRIES) -> None:
        self.connection = connection
        self._retries = retries
        secret = connection.secret
        self._metadata = [("authorization", f"Bearer {secret}")] if secret else []

    def _open(self, api: Any) -> Any:
        """A channel of `api`, which is grpc or grpc.aio."""
        files = self.connection.tls
        if files is None:
            return api.insecure_channel(self.connection.address, options=_OPTIONS)
        check_files(files)
        pem = [None if path is None else path.read_bytes() for path in (files.ca, files.key, files.cert)]
        options: list[tuple[str, Any]] = [*_OPTIONS]
        if self.connection.server_name:
            options.append(("grpc.ssl_target_name_override", self.connection.server_name))
        return api.secure_channel(self.connection.address, grpc.ssl_channel_credentials(*pem), options=options)

    def _options(self, timeout_s: float | None) -> dict[str, Any]:
        return {"timeout": timeout_s, "metadata": self._metadata}

    @staticmethod
    def _check_tls(mismatch: TlsError | None, error: grpc.RpcError) -> None:
        """Raise at once what no other try would change."""
        if mismatch is not None:
            raise mismatch from error

    def _failed(self, method: str, tries: int, error: grpc.RpcError) -> pb.Empty:
        """Raise the typed error, unless it says that an earlier try had deleted already."""
        problem = typed_error(error, self.connection)
        if tries and method in _DELETES and isinstance(problem, NotFound):
            return pb.Empty()
        raise problem from error


class SyncWire(_Wire):
    """Calls that block. May be used from several threads."""

    def __init__(self, connection: Connection, retries: RetryPolicy = CALL_RETRIES) -> None:
        super().__init__(connection, retries)
        self._channel = self._open(grpc)
        self._stub = JobsStub(self._channel)

    def call(self, method: str, request: Any, extra_s: float = 0.0) -> Any:
        """A unary call; `extra_s` is the time the head is asked to take. Raises LongreachError."""
        timeout_s = self.connection.timeout_s + extra_s
        return self._retry(method, lambda: getattr(self._stub, method)(request, **self._options(timeout_s)))

    def upload(self, pieces: Callable[[], Iterator[pb.DocumentPiece]]) -> pb.Document:
        """Send a document; `pieces` is called again for each try."""
        options = self._options(self.connection.timeout_s * _UPLOAD_FACTOR)
        return self._retry("UploadDocument", lambda: self._stub.UploadDocument(pieces(), **options))

    def stream(self, request: pb.StreamRequest) -> Iterator[pb.JobEvent]:
        """Events until the connection drops (Unavailable) or the head ends the stream."""
        call = self._stub.Stream(request, **self._options(None))
        try:
            yield from call
        except grpc.RpcError as error:
            raise typed_error(error, self.connection) from error
        finally:
            call.cancel()

    def close(self) -> None:
        self._channel.close()

    def _retry(self, method: str, once: Callable[[], Any]) -> Any:
        for tries, delay in enumerate((*self._retries.delays(), None)):
            try:
                return once()
            except grpc.RpcError as error:
                if not tries and _is_worth_retrying(error):
                    self._check_tls(find_mismatch(self.connection), error)
                if delay is None or not _is_worth_retrying(error):
                    return self._failed(method, tries, error)
            time.sleep(delay)
        raise AssertionError("the last try returns or raises")


class AsyncWire(_Wire):
    """The same for asyncio; used on one event loop."""

    def __init__(self, connection: Connection, retries: RetryPolicy = CALL_RETRIES) -> None:
        super().__init__(connection, retries)
        self._channel: Any = None

    @property
    def _stub(self) -> Any:
        if self._channel is None:  # belongs to the loop of the first call
            self._channel = self._open(grpc.aio)
        return JobsStub(self._channel)

    async def call(self, method: str, request: Any, extra_s: float = 0.0) -> Any:
        """As `SyncWire.call`."""
        options = self._options(self.connection.timeout_s + extra_s)
        return await self._retry(method, lambda: getattr(self._stub, method)(request, **options))

    async def upload(self, pieces: Callable[[], Iterator[pb.DocumentPiece]]) -> pb.Document:
        """As `SyncWire.upload`; files are read on the event loop, a piece at a time."""
        options = self._options(self.connection.timeout_s * _UPLOAD_FACTOR)
        return await self._retry("UploadDocument", lambda: self._stub.UploadDocument(pieces(), **options))

    async def stream(self, request: pb.StreamRequest) -> AsyncIterator[pb.JobEvent]:
        """As `SyncWire.stream`."""
        call = self._stub.Stream(request, **self._options(None))
        try:
            async for message in call:
                yield message
        except grpc.RpcError as error:
            raise typed_error(error, self.connection) from error
        finally:
            call.cancel()

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def _retry(self, method: str, once: Callable[[], Any]) -> Any:
        for tries, delay in enumerate((*self._retries.delays(), None)):
            try:
                return await once()
            except grpc.RpcError as error:
                if not tries and _is_worth_retrying(error):
                    self._check_tls(await asyncio.to_thread(find_mismatch, self.connection), error)
                if delay is None or not _is_worth_retrying(error):
                    return self._failed(method, tries, error)
            await asyncio.sleep(delay)
        raise AssertionError("the last try returns or raises")
