"""The calls about documents of a Jobs service in memory. A token is a byte; an archive is id, line end and text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import grpc

from protos.jobs import jobs_pb2 as pb
from protos.jobs.jobs_pb2_grpc import JobsServicer

MAX_MODEL_LEN = 4096
ARCHIVE_PIECE = 1000  # bytes


class FakeDocuments(JobsServicer):
    """Documents of a service.

    Attributes:
    files: documents by id.
    texts: their bytes by id.
    headers: of uploads, in order.
    pieces: sizes of the pieces of the newest upload.
    export_drops: after how many pieces each of the next exports breaks off (UNAVAILABLE).
    """

    def __init__(self) -> None:
        self.files: dict[str, pb.Document] = {}
        self.texts: dict[str, bytes] = {}
        self.headers: list[pb.DocumentHeader] = []
        self.pieces: list[int] = []
        self.export_drops: list[int] = []

    def _begin(self, method: str, request: Any, context: grpc.ServicerContext) -> None:
        raise NotImplementedError

    def _receive(self, pieces: Iterator[pb.DocumentPiece]) -> bytes:
        self.headers.append(next(pieces).header)
        data = [piece.data for piece in pieces]
        self.pieces = [len(piece) for piece in data]
        return b"".join(data)

    def _store(self, text: bytes, header: pb.DocumentHeader) -> pb.Document:
        document = pb.Document(
            id=f"doc_{hashlib.sha256(text).hexdigest()[:32]}", name=header.name, size_bytes=len(text), created=1.0,
            expires=0.0 if header.pinned else 2.0, tokens=len(text), scale_len=header.max_tokens, pinned=header.pinned,
            shared=header.shared,
            parent=header.append_to, source_hash=header.source_hash,
        )  # fmt: skip
        self.texts[document.id] = text
        return self.files.setdefault(document.id, document)

    def _document(self, document_id: str, context: grpc.ServicerContext) -> pb.Document:
        if document_id not in self.files:
            context.abort(grpc.StatusCode.NOT_FOUND, f"{document_id}: no such document")
        return self.files[document_id]

    def UploadDocument(self, pieces: Iterator[pb.DocumentPiece], context: grpc.ServicerContext) -> pb.Document:
        self._begin("UploadDocument", None, context)
        return self._store(self._receive(pieces), self.headers[-1])

    def AppendDocument(self, pieces: Iterator[pb.DocumentPiece], context: grpc.ServicerContext) -> pb.Document:
        self._begin("AppendDocument", None, context)
        added = self._receive(pieces)
        first = self._document(self.headers[-1].append_to, context)
        return self._store(self.texts[first.id] + added, self.headers[-1])

    def CountTokens(self, pieces: Iterator[pb.DocumentPiece], context: grpc.ServicerContext) -> pb.TokenCount:
        self._begin("CountTokens", None, context)
        text = self._receive(pieces)
        return pb.TokenCount(tokens=len(text), size_bytes=len(text), max_model_len=MAX_MODEL_LEN)

    def PinDocument(self, request: pb.PinRequest, context: grpc.ServicerContext) -> pb.Document:
        self._begin("PinDocument", request, context)
        document = self._document(request.id, context)
        document.pinned, document.expires = request.pinned, 0.0 if request.pinned else 2.0
        return document

    def ExportDocument(self, request: pb.ExportRequest, context: grpc.ServicerContext) -> Iterator[pb.ArchivePiece]:
        self._begin("ExportDocument", request, context)
        archive = self._document(request.id, context).id.encode() + b"\n" + self.texts[request.id]
        drop = self.export_drops.pop(0) if self.export_drops else None
        for sent, start in enumerate(range(0, len(archive), ARCHIVE_PIECE)):
            if sent == drop:
                context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
            yield pb.ArchivePiece(data=archive[start : start + ARCHIVE_PIECE])

    def ImportDocument(self, pieces: Iterator[pb.ArchivePiece], context: grpc.ServicerContext) -> pb.Document:
        self._begin("ImportDocument", None, context)
        document_id, line_end, text = b"".join(piece.data for piece in pieces).partition(b"\n")
        document = self._store(text, pb.DocumentHeader(name="imported"))
        if not line_end or document.id.encode() != document_id:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "archive: none of ours")
        return document

    def GetDocument(self, request: pb.DocumentRequest, context: grpc.ServicerContext) -> pb.Document:
        self._begin("GetDocument", request, context)
        return self._document(request.id, context)

    def ListDocuments(self, request: pb.ListDocumentsRequest, context: grpc.ServicerContext) -> pb.DocumentList:
        self._begin("ListDocuments", request, context)
        return pb.DocumentList(documents=self.files.values())

    def DeleteDocument(self, request: pb.DocumentRequest, context: grpc.ServicerContext) -> pb.Empty:
        self._begin("DeleteDocument", request, context)
        if self.files.pop(request.id, None) is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"{request.id}: no such document")
        return pb.Empty()
