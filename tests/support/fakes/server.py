"""A Jobs service in memory, over real gRPC on loopback, that misbehaves on request. It computes nothing."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc

from protos.jobs import jobs_pb2 as pb
from protos.jobs.jobs_pb2_grpc import add_JobsServicer_to_server
from protos.stage.channel import CHANNEL_OPTIONS
from tests.support.fakes.documents import FakeDocuments

WORDS = ("The ", "answer ", "is ", "forty", "-two", ".\n", "Be ", "sure.")


class FakeJobs(FakeDocuments):
    """Every question is answered with WORDS, all tokens at once, when a stream or a wait asks.

    Attributes:
        failures: for a method's name, what its next calls fail with: (code, details, trailing metadata).
        drops: after how many tokens each of the next streams breaks off (UNAVAILABLE).
        ends_early: like `drops`, with an orderly end and no job.
        hold_after: a stream stops after this token until `released`.
        outcome: the state in which jobs end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failures: dict[str, list[tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]]] = defaultdict(list)
        self.drops: list[int] = []
        self.ends_early: list[int] = []
        self.hold_after: int | None = None
        self.released = threading.Event()
        self.outcome = pb.SUCCEEDED
        self.api_key = ""
        self.calls: dict[str, list[Any]] = defaultdict(list)
        self.jobs: dict[str, pb.Job] = {}
        self.keys: dict[str, tuple[bytes, str]] = {}
        self.page_limit = 3
        self.store_then_fail = False  # Submit is done, but its reply gets lost
        self._lock = threading.Lock()

    def _begin(self, method: str, request: Any, context: grpc.ServicerContext) -> None:
        with self._lock:
            self.calls[method].append(request)
            failure = self.failures[method].pop(0) if self.failures[method] else None
        if self.api_key and dict(context.invocation_metadata()).get("authorization") != f"Bearer {self.api_key}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "an API key is needed")
        if failure:
            code, details, trailing = failure
            context.set_trailing_metadata(trailing)
            context.abort(code, details)

    def _job(self, job_id: str, context: grpc.ServicerContext) -> pb.Job:
        if job_id not in self.jobs:
            context.abort(grpc.StatusCode.NOT_FOUND, f"{job_id}: no such job")
        return self.jobs[job_id]

    def Submit(self, request: pb.SubmitRequest, context: grpc.ServicerContext) -> pb.Job:
        self._begin("Submit", request, context)
        body = request.SerializeToString(deterministic=True)
        if request.idempotency_key in self.keys:
            first, job_id = self.keys[request.idempotency_key]
            if first != body:
                context.abort(grpc.StatusCode.ALREADY_EXISTS, "idempotency_key: used with another request")
            return self.jobs[job_id]
        questions = list(request.document.questions) or [""]
        job = pb.Job(
            id=f"job_{len(self.jobs):032x}", state=pb.QUEUED, created=time.time(), priority=request.priority,
            document_id=request.document.document_id, labels=request.labels,
            answers=[pb.Answer(question=q, progress=pb.Progress(total=100)) for q in questions],
        )  # fmt: skip
        self.jobs[job.id] = job
        self.keys[request.idempotency_key] = (body, job.id)
        if self.store_then_fail:
            self.store_then_fail = False
            context.abort(grpc.StatusCode.UNAVAILABLE, "the reply got lost")
        return job

    def Get(self, request: pb.JobRequest, context: grpc.ServicerContext) -> pb.Job:
        self._begin("Get", request, context)
        return self._job(request.id, context)

    def List(self, request: pb.ListRequest, context: grpc.ServicerContext) -> pb.JobList:
        self._begin("List", request, context)
        found = [
            job
            for job in reversed(self.jobs.values())
            if (not request.states or job.state in request.states)
            and all(job.labels.get(key) == value for key, value in request.labels.items())
        ]
        start = int(request.page_token or 0)
        end = start + min(request.page_size, self.page_limit)
        return pb.JobList(jobs=found[start:end], next_page_token=str(end) if end < len(found) else "")

    def Stream(self, request: pb.StreamRequest, context: grpc.ServicerContext) -> Iterator[pb.JobEvent]:
        self._begin("Stream", request, context)
        job = self._job(request.id, context)
        drop = self.drops.pop(0) if self.drops else None
        end = self.ends_early.pop(0) if self.ends_early else None
        at = pb.Progress(total=100, cached=10, processed=100, eta_ms=0)
        yield pb.JobEvent(number=request.after, job=pb.Job(id=job.id, state=pb.DECODING, answers=job.answers))
        yield pb.JobEvent(number=request.after, progress=pb.ProgressEvent(question=0, progress=at))
        total = len(WORDS) * len(job.answers)
        # one token again, as a head may do that lost track: clients must not show it twice
        for sent, number in enumerate(range(max(1, request.after), total + 2)):
            if drop is not None and sent == drop:
                context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
            if end is not None and sent == end:
                return
            if self.hold_after is not None and number > self.hold_after:
                while context.is_active() and not self.released.wait(0.05):
                    pass
            if number <= total:
                yield token_event(number, len(job.answers))
        self._end(job)
        yield pb.JobEvent(number=total, job=job)

    def Wait(self, request: pb.WaitRequest, context: grpc.ServicerContext) -> pb.Job:
        self._begin("Wait", request, context)
        job = self._job(request.id, context)
        if self.hold_after is not None:
            self.released.wait(request.timeout_s)
        if self.hold_after is None or self.released.is_set():
            self._end(job)
        return job

    def _end(self, job: pb.Job) -> None:
        if job.finished:
            return
        job.state, job.finished = self.outcome, time.time()
        job.error = "the pipeline broke" if self.outcome == pb.FAILED else ""
        job.last_event = len(WORDS) * len(job.answers)
        for answer in job.answers:
            answer.text, answer.finish_reason = "".join(WORDS), "stop"
            answer.token_ids.extend(range(len(WORDS)))

    def Cancel(self, request: pb.JobRequest, context: grpc.ServicerContext) -> pb.Job:
        self._begin("Cancel", request, context)
        job = self._job(request.id, context)
        if not job.finished:
            job.state, job.finished = pb.CANCELLED, time.time()
        return job

    def Delete(self, request: pb.JobRequest, context: grpc.ServicerContext) -> pb.Empty:
        self._begin("Delete", request, context)
        if not self._job(request.id, context).finished:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{request.id}: is running")
        del self.jobs[request.id]
        return pb.Empty()

    def ClusterStatus(self, request: pb.ClusterStatusRequest, context: grpc.ServicerContext) -> pb.ClusterStatusReply:
        self._begin("ClusterStatus", request, context)
        stages = [pb.StageStatus(stage=0, rank=0, state="running", steps_done=1234, resident_bytes=3 << 20)]
        return pb.ClusterStatusReply(
            model="fake", max_model_len=4096, queued=1, running=2, kv_usage=0.25, kv_tokens=8192, stages=stages,
            uptime_s=90.0, version="1.2.3",
        )  # fmt: skip


def token_event(number: int, questions: int) -> pb.JobEvent:
    """Token `number` of a fake job: the questions take turns."""
    step, question = divmod(number - 1, questions)
    token = pb.Token(token_id=step, text=WORDS[step])
    return pb.JobEvent(number=number, token=pb.TokenEvent(question=question, token=token))


class FakeHead:
    """The service on a port of its own; `restart` breaks every connection and comes back on the same port."""

    def __init__(self) -> None:
        self.jobs = FakeJobs()
        self.port = 0
        self._server: grpc.Server | None = None
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        server = grpc.server(futures.ThreadPoolExecutor(16), options=CHANNEL_OPTIONS)
        add_JobsServicer_to_server(self.jobs, server)
        self.port = server.add_insecure_port(f"127.0.0.1:{self.port}")
        server.start()
        self._server = server

    def stop(self) -> None:
        """Break off every call; may be called twice."""
        if self._server is not None:
            self._server.stop(None).wait()
            self._server = None

    def restart(self) -> None:
        self.stop()
        self.start()
