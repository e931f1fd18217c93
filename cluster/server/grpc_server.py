"""The job service over gRPC on `server.host:server.port`, with health checking and reflection.

Two interceptors wrap every method: the API key (`security`) and `CallGuard` (`interceptors`), which bounds open calls,
parses strictly and turns errors into status codes.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from cluster.access import codec, job_calls
from cluster.access.audit import AuditLog
from cluster.access.call_pool import CallPool, StallWatch
from cluster.access.keys import Keys, load_api_keys
from cluster.common.errors import PreflightError
from cluster.common.watched_thread import Watched, WatchedThreads
from cluster.config.schema import SecuritySection, ServerSection
from cluster.jobs.model import InvalidJob, check_id
from cluster.jobs.subscriptions import ProgressUpdate
from cluster.jobs.tenants.service import TenantService
from cluster.server.callers import Callers, tenant_of
from cluster.server.interceptors import CallGuard, Pools
from cluster.server.security import CertificateWatch, KeyInterceptor, server_credentials
from protos.jobs import jobs_pb2 as pb
from protos.jobs import jobs_pb2_grpc as rpc
from protos.jobs import validate
from protos.jobs.limits import MAX_INT64, MAX_WAIT_S
from protos.stage.channel import CHANNEL_OPTIONS

if TYPE_CHECKING:
    from cluster.jobs.service import JobService

JOBS_SERVICE: str = pb.DESCRIPTOR.services_by_name["Jobs"].full_name
SERVICES = (JOBS_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
MAX_PIECE = 4 << 20  # bytes of one message of an upload
# Calls that are open at a time, each with a thread: `server.max_streams` long ones and these.
_SHORT_CALLS = 96  # that answer at once; a thread may wait for the message of the request, or for its turn
_RUNNING = 32  # short calls that run at a time
_SPARE_CALLS = 64  # that are being let in, refused or ended
_WATCHERS = 16  # health watchers: they need no key, so they have limits and threads of their own
_CHECKS = 16  # health checks
_SERVING_THREAD = "(_serve)"  # end of the name of the thread in which gRPC waits for calls
_POLL_S = 2.0  # how soon a waiting call notices that its client has gone
_SLOW_UPLOAD_S = 60.0  # from this time on an upload must have come with
_SLOW_UPLOAD_RATE = 1024  # bytes a second on the average
_IDLE_CONNECTIONS = 384  # beside one for each of `server.max_streams`; more are closed at once
# What the server allows a connection. A client that keeps none of it is cut off by gRPC itself.
_CONNECTION_OPTIONS = dict(CHANNEL_OPTIONS) | {
    "grpc.so_reuseport": 0,  # two heads on one port are an error, not a lottery
    "grpc.server_handshake_timeout_ms": 20_000,  # for TLS and the first frame of HTTP/2
    "grpc.http2.settings_timeout": 20_000,
    "grpc.max_connection_idle_ms": 60_000,  # without a call; clients connect again by themselves
    "grpc.max_metadata_size": 16 << 10,  # bytes of the headers of a call
    "grpc.absolute_max_metadata_size": 16 << 10,
    "grpc.http2.min_ping_interval_without_data_ms": 10_000,
    "grpc.http2.max_ping_strikes": 5,  # pings that come sooner, until the connection is closed
}


_Piece = TypeVar("_Piece", pb.DocumentPiece, pb.ArchivePiece)


class GrpcServer:
    """Serves one job service from `start` to `close`.

    Failure contract: holds no state of jobs. A lost connection ends the call and, for attached jobs, closes the stream
    of events; everything else goes on and can be asked for again.
    """

    def __init__(
        self, service: JobService, server: ServerSection, security: SecuritySection, port_override: int | None = None,
        streams: CallPool | None = None, keys: Keys | None = None, audit: AuditLog | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            port_override: replaces `server.port`; 0 binds any free port.
            streams: places of calls that may last for hours, where other servers of the head share them.
            keys: those that give access, instead of `security.api_keys_file` as it is at the start.
        """
        self._keys = keys
        self._audit = audit or AuditLog()
        self._streams = streams if streams is not None else CallPool(server.max_streams, "server.max_streams")
        self._service = service
        self._config = server
        self._security = security
        self._port = server.port if port_override is None else port_override
        self._is_enabled = bool(server.port) or port_override is not None
        self._health = health.HealthServicer(experimental_non_blocking=False)  # the other mode sends under its lock
        self._certificates = CertificateWatch(security)
        self._server: grpc.Server | None = None
        self._executors: list[ThreadPoolExecutor] = []
        self._serving = WatchedThreads("gRPC")
        self.set_serving(True)

    @property
    def threads(self) -> list[Watched]:
        """The threads without which clients are not served."""
        return [self._serving, self._stalls.thread, self._certificates.thread] if self._server is not None else []

    def start(self) -> str:
        """Bind and answer calls; returns `host:port`, or "" when `server.port` is 0.

        Raises:
            PreflightError: the port is taken, or keys or certificates cannot be used.
        """
        if not self._is_enabled:
            return ""
        keys = self._keys
        if keys is None and self._security.api_keys_file is not None:
            keys = load_api_keys(self._security.api_keys_file)
        callers = Callers(keys)
        credentials = server_credentials(self._security)
        limit = self._config.max_streams
        calls = ThreadPoolExecutor(limit + _SHORT_CALLS + _SPARE_CALLS, thread_name_prefix="grpc")
        watches = ThreadPoolExecutor(2 * (_WATCHERS + _CHECKS), thread_name_prefix="grpc-health")
        self._executors = [calls, watches]
        ours = Pools(
            self._streams, CallPool(_SHORT_CALLS, "of short calls", can_preempt=False),
            threading.Semaphore(_RUNNING),
        )  # fmt: skip
        of_health = Pools(
            CallPool(_WATCHERS, "of health watchers"), CallPool(_CHECKS, "of health checks", can_preempt=False),
            threading.Semaphore(_CHECKS), watches,
        )  # fmt: skip
        self._stalls = StallWatch([ours.long, ours.short, of_health.long, of_health.short])
        guard = CallGuard(
            ours, {f"/{JOBS_SERVICE}/Wait"}, {health.SERVICE_NAME: of_health}, callers.identify
        )  # fmt: skip
        most = limit + _SHORT_CALLS + _SPARE_CALLS + 2 * (_WATCHERS + _CHECKS)
        bounds = {"max_concurrent_streams": most, "max_allowed_incoming_connections": limit + _IDLE_CONNECTIONS}
        server = grpc.server(
            calls,
            interceptors=[*([KeyInterceptor(keys, self._audit.refuse)] if keys is not None else []), guard],
            options=[*_CONNECTION_OPTIONS.items(), *((f"grpc.{key}", value) for key, value in bounds.items())],
            maximum_concurrent_rpcs=most,
        )
        jobs = _Jobs(self._service, self._config.max_document_bytes, callers, self._audit)
        rpc.add_JobsServicer_to_server(jobs, server)  # type: ignore[no-untyped-call, unused-ignore]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(SERVICES, server)
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        address = f"{host}:{self._port}"
        try:
            port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
        except RuntimeError as error:
            raise PreflightError(f"server.port: {address} cannot be bound: choose a free port, or 0") from error
        self._certificates.start()
        before = set(threading.enumerate())
        server.start()
        started = [t for t in threading.enumerate() if t not in before and t.name.endswith(_SERVING_THREAD)]
        self._serving.watch(started)
        self._server = server
        self._stalls.start()
        return f"{host}:{port}"

    def set_serving(self, serving: bool) -> None:
        """Set what health checks answer: SERVING or NOT_SERVING; calls are accepted either way."""
        status = health_pb2.HealthCheckResponse
        for name in ("", JOBS_SERVICE):
            self._health.set(name, status.SERVING if serving else status.NOT_SERVING)

    def close(self, grace_s: float = 0.5) -> None:
        """Refuse new calls, let running ones end for `grace_s`, cancel the rest; may be called twice."""
        if self._server is not None:
            is_dead = self._serving.is_dead  # then nobody would say that it has stopped
            self._serving.release()
            self._health.enter_graceful_shutdown()
            self._server.stop(grace_s).wait(0.0 if is_dead else grace_s + 10.0)
            self._server = None
            self._stalls.close()
            self._certificates.close()
        for executor in self._executors:
            executor.shutdown(wait=False)


class _Jobs(rpc.JobsServicer):
    """Implements jobs.proto; methods raise the errors of `jobs.model`, which `CallGuard` turns into status codes.

    Every method asks `_of` for the jobs and documents of its caller.
    """

    def __init__(self, service: JobService, max_document_bytes: int, callers: Callers, audit: AuditLog) -> None:
        self._all = service
        self._max_document_bytes = max_document_bytes
        self._callers = callers
        self._audit = audit

    def _of(self, context: grpc.ServicerContext) -> TenantService:
        """Return the service as the caller sees it. Raises KeyRefused."""
        caller = self._callers.identify(context)
        return TenantService(self._all, tenant_of(caller), partial(self._audit.note, caller))

    def UploadDocument(self, requests: Iterator[pb.DocumentPiece], context: grpc.ServicerContext) -> pb.Document:
        header = self._header(requests)
        if header.append_to:
            raise InvalidJob("append_to: must be empty: AppendDocument appends")
        return self._add(header, requests, context)

    def AppendDocument(self, requests: Iterator[pb.DocumentPiece], context: grpc.ServicerContext) -> pb.Document:
        header = self._header(requests)
        check_id(header.append_to, "doc")
        return self._add(header, requests, context)

    def _add(
        self, header: pb.DocumentHeader, requests: Iterator[pb.DocumentPiece], context: grpc.ServicerContext
    ) -> pb.Document:
        service = self._of(context)
        record = service.add_document(
            header.name, self._pieces(requests, context), self._max_document_bytes, max_tokens=header.max_tokens,
            pinned=header.pinned, source_hash=header.source_hash, append_to=header.append_to, shared=header.shared,
        )  # fmt: skip
        return job_calls.show_document(service, record)

    def _header(self, requests: Iterator[pb.DocumentPiece]) -> pb.DocumentHeader:
        first = next(requests, None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidJob("document: the first message must have the header")
        return validate.check_header(first.header)

    def CountTokens(self, requests: Iterator[pb.DocumentPiece], context: grpc.ServicerContext) -> pb.TokenCount:
        self._header(requests)
        content = bytearray()
        for piece in self._pieces(requests, context):
            content += piece
            if len(content) > self._max_document_bytes:
                most = f"must be at most {self._max_document_bytes} (server.max_document_bytes)"
                raise InvalidJob(f"document: {len(content)} bytes or more: {most}")
        service = self._of(context)
        tokens = service.count_text(bytes(content))
        limit = service.status()["max_model_len"]
        return pb.TokenCount(tokens=tokens, size_bytes=len(content), max_model_len=limit)

    def ExportDocument(self, request: pb.ExportRequest, context: grpc.ServicerContext) -> Iterator[pb.ArchivePiece]:
        document_id = check_id(request.id, "doc")
        for piece in self._of(context).export_document(document_id, not request.without_kv):
            yield pb.ArchivePiece(data=piece)

    def ImportDocument(self, requests: Iterator[pb.ArchivePiece], context: grpc.ServicerContext) -> pb.Document:
        pieces = (request.data for request in _arriving(requests))
        service = self._of(context)
        return job_calls.show_document(service, service.import_document(pieces, self._max_document_bytes))

    def _pieces(self, requests: Iterator[pb.DocumentPiece], context: grpc.ServicerContext) -> Iterator[bytes]:
        for request in _arriving(requests):
            if request.WhichOneof("part") != "data":
                raise InvalidJob("document: messages after the header must have data")
            yield request.data
        if not context.is_active():  # half a document would be stored as a whole one
            raise InvalidJob("document: the upload was cut off")

    def GetDocument(self, request: pb.DocumentRequest, context: grpc.ServicerContext) -> pb.Document:
        service = self._of(context)
        return job_calls.show_document(service, service.documents.get(request.id))

    def ListDocuments(self, request: pb.ListDocumentsRequest, context: grpc.ServicerContext) -> pb.DocumentList:
        return job_calls.list_documents(self._of(context))

    def PinDocument(self, request: pb.PinRequest, context: grpc.ServicerContext) -> pb.Document:
        service = self._of(context)
        return job_calls.show_document(service, service.documents.pin(request.id, request.pinned))

    def DeleteDocument(self, request: pb.DocumentRequest, context: grpc.ServicerContext) -> pb.Empty:
        self._of(context).documents.delete(request.id)
        return pb.Empty()

    def Submit(self, request: pb.SubmitRequest, context: grpc.ServicerContext) -> pb.Job:
        service = self._of(context)
        record = job_calls.submit(service, request, self._max_document_bytes)
        return job_calls.whole_job(service, record)

    def Get(self, request: pb.JobRequest, context: grpc.ServicerContext) -> pb.Job:
        service = self._of(context)
        return job_calls.whole_job(service, service.get(request.id))

    def List(self, request: pb.ListRequest, context: grpc.ServicerContext) -> pb.JobList:
        return job_calls.list_jobs(self._of(context), request)

    def Stream(self, request: pb.StreamRequest, context: grpc.ServicerContext) -> Iterator[pb.JobEvent]:
        """Closing the events, also when the client has gone, ends an attached job."""
        service, number = self._of(context), request.after
        validate.check_count("after", number, MAX_INT64)
        with contextlib.closing(service.stream(request.id, number)) as events:
            for event in events:
                if not context.is_active():
                    return
                if event is None:
                    continue
                if isinstance(event, Sequence):
                    number = event[-1].number
                    yield from codec.encode_tokens(event, request.grouped)
                elif isinstance(event, ProgressUpdate):
                    yield pb.JobEvent(number=number, progress=asdict(event))
                else:
                    job = job_calls.whole_job(service, event) if event.state.is_final else codec.encode_job(event)
                    yield pb.JobEvent(number=number, job=job)

    def Wait(self, request: pb.WaitRequest, context: grpc.ServicerContext) -> pb.Job:
        service, job_id = self._of(context), check_id(request.id, "job")
        left = validate.check_number("timeout_s", request.timeout_s, 0.0, MAX_WAIT_S, unit=" of seconds")
        while True:
            began, poll = time.monotonic(), min(left, _POLL_S)
            record = service.wait(job_id, poll)
            left -= poll
            ended_early = time.monotonic() - began < poll * 0.9  # the service is closing
            if record.state.is_final or left <= 0 or ended_early or not context.is_active():
                return job_calls.whole_job(service, record)

    def Cancel(self, request: pb.JobRequest, context: grpc.ServicerContext) -> pb.Job:
        service = self._of(context)
        return job_calls.whole_job(service, service.cancel(request.id))

    def Delete(self, request: pb.JobRequest, context: grpc.ServicerContext) -> pb.Empty:
        self._of(context).delete(request.id)
        return pb.Empty()

    def ClusterStatus(self, request: pb.ClusterStatusRequest, context: grpc.ServicerContext) -> pb.ClusterStatusReply:
        return pb.ClusterStatusReply(**self._of(context).status())


def _arriving(requests: Iterator[_Piece]) -> Iterator[_Piece]:
    """Yield the messages of an upload. Raises InvalidJob: one is too large, or they trickle in."""
    waited, size = 0.0, 0
    while True:
        began = time.monotonic()
        if (request := next(requests, None)) is None:
            return
        waited += time.monotonic() - began
        if len(request.data) > MAX_PIECE:
            raise InvalidJob(f"data: {len(request.data)} bytes: must be at most {MAX_PIECE} in one message")
        size += len(request.data)
        if waited > _SLOW_UPLOAD_S and size < waited * _SLOW_UPLOAD_RATE:
            raise InvalidJob(f"document: {size} bytes in {waited:.0f} s: must be {_SLOW_UPLOAD_RATE} a second")
        yield request
