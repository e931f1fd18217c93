"""The client library: documents and jobs of a running head, from anywhere.

`cluster.client.async_client` is the same for asyncio.

>>> from pathlib import Path
>>> from cluster import Client
>>> with Client("127.0.0.1:7777") as client:
...     job = client.submit(Path("report.txt"), ["What was decided?", "By whom?"])
...     for answer in job.result:
...         print(answer.text)
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack

from cluster.client.connection import Connection, ConnectionOptions, state_connection
from cluster.client.errors import (
    CALL_RETRIES,
    DEFAULT_ADDRESS,
    DEFAULT_DATA_DIR,
    REATTACH_RETRIES,
    RetryPolicy,
    Unavailable,
)
from cluster.client.models import (
    ClusterStatus,
    DocumentInfo,
    Event,
    JobData,
    JobEnded,
    JobView,
    StreamCursor,
)
from cluster.client.requests import (
    SubmitOptions,
    build_submit,
    check_after,
    check_source,
    check_wait,
    document_pieces,
    document_request,
    job_request,
    list_request,
    needs_upload,
)
from protos.jobs import jobs_pb2 as pb

if TYPE_CHECKING:
    from cluster.client.transport import SyncWire

_WAIT_PIECE_S = 30.0  # a long wait is many calls, so that a vanished head is noticed


class Job(JobView):
    """A job of the head; its properties are as of the last call.

    The job does not need this object: it survives clients and heads. `client.job(id)` finds it again.

    >>> job = client.submit("... a long document ...", "What was decided?")
    >>> for event in job.stream():
    ...     print(event)
    """

    def __init__(self, wire: Callable[[], SyncWire], data: JobData, many: bool | None = None) -> None:
        super().__init__(data, many)
        self._wire = wire

    def refresh(self) -> Job:
        """Ask for the newest state; returns this job. `job.refresh().progress` is where it stands."""
        return self._take(self._wire().call("Get", pb.JobRequest(id=self.id)))

    def wait(self, timeout_s: float | None = None) -> Job:
        """Block until the job has ended or `timeout_s` have passed; `job.done` tells which. Does not raise JobFailed.

        >>> if not job.wait(60).done:
        ...     print(job.progress)
        """
        timeout_s = check_wait(timeout_s)
        end = None if timeout_s is None else time.monotonic() + timeout_s
        cursor = StreamCursor()  # only for its patience while a head restarts
        left = _WAIT_PIECE_S
        while not self.done:
            if end is not None:
                left = min(_WAIT_PIECE_S, max(0.0, end - time.monotonic()))
            try:
                self._take(self._wire().call("Wait", pb.WaitRequest(id=self.id, timeout_s=left), extra_s=left))
                cursor = StreamCursor()
            except Unavailable as error:
                pause = cursor.pause(error)
                if end is not None and time.monotonic() + pause >= end:
                    raise
                time.sleep(pause)
            if end is not None and time.monotonic() >= end:
                break
        return self

    @property
    def result(self) -> Any:
        """Wait, then the Answer; a list of them when a list of questions was asked. Raises JobFailed.

        >>> client.submit("... a document ...", "What was decided?").result.text
        """
        if not self.wait().done:
            raise AssertionError("a wait without a timeout ends with the job")
        if self.data.last_event and not any(answer.token_ids for answer in self.data.answers):
            self.refresh()  # known from a listing, which leaves tokens out
        return self._result()

    def stream(self, after: int = 0, retries: RetryPolicy = REATTACH_RETRIES) -> Iterator[Event]:
        """Progress and tokens as they come, then JobEnded; begins after token number `after`.

        When the connection drops it attaches again by itself after the last token: none is lost or repeated.

        Raises:
            Unavailable: the head did not come back. NotFound: no such job.

        >>> for event in job.stream():
        ...     if isinstance(event, TokenEvent):
        ...         print(event.token.text, end="")
        """
        cursor = StreamCursor(check_after(after), retries)
        while True:
            messages = self._wire().stream(pb.StreamRequest(id=self.id, after=cursor.after, grouped=True))
            try:
                for message in messages:
                    for event in cursor.events(message):
                        if isinstance(event, (JobData, JobEnded)):
                            self.data = event.job if isinstance(event, JobEnded) else event
                        if not isinstance(event, JobData):
                            yield event
                        if isinstance(event, JobEnded):
                            return
                raise Unavailable(f"{self.id}: the head ended the stream before the job")
            except Unavailable as error:
                delay = cursor.pause(error)
            finally:
                messages.close()  # type: ignore[attr-defined]  # cancels the call
            time.sleep(delay)

    def cancel(self) -> Job:
        """Cancel the job; one that has ended stays as it is. `job.cancel().state`"""
        return self._take(self._wire().call("Cancel", pb.JobRequest(id=self.id)))

    def delete(self) -> None:
        """Forget the ended job with its results; Conflict while it runs. `job.wait().delete()`"""
        self._wire().call("Delete", pb.JobRequest(id=self.id))

    def _take(self, message: pb.Job) -> Job:
        self.data = JobData.read(message)
        return self


class Documents:
    """The documents the head keeps: `client.documents`. The same bytes give the same document."""

    def __init__(self, wire: Callable[[], SyncWire]) -> None:
        self._wire = wire

    def upload(self, source: str | bytes | os.PathLike[str], name: str | None = None) -> DocumentInfo:
        """Store the file of a path object, a text (`str`) or bytes, sent in pieces of 1 MiB.

        >>> client.submit(client.documents.upload(Path("report.txt")), "What was decided?")
        """
        check_source(source, name)
        return DocumentInfo.read(self._wire().upload(lambda: document_pieces(source, name)))

    def list(self) -> list[DocumentInfo]:
        """All documents. `[document.name for document in client.documents.list()]`"""
        return [DocumentInfo.read(d) for d in self._wire().call("ListDocuments", pb.ListDocumentsRequest()).documents]

    def get(self, document_id: str) -> DocumentInfo:
        """One document; NotFound when there is none. `client.documents.get("doc_...").size_bytes`"""
        return DocumentInfo.read(self._wire().call("GetDocument", document_request(document_id)))

    def delete(self, document_id: str) -> None:
        """Forget a document; Conflict while a job needs it. `client.documents.delete("doc_...")`"""
        self._wire().call("DeleteDocument", document_request(document_id))


class Client:
    """A head's documents and jobs. Connects at the first call; may be used from several threads.

    >>> with Client() as client:
    ...     print(client.submit("... a document ...", "What was decided?").result.text)
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, api_key: str | None = None, *,
        retries: RetryPolicy = CALL_RETRIES, **options: Unpack[ConnectionOptions],
    ) -> None:  # fmt: skip
        """Args:
        api_key: default: the environment variable LONGREACH_API_KEY.
        options: TLS files and more, see `ConnectionOptions`. Raises InvalidRequest.
        """
        self._connection = Connection(address, api_key, **options)
        self._retries = retries
        self._wire: SyncWire | None = None
        self.documents = Documents(self._open)

    @classmethod
    def from_state(
        cls, data_dir: str | os.PathLike[str] = DEFAULT_DATA_DIR, api_key: str | None = None, *,
        retries: RetryPolicy = CALL_RETRIES, **options: Unpack[ConnectionOptions],
    ) -> Client:  # fmt: skip
        """The client of the head that `longreach up` started on this machine; Unavailable when there is none.

        With TLS it trusts the certificate that the head's state names.

        >>> with Client.from_state() as client:
        ...     print(client.status().model)
        """
        address, merged = state_connection(data_dir, options)
        return cls(address, api_key, retries=retries, **merged)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def address(self) -> str:
        """Where the head is, `host:port`."""
        return self._connection.address

    def close(self) -> None:
        """Close the connection; may be called twice. Jobs go on."""
        if self._wire is not None:
            self._wire.close()
            self._wire = None

    def submit(
        self, document: str | os.PathLike[str] | DocumentInfo | None = None,
        question: str | Sequence[str] | None = None, **options: Unpack[SubmitOptions],
    ) -> Job:  # fmt: skip
        """Queue a job: questions about a document, token ids, chat messages, or a raw prompt.

        A `str` document is its text; a path object is a file, uploaded first. For `options` see `SubmitOptions`.

        Raises:
            InvalidRequest, NotFound (document), Conflict (idempotency key), Busy, Unauthenticated, Unavailable.

        >>> job = client.submit(Path("report.txt"), "What was decided?", max_tokens=64, labels={"team": "law"})
        """
        build_submit("" if document is not None else None, question, options)  # before anything is uploaded
        if document is not None and not isinstance(document, DocumentInfo) and needs_upload(document):
            document = self.documents.upload(document)
        assert not isinstance(document, os.PathLike)
        message = self._open().call("Submit", build_submit(document, question, options))
        many = question is not None and not isinstance(question, str)
        return Job(self._open, JobData.read(message), many)

    def job(self, job_id: str) -> Job:
        """Find a job again; NotFound when there is none. `client.job("job_...").result`"""
        return Job(self._open, JobData.read(self._open().call("Get", job_request(job_id))))

    def jobs(
        self, states: Collection[str] = (), labels: Mapping[str, str] | None = None, limit: int | None = None
    ) -> Iterator[Job]:
        """Jobs, newest first, fetched page by page; without token ids until `refresh`.

        >>> for job in client.jobs(states=["failed"], limit=10):
        ...     print(job.id, job.error)
        """
        request = list_request(states, labels, limit)
        left = limit
        while left is None or left > 0:
            page = self._open().call("List", request)
            for message in page.jobs[:left]:
                yield Job(self._open, JobData.read(message))
            left = None if left is None else left - len(page.jobs)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def status(self) -> ClusterStatus:
        """Stages, queue and memory of the cluster. `client.status().kv_usage`"""
        return ClusterStatus.read(self._open().call("ClusterStatus", pb.ClusterStatusRequest()))

    def _open(self) -> SyncWire:
        from cluster.client.transport import SyncWire

        if self._wire is None:
            self._wire = SyncWire(self._connection, self._retries)
        return self._wire
