"""The client library for asyncio: documents and jobs of a running head, from anywhere.

>>> from pathlib import Path
>>> from longreach import AsyncClient
>>> async with AsyncClient("127.0.0.1:7777") as client:
...     job = await client.submit(Path("report.txt"), ["What was decided?", "By whom?"])
...     for answer in await job.result():
...         print(answer.text)
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import Unpack

from cluster.client.async_jobs import AsyncCalls
from cluster.client.async_jobs import AsyncJob as AsyncJob
from cluster.client.connection import DEFAULT_ADDRESS, DEFAULT_DATA_DIR, Connection, ConnectionOptions, state_connection
from cluster.client.documents.async_documents import AsyncDocuments
from cluster.client.errors import LongreachError
from cluster.client.ingest.source import Source
from cluster.client.models import ClusterStatus, Document, JobData
from cluster.client.requests import SubmitOptions, build_submit, check_id, list_request, needs_upload
from cluster.client.retry import CALL_RETRIES, RetryPolicy
from protos.jobs import jobs_pb2 as pb
from protos.jobs.convert import read_message


class AsyncClient:
    """Documents and jobs of a head. Connects at the first call and belongs to its event loop.

    Besides the errors named below, every call raises Unavailable (the head cannot be reached, or does not answer in
    time), Unauthenticated and TlsError; LongreachError is the base of all.

    >>> async with AsyncClient() as client:
    ...     job = await client.submit("... a document ...", "What was decided?")
    ...     print((await job.result()).text)
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
        self._calls = AsyncCalls(Connection(address, api_key, **options), retries)
        self._address = address
        self.documents = AsyncDocuments(self._calls)

    @classmethod
    def from_state(
        cls, data_dir: str | os.PathLike[str] = DEFAULT_DATA_DIR, api_key: str | None = None, *,
        retries: RetryPolicy = CALL_RETRIES, **options: Unpack[ConnectionOptions],
    ) -> AsyncClient:  # fmt: skip
        """Return the client of the head that `longreach up` started on this machine.

        With TLS it trusts the certificate that the head's state names. Raises Unavailable when no head is ready.

        >>> async with AsyncClient.from_state() as client:
        ...     print((await client.status()).model)
        """
        address, merged = state_connection(data_dir, options)
        return cls(address, api_key, retries=retries, **merged)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def address(self) -> str:
        """Where the head is, `host:port`."""
        return self._address

    async def close(self) -> None:
        """Close the connection; may be called twice. Jobs go on."""
        await self._calls.close()

    async def submit(
        self, document: Source | Document | Sequence[Source] | None = None,
        question: str | Sequence[str] | None = None, **options: Unpack[SubmitOptions],
    ) -> AsyncJob:  # fmt: skip
        """Queue a job: questions about a document, token ids, chat messages, or a raw prompt.

        Args:
            document: a `str` is the text itself; a path object is a file or folder, a list has several of them, which
                are added first as by `documents.add`; or one of `documents`.
            question: one, or a list of them, which share the reading of the document.
            options: the input when there is no document, sampling and more, see `SubmitOptions`.

        Raises:
            InvalidRequest: the input or an option cannot be used.
            NotFound: the document has been deleted or has expired.
            Conflict: the idempotency key was used with another request.
            Busy: the queue is full.

        >>> job = await client.submit(Path("report.txt"), "What was decided?", max_tokens=64, labels={"team": "law"})
        """
        build_submit("" if document is not None else None, question, options)  # before anything is uploaded
        if document is not None and not isinstance(document, Document) and needs_upload(document):
            document = await self.documents.add(document)
        message = await self._calls.call("Submit", build_submit(document, question, options))
        many = question is not None and not isinstance(question, str)
        return AsyncJob(self._calls, read_message(JobData, message), many)

    async def job(self, job_id: str) -> AsyncJob:
        """Find a job again. Raises NotFound when there is none of this id."""
        message = await self._calls.call("Get", pb.JobRequest(id=check_id("job", job_id)))
        return AsyncJob(self._calls, read_message(JobData, message))

    async def jobs(
        self, states: Collection[str] = (), labels: Mapping[str, str] | None = None, limit: int | None = None
    ) -> AsyncIterator[AsyncJob]:
        """Yield jobs, newest first, fetched page by page; without token ids until `refresh`.

        Only those in one of `states` and with all of `labels`, at most `limit`. Raises InvalidRequest.

        >>> async for job in client.jobs(states=["failed"], limit=10):
        ...     print(job.id, job.error)
        """
        request = list_request(states, labels, limit)
        left = limit
        while left is None or left > 0:
            page = await self._calls.call("List", request)
            for message in page.jobs[:left]:
                yield AsyncJob(self._calls, read_message(JobData, message))
            left = None if left is None else left - len(page.jobs)
            if not page.next_page_token:
                return
            if page.next_page_token == request.page_token:
                raise LongreachError(f"{self._address}: the listing does not go on after its page")
            request.page_token = page.next_page_token

    async def status(self) -> ClusterStatus:
        """Return stages, queue and memory of the cluster.

        >>> (await client.status()).kv_usage
        """
        return read_message(ClusterStatus, await self._calls.call("ClusterStatus", pb.ClusterStatusRequest()))
