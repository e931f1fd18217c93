"""The gRPC door of the job service on `server.host:server.port`, with health checking and reflection.

Around every method are the API key (`security`) and the boundary (`interceptors`): bounded long calls,
strict parsing, one table from errors to status codes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from cluster.common.errors import PreflightError
from cluster.config.schema import SecuritySection, ServerSection
from cluster.jobs.api import JobServiceApi, ProgressUpdate
from cluster.jobs.model import InvalidJob, JobRecord, JobSpec, JobToken, check_id
from cluster.server import codec
from cluster.server.interceptors import Boundary, Places
from cluster.server.security import KeyInterceptor, load_api_keys, server_credentials
from cluster.text.reasoning import ReasoningStream
from protos.jobs import jobs_pb2 as pb
from protos.jobs import jobs_pb2_grpc as rpc
from protos.stage.channel import CHANNEL_OPTIONS

JOBS_SERVICE: str = pb.DESCRIPTOR.services_by_name["Jobs"].full_name
SERVICES = (JOBS_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
MAX_PIECE = 4 << 20  # bytes of one message of an upload
_SHORT_CALLS = 32  # threads for calls that answer at once, besides those of long calls
_WAITING_CALLS = 64  # more than threads: they wait for one
_WATCHERS = 16  # health watchers: they need no key, so they have places and threads of their own
_SLICE_S = 2.0  # how soon a waiting call notices that its client has gone
_TOKENS_PAGE = 1000


class Gateway:
    """Serves one job service from `start` to `close`.

    Failure contract: holds no state of jobs. A lost connection ends the call and, for attached jobs, closes the stream
    of events; everything else goes on and can be asked for again.
    """

    def __init__(
        self, service: JobServiceApi, server: ServerSection, security: SecuritySection,
        port_override: int | None = None, reasoning_opened: Callable[[JobSpec], bool] = lambda spec: False,
    ) -> None:  # fmt: skip
        """
        Args:
            port_override: replaces `server.port`; there, 0 binds any free port.
            reasoning_opened: whether the answers of a job start as reasoning, without an opening tag.
        """
        self._service = service
        self._reasoning_opened = reasoning_opened
        self._config = server
        self._security = security
        self._port = server.port if port_override is None else port_override
        self._has_door = bool(server.port) or port_override is not None
        self._health = health.HealthServicer(experimental_non_blocking=False)  # the other mode sends under its lock
        self._server: grpc.Server | None = None
        self._pools: list[ThreadPoolExecutor] = []
        self.set_serving(True)

    def start(self) -> str:
        """Bind and answer; returns `host:port`, or "" when the configuration opens no door.

        Raises PreflightError: the port is taken, or keys or certificates cannot be used.
        """
        if not self._has_door:
            return ""
        keys = load_api_keys(self._security.api_keys_file) if self._security.api_keys_file else None
        credentials = server_credentials(self._security)
        calls = ThreadPoolExecutor(self._config.max_streams + _SHORT_CALLS, thread_name_prefix="gateway")
        watches = ThreadPoolExecutor(_WATCHERS + 4, thread_name_prefix="gateway-health")
        self._pools = [calls, watches]
        watch_places = Places(_WATCHERS, "of health watchers")
        boundary = Boundary(
            Places(self._config.max_streams, "server.max_streams"),
            waiting={f"/{JOBS_SERVICE}/Wait"},
            own={health.SERVICE_NAME: (watch_places, watches)},
        )
        server = grpc.server(
            calls,
            interceptors=[*([KeyInterceptor(keys)] if keys else []), boundary],
            options=[*CHANNEL_OPTIONS, ("grpc.so_reuseport", 0)],  # two heads on one port are an error, not a lottery
            maximum_concurrent_rpcs=self._config.max_streams + _WATCHERS + _SHORT_CALLS + _WAITING_CALLS,
        )
        jobs = _Jobs(self._service, self._config.max_document_bytes, self._reasoning_opened)
        rpc.add_JobsServicer_to_server(jobs, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(SERVICES, server)
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        address = f"{host}:{self._port}"
        try:
            port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
        except RuntimeError as error:
            raise PreflightError(f"server.port: {address} cannot be bound: choose a free port, or 0") from error
        server.start()
        self._server = server
        return f"{host}:{port}"

    def set_serving(self, serving: bool) -> None:
        """What health checks answer: SERVING or NOT_SERVING; calls are taken either way."""
        status = health_pb2.HealthCheckResponse
        for name in ("", JOBS_SERVICE):
            self._health.set(name, status.SERVING if serving else status.NOT_SERVING)

    def close(self, grace_s: float = 0.5) -> None:
        """Refuse new calls, let running ones end for `grace_s`, cancel the rest; may be called twice."""
        if self._server is not None:
            self._health.enter_graceful_shutdown()
            self._server.stop(grace_s).wait(grace_s + 10.0)
            self._server = None
        for pool in self._pools:
            pool.shutdown(wait=False)


class _Jobs(rpc.JobsServicer):
    """The methods of jobs.proto; they raise the errors of `jobs.model`, the boundary turns them into status codes."""

    def __init__(
        self, service: JobServiceApi, max_document_bytes: int, reasoning_opened: Callable[[JobSpec], bool]
    ) -> None:
        self._service = service
        self._max_document = max_document_bytes
        self._reasoning_opened = reasoning_opened

    def UploadDocument(self, requests: Iterator[pb.DocumentPiece], context: grpc.ServicerContext) -> pb.Document:
        first = next(requests, None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidJob("document: the first message must have the header")
        name = codec.decode_name(first.header)
        return codec.encode_document(self._service.upload(name, self._pieces(requests, context)))

    def _pieces(self, requests: Iterator[pb.DocumentPiece], context: grpc.ServicerContext) -> Iterator[bytes]:
        size = 0
        for request in requests:
            if request.WhichOneof("part") != "data":
                raise InvalidJob("document: messages after the header must have data")
            if len(request.data) > MAX_PIECE:
                raise InvalidJob(f"data: {len(request.data)} bytes: must be at most {MAX_PIECE} in one message")
            size += len(request.data)
            self._check_size(size)
            yield request.data
        if not context.is_active():  # half a document would be stored as a whole one
            raise InvalidJob("document: the upload was cut off")

    def _check_size(self, size: int) -> None:
        if size > self._max_document:
            raise InvalidJob(
                f"document: {size} bytes or more: must be at most {self._max_document} (server.max_document_bytes)"
            )

    def _store_text(self, text: str) -> str:
        data = text.encode()
        self._check_size(len(data))
        pieces = (data[at : at + MAX_PIECE] for at in range(0, len(data), MAX_PIECE))
        return self._service.upload("", pieces).id

    def GetDocument(self, request: pb.DocumentRequest, context: grpc.ServicerContext) -> pb.Document:
        return codec.encode_document(self._service.document(check_id(request.id, "doc")))

    def ListDocuments(self, request: pb.ListDocumentsRequest, context: grpc.ServicerContext) -> pb.DocumentList:
        return pb.DocumentList(documents=map(codec.encode_document, self._service.documents()))

    def DeleteDocument(self, request: pb.DocumentRequest, context: grpc.ServicerContext) -> pb.Empty:
        self._service.delete_document(check_id(request.id, "doc"))
        return pb.Empty()

    def Submit(self, request: pb.SubmitRequest, context: grpc.ServicerContext) -> pb.Job:
        return self._whole(self._service.submit(codec.decode_submit(request, time.time(), self._store_text)))

    def Get(self, request: pb.JobRequest, context: grpc.ServicerContext) -> pb.Job:
        return self._whole(self._service.get(check_id(request.id, "job")))

    def List(self, request: pb.ListRequest, context: grpc.ServicerContext) -> pb.JobList:
        records, cursor = self._service.jobs(*codec.decode_list(request))
        return pb.JobList(jobs=map(codec.encode_job, records), next_page_token=cursor)

    def Stream(self, request: pb.StreamRequest, context: grpc.ServicerContext) -> Iterator[pb.JobEvent]:
        number = codec.decode_after(request)
        events = self._service.stream(check_id(request.id, "job"), number)
        try:
            splits: dict[int, ReasoningStream] | None = None
            for event in events:
                if not context.is_active():
                    return
                if isinstance(event, Sequence):
                    if splits is None:
                        splits = self._splits(request.id, number)
                    number = event[-1].number
                    if request.grouped and len(event) > 1:
                        yield codec.encode_token_group(event, splits)
                    else:
                        yield from (codec.encode_token_event(token, splits[token.question]) for token in event)
                elif isinstance(event, ProgressUpdate):
                    yield codec.encode_progress_event(event, number)
                else:
                    job = self._whole(event) if event.state.is_final else codec.encode_job(event)
                    yield pb.JobEvent(number=number, job=job)
        finally:  # also when the client has gone: an attached job ends with its stream
            close = getattr(events, "close", None)
            if close is not None:
                close()

    def _splits(self, job_id: str, after: int) -> dict[int, ReasoningStream]:
        """Where the text of every question stands after a token: reasoning or answer."""
        record = self._service.get(job_id)
        opened = self._reasoning_opened(record.spec)
        splits = {question: ReasoningStream(opened) for question in range(record.spec.input.num_answers)}
        for token in self._tokens(job_id, after):
            splits[token.question].push(token.text)
        return splits

    def Wait(self, request: pb.WaitRequest, context: grpc.ServicerContext) -> pb.Job:
        job_id = check_id(request.id, "job")
        left = codec.decode_timeout(request)
        while True:
            began, part = time.monotonic(), min(left, _SLICE_S)
            record = self._service.wait(job_id, part)
            left -= part
            ended_early = time.monotonic() - began < part * 0.9  # the service is closing
            if record.state.is_final or left <= 0 or ended_early or not context.is_active():
                return self._whole(record)

    def Cancel(self, request: pb.JobRequest, context: grpc.ServicerContext) -> pb.Job:
        return self._whole(self._service.cancel(check_id(request.id, "job")))

    def Delete(self, request: pb.JobRequest, context: grpc.ServicerContext) -> pb.Empty:
        self._service.delete(check_id(request.id, "job"))
        return pb.Empty()

    def ClusterStatus(self, request: pb.ClusterStatusRequest, context: grpc.ServicerContext) -> pb.ClusterStatusReply:
        return codec.encode_status(self._service.status())

    def _whole(self, record: JobRecord) -> pb.Job:
        """The job with its tokens and, while it runs, its progress."""
        tokens = list(self._tokens(record.id, record.last_event))
        progress = {} if record.state.is_final else self._service.progress(record.id)
        return codec.encode_job(record, tokens, progress)

    def _tokens(self, job_id: str, last: int) -> Iterator[JobToken]:
        """The tokens of a job up to number `last`."""
        number = 0
        while number < last:
            batch = self._service.tokens(job_id, number, min(_TOKENS_PAGE, last - number))
            if not batch:
                return
            yield from batch
            number = batch[-1].number
