"""A client that writes down all it sees: raw calls, without the client library's own repairs, tried again openly."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import grpc

from cluster.bench.history import History
from cluster.client.models import FINAL
from protos.jobs import jobs_pb2 as pb
from protos.jobs.jobs_pb2_grpc import JobsStub
from protos.stage.channel import CHANNEL_OPTIONS

_OPTIONS = [*CHANNEL_OPTIONS, ("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000)]
_AGAIN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED)
_PAUSE_S = 0.3
_CALL_S = 20.0
_Stub: Any = JobsStub  # generated code has no types


class Refused(Exception):
    """A call that another try does not mend; the history has it."""


class Recorder:
    """One client of a head; may be used from several threads.

    Calls are tried again while the head is away or busy, at most `patience_s`; every failure is written down.
    """

    def __init__(self, address: str, history: History, name: str, key: str = "", patience_s: float = 120.0) -> None:
        self._history = history
        self.name = name
        self._patience_s = patience_s
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._metadata = [("authorization", f"Bearer {key}")] if key else []
        self._stub = _Stub(self._channel)
        self._leaving = threading.Event()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up: streams end, nothing is tried again."""
        self._leaving.set()
        self._channel.close()

    def submit(self, kind: str, request: pb.SubmitRequest, key: str) -> str:
        """Submit under an idempotency key; return the job's id. Raises Refused."""
        message = pb.SubmitRequest()
        message.CopyFrom(request)
        message.idempotency_key = key
        began = time.monotonic()
        job = self.call("Submit", message)
        self._history.add("submitted", self.name, job=job.id, began=began, key=key, kind=kind)
        self._state(job, began)
        return str(job.id)

    def get(self, job_id: str) -> Any:
        """Read a job; its answers too once it has ended. Raises Refused."""
        began = time.monotonic()
        job = self.call("Get", pb.JobRequest(id=job_id), job_id)
        self._state(job, began)
        state = _state_name(job.state)
        for question, answer in enumerate(job.answers if state in FINAL else ()):
            self._history.add(
                "answer", self.name, job=job_id, began=began, question=question, tokens=tuple(answer.token_ids),
                text=answer.text, state=state, cached=answer.cached_tokens, total=answer.prompt_tokens,
            )  # fmt: skip
        return job

    def wait(self, job_id: str, within_s: float = 600.0) -> Any:
        """Return a job once it has ended. Raises TimeoutError, Refused."""
        end = time.monotonic() + within_s
        while True:
            began = time.monotonic()
            job = self.call("Wait", pb.WaitRequest(id=job_id, timeout_s=10), job_id)
            self._state(job, began)
            if _state_name(job.state) in FINAL:
                return self.get(job_id)
            if time.monotonic() > end:
                raise TimeoutError(f"{job_id} is {_state_name(job.state)} after {within_s:g} s")

    def cancel(self, job_id: str) -> Any:
        """Cancel a job. Raises Refused."""
        began = time.monotonic()
        job = self.call("Cancel", pb.JobRequest(id=job_id), job_id)
        state = _state_name(job.state)
        self._history.add("cancelled", self.name, job=job_id, began=began, state=state, number=job.last_event)
        return job

    def follow(
        self, job_id: str, after: int = 0, *, grouped: bool = True, leave: Callable[[], bool] = lambda: False,
        pause_s: float = 0.0,
    ) -> bool:  # fmt: skip
        """Read a job's stream to its end, attaching again after the last token; return whether it came to the end.

        Args:
            leave: asked after every event; True ends the reading.
            pause_s: slept after every event, as a slow reader does.
        """
        end = time.monotonic() + self._patience_s
        while not self._leaving.is_set():
            follower = self._history.new_follower()
            common = {"job": job_id, "follower": follower}
            attached = self._history.add("attached", self.name, number=after, **common)
            call = self._stub.Stream(pb.StreamRequest(id=job_id, after=after, grouped=grouped), metadata=self._metadata)
            try:
                for event in call:
                    end = time.monotonic() + self._patience_s
                    after = self._take(event, after, common, attached.at)
                    if event.HasField("job") and _state_name(event.job.state) in FINAL:
                        self._history.add("detached", self.name, **common)
                        return True
                    if leave():
                        self._history.add("detached", self.name, text="left", **common)
                        return False
                    time.sleep(pause_s)
                self._history.add("detached", self.name, text="ended by the head", **common)
            except grpc.RpcError as error:
                self._history.add("detached", self.name, text=error.code().name, **common)
                if not self._leaving.is_set() and (error.code() not in _AGAIN or time.monotonic() > end):
                    self._failed("Stream", error, job_id)
                    raise Refused(f"Stream: {error.code().name}") from error
            finally:
                call.cancel()
            self._leaving.wait(_PAUSE_S)
        return False

    def call(self, method: str, request: Any, job_id: str = "", timeout_s: float = _CALL_S) -> Any:
        """Make a call with one reply, again while the head is away or busy. Raises Refused.

        Args:
            request: a message, or a sequence of them for an upload.
        """
        end = time.monotonic() + self._patience_s
        while True:
            sent = iter(request) if isinstance(request, Sequence) else request
            try:
                return getattr(self._stub, method)(sent, timeout=timeout_s, metadata=self._metadata)
            except grpc.RpcError as error:
                self._failed(method, error, job_id)
                if error.code() not in _AGAIN or time.monotonic() > end or self._leaving.is_set():
                    raise Refused(f"{method}: {error.code().name}: {error.details()}") from error
            time.sleep(_PAUSE_S * random.uniform(0.5, 1.0))

    def _failed(self, method: str, error: Any, job_id: str) -> None:
        if not self._leaving.is_set():
            text = error.details() or ""
            self._history.add("error", self.name, job=job_id, kind=method, state=error.code().name, text=text)

    def _state(self, job: Any, began: float, follower: int = 0) -> None:
        self._history.add(
            "state", self.name, job=job.id, began=began, follower=follower, state=_state_name(job.state),
            restarts=job.restarts, number=job.last_event, text=job.error,
        )  # fmt: skip

    def _take(self, event: pb.JobEvent, after: int, common: dict[str, Any], attached_at: float) -> int:
        """Write down one event; return the number of the last token.

        A state may be on its way for as long as the stream is open, while others see the next one.
        """
        if event.HasField("job"):
            self._state(event.job, attached_at, common["follower"])
        elif event.HasField("progress"):
            shown = event.progress.progress
            self._history.add(
                "progress", self.name, question=event.progress.question, processed=shown.processed, total=shown.total,
                cached=shown.cached, number=event.number, **common,
            )  # fmt: skip
        for number, question, token in _tokens(event):
            self._history.add(
                "token", self.name, number=number, question=question, token=token.token_id, text=token.text, **common
            )
            after = number
        return after


def _tokens(event: pb.JobEvent) -> Iterator[tuple[int, int, Any]]:
    """Yield (number, question, token) of an event."""
    group = [event.token] if event.HasField("token") else event.tokens.tokens
    for number, one in enumerate(group, event.number - len(group) + 1):
        yield number, one.question, one.token


def _state_name(state: int) -> str:
    return str(pb.State.Name(state)).lower()
