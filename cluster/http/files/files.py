"""Files: documents under another name. Those that jobs are about become text, those of batches stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, cast

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, Response

from cluster.http.core.backend import Backend
from cluster.http.core.calls import call_of
from cluster.http.core.errors import ApiError, refuse, to_api_error
from cluster.http.files.attachments import document_id, file_id
from cluster.http.files.extraction import file_text
from cluster.http.files.multipart import Form, read_form
from cluster.jobs.document.chain import ChainDigest
from cluster.jobs.model import DocumentDamaged, DocumentRecord, JobNotFound, check_id
from cluster.jobs.tenants.tenant import owned_id
from protos.jobs import validate

if TYPE_CHECKING:
    from cluster.jobs.tenants.service import TenantService

MAX_LISTED = 10_000
_USER_DATA, _BATCH, BATCH_OUTPUT = "user_data", "batch", "batch_output"
_UPLOADED = (_USER_DATA, _BATCH)
_PURPOSES = (*_UPLOADED, BATCH_OUTPUT)
_PIECE = 1 << 20


def make_router(backend: Backend) -> APIRouter:
    """Return the routes."""
    router = APIRouter()

    @router.post("/v1/files", summary="Store a file.", openapi_extra=_UPLOAD)
    async def create(request: Request) -> dict[str, Any]:
        call = call_of(request)
        call.become_stream()
        service = call.service
        limits = backend.limits
        documents = service.documents
        with documents.receiving() as check_room:
            received = await read_form(backend, request, documents.spool, limits.max_document_bytes, check_room)
        with received as form:
            try:
                record = await backend.call(_store, service, form, limits.max_document_bytes)
            except Exception as error:
                raise to_api_error(error, {"document": "file"}) from error
        return file_object(record)

    @router.get("/v1/files", summary="List files, the newest first.")
    async def files(
        request: Request, after: str = "", limit: int = MAX_LISTED, order: str = "desc", purpose: str | None = None
    ) -> dict[str, Any]:
        return await backend.call(_page, call_of(request).service, after, limit, order, purpose)

    @router.get("/v1/files/{file}", summary="Describe a file.")
    async def get(request: Request, file: str) -> dict[str, Any]:
        return file_object(await backend.call(_get, call_of(request).service, file))

    @router.get("/v1/files/{file}/content", summary="Return the text of a file.")
    async def content(request: Request, file: str) -> Response:
        service = call_of(request).service
        record = await backend.call(_get, service, file)
        path = await backend.call(_checked, service, record)
        kind = "application/jsonl" if record.purpose else "text/plain"
        return FileResponse(path, media_type=f"{kind}; charset=utf-8", filename=record.name)

    @router.delete("/v1/files/{file}", summary="Delete a file.")
    async def delete(request: Request, file: str) -> dict[str, Any]:
        service = call_of(request).service
        record = await backend.call(_get, service, file)
        await backend.call(service.documents.delete, record.id)
        return {"id": file_id(record.id), "object": "file", "deleted": True}

    return router


# how the OpenAPI document describes the form
_UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(_UPLOADED)},
                    },
                    "required": ["file", "purpose"],
                }
            }
        },
    }
}


def file_object(record: DocumentRecord) -> dict[str, Any]:
    """Return a document as a file."""
    return {
        "id": file_id(record.id), "object": "file", "bytes": record.size_bytes, "created_at": int(record.created),
        "expires_at": int(record.expires) if record.expires else None, "filename": record.name,
        "purpose": record.purpose or _USER_DATA, "status": "processed", "status_details": None,
    }  # fmt: skip


def _get(service: TenantService, file: str) -> DocumentRecord:
    """Return a stored file. Raises JobNotFound, also for what is no id."""
    document = document_id(file)
    try:
        check_id(document, "doc")
    except ValueError as error:
        raise JobNotFound(f"file: {validate.show(file)}: not found") from error
    return service.documents.get(document)


def _store(service: TenantService, form: Form, limit: int) -> DocumentRecord:
    """Store the file of a form. Raises ApiError, InvalidRequest, JobError."""
    purpose = form.fields.get("purpose", "")
    if purpose not in _UPLOADED:
        raise refuse("purpose", f"{validate.show(purpose)}: must be one of {', '.join(_UPLOADED)}")
    if form.filename is None:
        raise refuse("file", "(missing): must be a part of the form")
    name = form.filename
    if purpose == _BATCH:
        return service.documents.put(name, _pieces(form.file), limit, _BATCH)
    text = file_text("file", cast(BinaryIO, form.file), name)
    return service.add_document(text.name, [text.data], limit, source_hash=text.source_hash)


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    return iter(partial(file.read, _PIECE), b"")


def _page(service: TenantService, after: str, limit: int, order: str, purpose: str | None) -> dict[str, Any]:
    validate.check_integer("limit", limit, 1, MAX_LISTED)
    if order not in ("asc", "desc"):
        raise refuse("order", f"{validate.show(order)}: must be asc or desc")
    if purpose is not None and purpose not in _PURPOSES:
        raise refuse("purpose", f"{validate.show(purpose)}: must be one of {', '.join(_PURPOSES)}")
    known = _get(service, after).id if after else ""
    stored = "" if purpose == _USER_DATA else purpose
    found = service.documents.page(limit + 1, known, stored, order == "desc")
    return page_of([file_object(record) for record in found], limit)


def page_of(objects: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """Return the first `limit` objects as a page of a list; more of them say that there are others."""
    shown = objects[:limit]
    ids = [one["id"] for one in shown] or [None]
    return {
        "object": "list", "data": shown, "first_id": ids[0], "last_id": ids[-1], "has_more": len(objects) > limit,
    }  # fmt: skip


def _checked(service: TenantService, record: DocumentRecord) -> Path:
    """Return where a file is, whose content is what was uploaded. Raises ApiError, DocumentDamaged."""
    path, chain = service.documents.path(record.id), ChainDigest(record.seams)
    try:
        with path.open("rb") as file:
            for piece in _pieces(file):
                chain.update(piece)
    except FileNotFoundError as error:
        raise ApiError(404, f"file: {file_id(record.id)}: its content is gone: upload it again") from error
    if owned_id(record.owner, chain.document_id) != record.id:
        raise DocumentDamaged(f"file: {file_id(record.id)}: has other content than was uploaded: upload it again")
    return path
