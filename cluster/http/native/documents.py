"""Routes of documents: add, append, list, read, pin, delete, and move as archives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from cluster.access import job_calls
from cluster.client.models import Document, JobData
from cluster.client.requests import build_read
from cluster.http.core.backend import Backend
from cluster.http.core.body import read_model
from cluster.http.core.calls import call_of
from cluster.http.core.errors import ApiError
from cluster.http.core.upload import receive
from cluster.http.native import shapes
from cluster.http.openai.chat import body_of
from cluster.jobs.model import DocumentRecord, check_id
from cluster.jobs.tenants.service import TenantService
from protos.jobs import jobs_pb2 as pb
from protos.jobs import validate
from protos.jobs.limits import MAX_UINT32

_BYTES: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"*/*": {"schema": {"type": "string", "format": "binary"}}}}
}
_ARCHIVE = "application/x-tar"
_Name = Annotated[str, Query(description="For people.")]
_SourceHash = Annotated[str, Query(description="SHA-256 of the file that the text was taken from.")]
_Pinned = Annotated[bool, Query(description="It never expires.")]
_Shared = Annotated[bool, Query(description="Every API key may read it and ask about it.")]


class PinRequest(shapes.NativeModel):
    """`POST /v1/documents/{id}/pin`."""

    pinned: bool = True


def make_router(backend: Backend) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["longreach"])
    _add_uploads(router, backend)

    @router.get("/v1/documents", summary="All documents.", response_model=shapes.DocumentPage)
    async def list_(request: Request) -> Response:
        service = call_of(request).service

        def found() -> list[dict[str, Any]]:
            return [shapes.document_object(message) for message in job_calls.list_documents(service).documents]

        return JSONResponse({"documents": await backend.call(found)})

    @router.get("/v1/documents/{document_id}", summary="A document.", response_model=Document)
    async def get(request: Request, document_id: str) -> Response:
        documents = call_of(request).service.documents
        return await _show(backend, request, await backend.call(documents.get, check_id(document_id, "doc")))

    @router.post("/v1/documents/{document_id}/read", summary="Queue a job that reads it.", response_model=JobData)
    async def read(request: Request, document_id: str) -> Response:
        service = call_of(request).service
        asked = build_read(check_id(document_id, "doc"))

        def submit() -> dict[str, Any]:
            record = job_calls.submit(service, asked, backend.limits.max_document_bytes)
            return shapes.job_object(job_calls.whole_job(service, record))

        return JSONResponse(await backend.call(submit))

    @router.post(
        "/v1/documents/{document_id}/pin", summary="Pin it, or let it expire again.", response_model=Document,
        openapi_extra=body_of(PinRequest),
    )  # fmt: skip
    async def pin(request: Request, document_id: str) -> Response:
        asked = await read_model(backend, request, PinRequest)
        documents = call_of(request).service.documents
        record = await backend.call(documents.pin, check_id(document_id, "doc"), asked.pinned)
        return await _show(backend, request, record)

    @router.delete("/v1/documents/{document_id}", summary="Forget it with its KV.", response_model=shapes.Deleted)
    async def delete(request: Request, document_id: str) -> Response:
        await backend.call(call_of(request).service.documents.delete, check_id(document_id, "doc"))
        return JSONResponse({"id": document_id, "deleted": True})

    @router.get(
        "/v1/documents/{document_id}/export", summary="It as an archive, with its stored KV.",
        responses={200: {"content": {_ARCHIVE: {}}}},
    )  # fmt: skip
    async def export(request: Request, document_id: str, without_kv: bool = False) -> Response:
        call_of(request).become_stream()
        archive = Archive(backend, call_of(request).service, check_id(document_id, "doc"), not without_kv)
        await archive.begin()
        return StreamingResponse(archive.pieces(), media_type=_ARCHIVE)

    return router


def _add_uploads(router: APIRouter, backend: Backend) -> None:
    """Add the routes whose bodies are documents."""
    max_bytes = backend.limits.max_document_bytes

    async def add(request: Request, header: pb.DocumentHeader) -> Response:
        validate.check_header(header)
        _check_raw(request, max_bytes)
        service = call_of(request).service

        def take(pieces: Iterator[bytes]) -> DocumentRecord:
            return service.add_document(
                header.name, pieces, max_bytes, max_tokens=header.max_tokens, pinned=header.pinned,
                source_hash=header.source_hash, append_to=header.append_to, shared=header.shared,
            )  # fmt: skip

        return await _show(backend, request, await receive(backend, request, take))

    @router.post(
        "/v1/documents", summary="Store a text: the body.", response_model=Document, openapi_extra=_BYTES,
    )  # fmt: skip
    async def upload(
        request: Request, name: _Name = "", source_hash: _SourceHash = "", pinned: _Pinned = False,
        shared: _Shared = False,
        max_tokens: Annotated[int, Query(ge=0, le=MAX_UINT32, description="Length it may grow to.")] = 0,
    ) -> Response:  # fmt: skip
        header = pb.DocumentHeader(
            name=name, max_tokens=max_tokens, pinned=pinned, source_hash=source_hash, shared=shared
        )
        return await add(request, header)

    @router.post(
        "/v1/documents/{document_id}/append", summary="A new document: this one, and the body after it.",
        response_model=Document, openapi_extra=_BYTES,
    )  # fmt: skip
    async def append(
        request: Request, document_id: str, name: _Name = "", source_hash: _SourceHash = "", pinned: _Pinned = False
    ) -> Response:
        before = check_id(document_id, "doc")
        return await add(
            request, pb.DocumentHeader(name=name, append_to=before, pinned=pinned, source_hash=source_hash)
        )

    @router.post(
        "/v1/documents/import", summary="Store the document of an archive.", response_model=Document,
        openapi_extra=_BYTES,
    )  # fmt: skip
    async def import_(request: Request) -> Response:
        service = call_of(request).service
        record = await receive(backend, request, lambda pieces: service.import_document(pieces, max_bytes))
        return await _show(backend, request, record)


async def _show(backend: Backend, request: Request, record: DocumentRecord) -> Response:
    message = await backend.call(job_calls.show_document, call_of(request).service, record)
    return JSONResponse(shapes.document_object(message))


def _check_raw(request: Request, max_bytes: int) -> None:
    """Refuse a body that is no text, or declared too long, before it is read (ApiError)."""
    kind = request.headers.get("content-type", "")
    if kind.lower().startswith("multipart/"):
        problem = f"content-type: {kind[:60]!r}: the body must be the text itself: curl --data-binary @FILE"
        raise ApiError(415, problem, code="unsupported_media_type")
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > max_bytes:
        problem = f"document: {declared[:20]} bytes: must be at most {max_bytes} (server.max_document_bytes)"
        raise ApiError(413, problem, code="request_too_large")


class Archive:
    """A document as an archive, made piece by piece in a thread while a client reads."""

    def __init__(self, backend: Backend, service: TenantService, document_id: str, with_kv: bool) -> None:
        self._backend = backend
        self._service = service
        self._iterator: Iterator[bytes] = iter(())
        self._pull = backend.followers.submit(self._open, document_id, with_kv)

    def _open(self, document_id: str, with_kv: bool) -> bytes:
        self._iterator = self._service.export_document(document_id, with_kv)
        return next(self._iterator, b"")

    async def begin(self) -> None:
        """Wait for the first piece. Raises what making it raises."""
        await asyncio.wrap_future(self._pull)

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the pieces; when the client goes, a thread ends what is left."""
        try:
            while piece := await asyncio.wrap_future(self._pull):
                yield piece
                self._pull = self._backend.followers.submit(next, self._iterator, b"")
        finally:
            with suppress(RuntimeError):  # the head is stopping
                self._backend.followers.submit(self._close)

    def _close(self) -> None:
        with suppress(Exception):  # was raised to who asked for it
            self._pull.result()
        if isinstance(self._iterator, Generator):
            self._iterator.close()
