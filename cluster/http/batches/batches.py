"""Batches: many requests in one file, answered one by one when nothing else is to do, as two files of results."""

from __future__ import annotations

import re
from typing import Any

from fastapi import APIRouter, Request

from cluster.http.batches.endpoints import ENDPOINTS
from cluster.http.core.backend import Backend
from cluster.http.core.body import read_model
from cluster.http.core.calls import call_of
from cluster.http.core.errors import ApiError, refuse
from cluster.http.files.attachments import document_id, file_id
from cluster.http.files.files import page_of
from cluster.http.openai.chat import body_of
from cluster.http.options import RequestModel
from cluster.jobs.model import check_id, new_id
from cluster.jobs.sqlite.batches import BatchRecord, BatchStatus
from cluster.jobs.tenants.service import TenantService
from protos.jobs import validate
from protos.jobs.limits import MAX_CHARS

_MAX_LISTED, _LISTED = 100, 20
_MAX_METADATA, _MAX_VALUE = 16, 512
_WINDOW = re.compile(r"([1-9][0-9]{0,3})([mhd])")
_SECONDS = {"m": 60.0, "h": 3600.0, "d": 86400.0}
_MAX_WINDOW_S = 30 * 86400.0


class BatchRequest(RequestModel):
    """`POST /v1/batches`."""

    input_file_id: str
    endpoint: str
    completion_window: str = "24h"
    metadata: dict[str, str] | None = None


def make_router(backend: Backend) -> APIRouter:
    """Return the routes."""
    router = APIRouter()

    @router.post("/v1/batches", summary="Begin a batch.", openapi_extra=body_of(BatchRequest))
    async def create(request: Request) -> dict[str, Any]:
        asked = await read_model(backend, request, BatchRequest)
        batch = await backend.call(_create, call_of(request).service, asked)
        backend.batches_changed.set()
        return batch_object(batch)

    @router.get("/v1/batches", summary="List batches, the newest first.")
    async def batches(request: Request, after: str = "", limit: int = _LISTED) -> dict[str, Any]:
        validate.check_integer("limit", limit, 1, _MAX_LISTED)
        found = await backend.call(call_of(request).service.batches.page, limit + 1, after)
        return page_of([batch_object(batch) for batch in found], limit)

    @router.get("/v1/batches/{batch}", summary="Describe a batch.")
    async def get(request: Request, batch: str) -> dict[str, Any]:
        return batch_object(await backend.call(call_of(request).service.batches.get, batch))

    @router.post("/v1/batches/{batch}/cancel", summary="Cancel a batch.")
    async def cancel(request: Request, batch: str) -> dict[str, Any]:
        found = await backend.call(call_of(request).service.batches.cancel, batch)
        backend.batches_changed.set()
        return batch_object(found)

    return router


def batch_object(batch: BatchRecord) -> dict[str, Any]:
    """Return a batch as clients see it."""
    ended = {f"{end}_at": None for end in ("completed", "failed", "expired", "cancelled")}
    if batch.finished is not None and batch.status.is_final:
        ended[f"{batch.status.value}_at"] = int(batch.finished)  # type: ignore[assignment]
    return {
        "id": batch.id, "object": "batch", "endpoint": batch.endpoint, "status": batch.status.value,
        "errors": {"object": "list", "data": [*batch.problems]} if batch.problems else None,
        "input_file_id": file_id(batch.input), "completion_window": batch.completion_window,
        "output_file_id": file_id(batch.output) if batch.output else None,
        "error_file_id": file_id(batch.errors) if batch.errors else None,
        "created_at": int(batch.created), "expires_at": int(batch.expires), "in_progress_at": _seconds(batch.started),
        "finalizing_at": _seconds(batch.finalizing), "cancelling_at": _seconds(batch.cancelling), **ended,
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "metadata": dict(batch.metadata),
    }  # fmt: skip


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)


def _create(service: TenantService, asked: BatchRequest) -> BatchRecord:
    """Store a batch. Raises ApiError, InvalidRequest, JobNotFound."""
    if asked.endpoint not in ENDPOINTS:
        allowed = f"must be one of {', '.join(ENDPOINTS)}"
        raise refuse("endpoint", f"{validate.show(asked.endpoint)}: {allowed}", "unsupported_value")
    match = _WINDOW.fullmatch(asked.completion_window)
    window = int(match[1]) * _SECONDS[match[2]] if match else 0.0
    if not 0 < window <= _MAX_WINDOW_S:
        shown = validate.show(asked.completion_window)
        raise refuse("completion_window", f"{shown}: must be minutes, hours or days up to 30 days, such as 24h")
    metadata = asked.metadata or {}
    validate.check_count("metadata", len(metadata), _MAX_METADATA)
    for key, value in metadata.items():
        validate.check_text("metadata", key, MAX_CHARS)
        validate.check_text(f"metadata.{key[:60]}", value, _MAX_VALUE)
    known = document_id(asked.input_file_id)
    try:
        service.documents.get(check_id(known, "doc"))
    except ValueError as error:
        raise refuse("input_file_id", f"{validate.show(asked.input_file_id)}: must be the id of a file") from error
    if service.is_draining:
        raise ApiError(503, "the head is stopping: ask again in a moment", code="stopping", retry_after_s=5.0)
    now = service.now()
    batch = BatchRecord(
        new_id("batch"), service.tenant.name, BatchStatus.VALIDATING, asked.endpoint, known,
        asked.completion_window, now, now + window, metadata,
    )  # fmt: skip
    service.batches.create(batch)
    return batch
