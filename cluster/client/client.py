# Generated from async_client.py by python -m cluster.client.generate. DO NOT EDIT.
"""The client library: documents and jobs of a running head, from anywhere.

>>> from pathlib import Path
>>> from longreach import Client
>>> with Client("127.0.0.1:7777") as client:
...     job = client.submit(Path("report.txt"), ["What was decided?", "By whom?"])
...     for answer in job.result:
...         print(answer.text)
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from cluster.client.connection import DEFAULT_ADDRESS, DEFAULT_DATA_DIR, Connection, ConnectionOptions, state_connection
from cluster.client.errors import Busy, LongreachError, NotFound, Unavailable
from cluster.client.models import BaseJob, ClusterStatus, DocumentInfo, Event, JobData, JobEnded, StreamCursor
from cluster.client.requests import (
    SubmitOptions,
    build_submit,
    check_id,
    document_pieces,
    list_request,
    needs_upload,
)
from cluster.client.retry import CALL_RETRIES, REATTACH_RETRIES, RetryPolicy
from protos.jobs import jobs_pb2 as pb
from protos.jobs import validate
from protos.jobs.convert import read_message
from protos.jobs.limits import MAX_INT64

if TYPE_CHECKING:
    from cluster.client.transport import Transport

DocumentList = list[DocumentInfo]  # `list` is a method below
_EARLY_PAUSE_S = 0.5  # after a wait that the head ended before its time
_WAIT_PIECE_S = 30.0  # a long wait is many calls, so that a vanished head is noticed


class _Calls:
    """Calls to the head, tried again while it cannot be reached; the first one opens the connection.

    gRPC's own retry policy would not do: it ends after 5 attempts, does not repeat an upload larger than its buffer,
    and hides that a Delete which finds nothing is a second try.
    """

    def __init__(self, connection: Connection, retries: RetryPolicy) -> None:
        self._connection = connection
        self._retries = retries
        self._transport: Transport | None = None

    def call(self, method: str, request: Any, extra_s: float = 0.0) -> Any:
        """Make a call with one reply. Raises LongreachError.

        Args:
            request: a message, or for an upload a function that begins its messages anew for each try.
            extra_s: the time the head is asked to take.
        """
        transport = self._open()
        for tries, delay in enumerate((*self._retries.delays(), None)):
            try:
                reply = transport.call(method, request() if callable(request) else request, extra_s)
            except transport.RpcError as error:
                if delay is None or not transport.is_transient(error):
                    problem = transport.typed_error(error)
                    if tries and method.startswith("Delete") and isinstance(problem, NotFound):
                        return pb.Empty()  # deleted by an earlier try whose reply was lost
                    raise problem from error
            else:
                transport.has_answered = True
                return reply
            time.sleep(delay)
        raise AssertionError("the last try returns or raises")

    def stream(self, request: pb.StreamRequest) -> Iterator[pb.JobEvent]:
        """Yield events until the connection drops (Unavailable) or the head ends the stream."""
        transport = self._open()
        call = transport.stream(request)
        try:
            yield from call
        except transport.RpcError as error:
            raise transport.typed_error(error) from error
        finally:
            call.cancel()

    def close(self) -> None:
        """Close the connection; the next call opens another one."""
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    def _open(self) -> Transport:
        from cluster.client.transport import Transport

        if self._transport is None:
            self._transport = Transport(self._connection)
        return self._transport


class Job(BaseJob):
    """A job of the head; its properties are as of the last call.

    The job does not need this object: it survives clients and heads. `client.job(id)` finds it again.

    >>> job = client.submit("... a long document ...", "What was decided?")
    >>> for event in job.stream():
    ...     print(event)
    """

    def __init__(self, calls: _Calls, data: JobData, many: bool | None = None) -> None:
        super().__init__(data, many)
        self._calls = calls

    def refresh(self) -> Job:
        """Ask for the newest state; return this job. Raises NotFound when it was deleted or has expired.

        >>> job.refresh().progress
        """
        return self._take(self._calls.call("Get", pb.JobRequest(id=self.id)))

    def wait(self, timeout_s: float | None = None) -> Job:
        """Wait until the job has ended or `timeout_s` seconds have passed; return this job, whose `done` tells which.

        A job that fails raises nothing here. A head that restarts meanwhile is waited for, over a minute.

        >>> if not job.wait(60).done:
        ...     print(job.progress)
        """
        if timeout_s is not None:
            timeout_s = validate.check_number("timeout_s", timeout_s, 0.0, math.inf)
        end = math.inf if timeout_s is None else time.monotonic() + timeout_s
        cursor, is_first = StreamCursor(), True  # only for its patience while a head restarts
        while not self.done:
            began = time.monotonic()
            left = min(_WAIT_PIECE_S, max(0.0, end - began))
            try:
                self._take(self._calls.call("Wait", pb.WaitRequest(id=self.id, timeout_s=left), extra_s=left))
                cursor, is_first = StreamCursor(), False
                if not self.done and time.monotonic() - began < left / 2:  # the head is about to stop
                    time.sleep(min(_EARLY_PAUSE_S, left))
            except (Busy, Unavailable) as error:
                if is_first and isinstance(error, Busy):
                    raise
                pause = cursor.pause(error)
                if time.monotonic() + pause >= end:
                    raise
                time.sleep(pause)
            if time.monotonic() >= end:
                break
        return self

    @property
    def result(self) -> Any:
        """Wait for the end; return the Answer, or a list of them when a list of questions was asked.

        Raises:
            JobFailed: the job failed or was cancelled.

        >>> job = client.submit("... a document ...", "What was decided?")
        >>> job.result.text
        """
        self.wait()
        if self.data.last_event and not any(answer.token_ids for answer in self.data.answers):
            self.refresh()  # known from a listing, which leaves tokens out
        return self._result()

    def stream(self, after: int = 0, retries: RetryPolicy = REATTACH_RETRIES) -> Iterator[Event]:
        """Yield progress and tokens as they come, then JobEnded; begin after token number `after`.

        When the connection drops, or the head ends a stream that nobody reads or that others need the place of, it
        attaches again by itself after the last token: none is lost or repeated.

        Raises:
            InvalidRequest: `after` is no token of the job.
            Busy: the head has too many streams.
            Unavailable: the head did not come back within `retries`, over a minute if not given.

        >>> for event in job.stream():
        ...     if isinstance(event, TokenEvent):
        ...         print(event.token.text, end="")
        """
        cursor, is_first = StreamCursor(validate.check_integer("after", after, 0, MAX_INT64), retries), True
        while True:
            messages = self._calls.stream(pb.StreamRequest(id=self.id, after=cursor.after, grouped=True))
            try:
                for message in messages:
                    is_first = False
                    yield from cursor.events(message)
                    if message.HasField("job") and self._take(message.job).done:
                        yield JobEnded(self.data)
                        return
                raise Unavailable(f"{self.id}: the head ended the stream before the job")
            except (Busy, Unavailable) as error:
                if is_first and isinstance(error, Busy):
                    raise
                delay = cursor.pause(error)
            finally:
                messages.close()  # type: ignore[attr-defined]  # cancels the call
            time.sleep(delay)

    def cancel(self) -> Job:
        """Cancel the job; one that has ended stays as it is. Return this job.

        >>> job.cancel().state
        """
        return self._take(self._calls.call("Cancel", pb.JobRequest(id=self.id)))

    def delete(self) -> None:
        """Forget the ended job with its results. Raises Conflict while it runs."""
        self._calls.call("Delete", pb.JobRequest(id=self.id))

    def _take(self, message: pb.Job) -> Job:
        self.data = read_message(JobData, message)
        return self


class Documents:
    """The documents the head keeps: `client.documents`. The same bytes give the same document."""

    def __init__(self, calls: _Calls) -> None:
        self._calls = calls

    def upload(self, source: str | bytes | os.PathLike[str], name: str | None = None) -> DocumentInfo:
        """Store the file of a path object, a text (`str`) or bytes of UTF-8, sent in pieces of 1 MiB.

        The `name` is for people, at most 256 characters; by default that of the file.

        Raises:
            InvalidRequest: the file cannot be read, or the document is empty or too large.

        >>> document = client.documents.upload(Path("report.txt"))
        >>> job = client.submit(document, "What was decided?")
        """
        next(document_pieces(source, name))  # refuses an unreadable file or text before a call is begun
        reply = self._calls.call("UploadDocument", lambda: document_pieces(source, name))
        return read_message(DocumentInfo, reply)

    def list(self) -> DocumentList:
        """Return all documents, newest first.

        >>> [document.name for document in client.documents.list()]
        """
        reply = self._calls.call("ListDocuments", pb.ListDocumentsRequest())
        return [read_message(DocumentInfo, document) for document in reply.documents]

    def get(self, document_id: str) -> DocumentInfo:
        """Return one document. Raises NotFound when there is none of this id."""
        reply = self._calls.call("GetDocument", pb.DocumentRequest(id=check_id("document", document_id)))
        return read_message(DocumentInfo, reply)

    def delete(self, document_id: str) -> None:
        """Forget a document. Raises Conflict while a job needs it, NotFound when there is none of this id."""
        self._calls.call("DeleteDocument", pb.DocumentRequest(id=check_id("document", document_id)))


class Client:
    """Documents and jobs of a head. Connects at the first call and may be used from several threads.

    Besides the errors named below, every call raises Unavailable (the head cannot be reached, or does not answer in
    time), Unauthenticated and TlsError; LongreachError is the base of all.

    >>> with Client() as client:
    ...     job = client.submit("... a document ...", "What was decided?")
    ...     print(job.result.text)
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, api_key: str | None = None, *,
        retries: RetryPolicy = CALL_RETRIES, **options: Unpack[ConnectionOptions],
    ) -> None:  # fmt: skip
        """Check the arguments (raises InvalidRequest); nothing is sent yet.

        Args:
            address: `host:port` of the head, or `unix:/path`.
            api_key: default: the environment variable LONGREACH_API_KEY.
            retries: of calls while the head cannot be reached. Default: for about a second.
            options: TLS files and more, see `ConnectionOptions`.
        """
        self._calls = _Calls(Connection(address, api_key, **options), retries)
        self._address = address
        self.documents = Documents(self._calls)

    @classmethod
    def from_state(
        cls, data_dir: str | os.PathLike[str] = DEFAULT_DATA_DIR, api_key: str | None = None, *,
        retries: RetryPolicy = CALL_RETRIES, **options: Unpack[ConnectionOptions],
    ) -> Client:  # fmt: skip
        """Return the client of the head that `longreach up` started on this machine.

        With TLS it trusts the certificate that the head's state names. Raises Unavailable when no head is ready.

        >>> with Client.from_state() as client:
        ...     print(client.status().model)
        """
        address, merged = state_connection(data_dir, options)
        return cls(address, api_key, retries=retries, **merged)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> str:
        """Where the head is, `host:port`."""
        return self._address

    def close(self) -> None:
        """Close the connection; may be called twice. Jobs go on."""
        self._calls.close()

    def submit(
        self, document: str | os.PathLike[str] | DocumentInfo | None = None,
        question: str | Sequence[str] | None = None, **options: Unpack[SubmitOptions],
    ) -> Job:  # fmt: skip
        """Queue a job: questions about a document, token ids, chat messages, or a raw prompt.

        Args:
            document: a `str` is the text itself; a path object is a file, uploaded first; or one of `documents`.
            question: one, or a list of them, which share the reading of the document.
            options: the input when there is no document, sampling and more, see `SubmitOptions`.

        Raises:
            InvalidRequest: the input or an option cannot be used.
            NotFound: the document has been deleted or has expired.
            Conflict: the idempotency key was used with another request.
            Busy: the queue is full.

        >>> job = client.submit(Path("report.txt"), "What was decided?", max_tokens=64, labels={"team": "law"})
        """
        build_submit("" if document is not None else None, question, options)  # before anything is uploaded
        if document is not None and not isinstance(document, DocumentInfo) and needs_upload(document):
            document = self.documents.upload(document)
        assert not isinstance(document, os.PathLike)
        message = self._calls.call("Submit", build_submit(document, question, options))
        many = question is not None and not isinstance(question, str)
        return Job(self._calls, read_message(JobData, message), many)

    def job(self, job_id: str) -> Job:
        """Find a job again. Raises NotFound when there is none of this id."""
        message = self._calls.call("Get", pb.JobRequest(id=check_id("job", job_id)))
        return Job(self._calls, read_message(JobData, message))

    def jobs(
        self, states: Collection[str] = (), labels: Mapping[str, str] | None = None, limit: int | None = None
    ) -> Iterator[Job]:
        """Yield jobs, newest first, fetched page by page; without token ids until `refresh`.

        Only those in one of `states` and with all of `labels`, at most `limit`. Raises InvalidRequest.

        >>> for job in client.jobs(states=["failed"], limit=10):
        ...     print(job.id, job.error)
        """
        request = list_request(states, labels, limit)
        left = limit
        while left is None or left > 0:
            page = self._calls.call("List", request)
            for message in page.jobs[:left]:
                yield Job(self._calls, read_message(JobData, message))
            left = None if left is None else left - len(page.jobs)
            if not page.next_page_token:
                return
            if page.next_page_token == request.page_token:
                raise LongreachError(f"{self._address}: the listing does not go on after its page")
            request.page_token = page.next_page_token

    def status(self) -> ClusterStatus:
        """Return stages, queue and memory of the cluster.

        >>> client.status().kv_usage
        """
        return read_message(ClusterStatus, self._calls.call("ClusterStatus", pb.ClusterStatusRequest()))
