# Generated from async_documents.py by python -m cluster.client.generate. DO NOT EDIT.
"""Documents of a head: add, append, read ahead, pin, export."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, overload

from cluster.client.documents.pieces import ArchiveFile, archive_pieces, upload_header, upload_pieces
from cluster.client.errors import Unavailable
from cluster.client.ingest.source import Source, read_source
from cluster.client.ingest.tree import Progress
from cluster.client.jobs import Calls, Job
from cluster.client.models import Document, JobData, TokenCount
from cluster.client.requests import build_read, check_id
from protos.jobs import jobs_pb2 as pb
from protos.jobs.convert import read_message

DocumentList = list[Document]  # `list` is a method below


class Documents:
    """The documents the head keeps: `client.documents`. The same text gives the same document.

    Where a call takes a `source`, a `str` is the text itself, `bytes` are UTF-8, and a path object is a file or a
    folder: text and code in any encoding, PDF, Office, EPUB, HTML, zip, tar. A list of them becomes one document. Where
    it takes `progress`, that is called as `progress(what, done, total)`, in bytes or files, from any thread; `total` is
    0 while it is unknown.

    >>> document, job = client.documents.add(Path("contract.pdf"), read=True)
    >>> job.wait()  # read over night; a question is then answered at once
    >>> job = client.submit(document, "What was agreed?")
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    @overload
    def add(
        self, source: Source | Sequence[Source], *, name: str | None = ..., read: Literal[False] = ...,
        max_tokens: int | None = ..., pinned: bool = ..., shared: bool = ..., encoding: str | None = ...,
        progress: Progress | None = ...,
    ) -> Document: ...  # fmt: skip

    @overload
    def add(
        self, source: Source | Sequence[Source], *, name: str | None = ..., read: Literal[True],
        max_tokens: int | None = ..., pinned: bool = ..., shared: bool = ..., encoding: str | None = ...,
        progress: Progress | None = ...,
    ) -> tuple[Document, Job]: ...  # fmt: skip

    def add(
        self, source: Source | Sequence[Source], *, name: str | None = None, read: bool = False,
        max_tokens: int | None = None, pinned: bool = False, shared: bool = False, encoding: str | None = None,
        progress: Progress | None = None,
    ) -> Document | tuple[Document, Job]:  # fmt: skip
        """Store a document and return it; with `read=True` return it with the job that reads it now.

        Args:
            name: for people, at most 256 characters; by default that of the file or folder.
            max_tokens: the length that it may grow to by `append`: its length scale is that of this length, so only
                what is added is read.
            pinned: keep it, with its stored KV, until it is unpinned or deleted.
            shared: every API key of the head may read it and ask about it; only yours can pin or delete it.
            encoding: of text files, such as "cp1251"; by default it is found out.

        Raises:
            InvalidRequest: the source cannot be read, or the document is empty or too large.
            Conflict: it is known, with another `max_tokens`.
            Busy: there is no room for it.

        >>> document = client.documents.add(Path("project/"), name="project", pinned=True)
        >>> print(document.id, document.tokens)
        """
        header = upload_header(name, max_tokens, pinned, "", shared)
        return self._send("UploadDocument", header, source, read, encoding, progress)

    @overload
    def append(
        self, document_id: str, source: Source | Sequence[Source], *, name: str | None = ...,
        read: Literal[False] = ..., encoding: str | None = ..., progress: Progress | None = ...,
    ) -> Document: ...  # fmt: skip

    @overload
    def append(
        self, document_id: str, source: Source | Sequence[Source], *, name: str | None = ...,
        read: Literal[True], encoding: str | None = ..., progress: Progress | None = ...,
    ) -> tuple[Document, Job]: ...  # fmt: skip

    def append(
        self, document_id: str, source: Source | Sequence[Source], *, name: str | None = None, read: bool = False,
        encoding: str | None = None, progress: Progress | None = None,
    ) -> Document | tuple[Document, Job]:  # fmt: skip
        """Store a new document, the text of another one with the source after it, and return it, as `add` does.

        It has the length scale of the first, so jobs read only what was added. The first stays as it is.

        Raises:
            NotFound: there is no document of this id.
            InvalidRequest: as of `add`, or it would be longer than the `max_tokens` of the first.

        >>> longer = client.documents.append(document.id, "What was said on Tuesday: ...")
        """
        header = upload_header(name, None, False, check_id("document", document_id))
        return self._send("AppendDocument", header, source, read, encoding, progress)

    def _send(
        self, method: str, header: pb.DocumentHeader, source: Source | Sequence[Source], read: bool,
        encoding: str | None, progress: Progress | None,
    ) -> Document | tuple[Document, Job]:  # fmt: skip
        text = read_source(source, encoding, progress)
        if not header.name and not header.append_to:
            header.name = text.name
        reply = self._calls.call(method, upload_pieces(header, text, progress))
        document = read_message(Document, reply)
        return (document, self.read(document.id)) if read else document

    def read(self, document_id: str) -> Job:
        """Queue a job that reads a document, so that its KV is there for questions to come; return the job.

        >>> client.documents.read(document.id).wait()
        """
        message = self._calls.call("Submit", build_read(document_id))
        return Job(self._calls, read_message(JobData, message))

    def list(self) -> DocumentList:
        """Return all documents, newest first.

        >>> [document.name for document in client.documents.list()]
        """
        reply = self._calls.call("ListDocuments", pb.ListDocumentsRequest())
        return [read_message(Document, document) for document in reply.documents]

    def get(self, document_id: str) -> Document:
        """Return one document. Raises NotFound when there is none of this id."""
        reply = self._calls.call("GetDocument", pb.DocumentRequest(id=check_id("document", document_id)))
        return read_message(Document, reply)

    def pin(self, document_id: str) -> Document:
        """Keep a document and its stored KV until it is unpinned or deleted. Raises NotFound."""
        return self._pin(document_id, True)

    def unpin(self, document_id: str) -> Document:
        """Let a document expire again some time after its last use. Raises NotFound."""
        return self._pin(document_id, False)

    def _pin(self, document_id: str, pinned: bool) -> Document:
        request = pb.PinRequest(id=check_id("document", document_id), pinned=pinned)
        return read_message(Document, self._calls.call("PinDocument", request))

    def delete(self, document_id: str) -> None:
        """Forget a document, and its KV that no other one has. Raises Conflict while a job needs it, NotFound."""
        self._calls.call("DeleteDocument", pb.DocumentRequest(id=check_id("document", document_id)))

    def count_tokens(
        self, source: Source | Sequence[Source], *, encoding: str | None = None, progress: Progress | None = None
    ) -> TokenCount:
        """Return how many tokens a source has, without storing it.

        >>> count = client.documents.count_tokens(Path("book.epub"))
        >>> print(count.tokens, count.fits)
        """
        text = read_source(source, encoding, progress)
        pieces = upload_pieces(pb.DocumentHeader(name=text.name), text, progress)
        return read_message(TokenCount, self._calls.call("CountTokens", pieces))

    def export(
        self, document_id: str, path: str | os.PathLike[str], *, kv: bool = True, overwrite: bool = False,
        progress: Progress | None = None,
    ) -> int:  # fmt: skip
        """Write a document with its tokens and stored KV to one file, and return its size in bytes.

        `import_` takes it in elsewhere: read on the big machine, ask on the small one. When the connection drops the
        file is begun anew; it gets its name once it is complete, and only its owner can read it.

        Args:
            kv: whether the KV comes along, which is most of the file.
            overwrite: whether a file of this name is replaced.

        Raises:
            NotFound: there is no document of this id.
            InvalidRequest: the file cannot be written.

        >>> client.documents.export(document.id, "contract.longreach")
        """
        document = self.get(document_id)
        expected = document.size_bytes + 4 * document.tokens + (document.stored_bytes if kv else 0)
        request = pb.ExportRequest(id=document.id, without_kv=not kv)
        delays = self._calls.delays()
        with ArchiveFile(path, overwrite) as archive:
            while True:
                archive.begin()
                try:
                    for piece in self._calls.stream("ExportDocument", request):
                        archive.write(piece.data)
                        if progress is not None:
                            progress("receiving", archive.size, max(archive.size, expected))
                except Unavailable:
                    delay = next(delays, None)
                    if delay is None:
                        raise
                else:
                    archive.finish()
                    return archive.size
                time.sleep(delay)

    def import_(self, path: str | os.PathLike[str], *, progress: Progress | None = None) -> Document:
        """Store the document of a file that `export` wrote, with the KV in it that fits this cluster; return it.

        Raises:
            InvalidRequest: the file cannot be read, is damaged, or none of ours.

        >>> document = client.documents.import_("contract.longreach")
        """
        reply = self._calls.call("ImportDocument", archive_pieces(Path(path), progress))
        return read_message(Document, reply)
