"""Routes of jobs: submit, list, read, follow, cancel, delete."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import JSONResponse, Response

from cluster.access import codec, job_calls
from cluster.client.models import JobData
from cluster.client.requests import PAGE_SIZE, list_request
from cluster.http.core.backend import Backend
from cluster.http.core.body import read_model
from cluster.http.core.calls import call_of
from cluster.http.core.errors import refuse, to_api_error
from cluster.http.core.following import EventStream, Followed, follow
from cluster.http.core.sse import error_event
from cluster.http.native import shapes
from cluster.http.native.job_request import PARAMS, JobRequest, submit_request
from cluster.http.openai.chat import body_of
from cluster.jobs.model import JobRecord, check_id
from cluster.jobs.subscriptions import ProgressUpdate
from cluster.jobs.tenants.service import TenantService
from protos.jobs.limits import MAX_INT64

_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "progress, token, state, ended"}
}


def make_router(backend: Backend) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["longreach"])

    @router.post("/v1/jobs", summary="Queue a job.", response_model=JobData, openapi_extra=body_of(JobRequest))
    async def submit(request: Request, idempotency_key: Annotated[str | None, Header()] = None) -> Response:
        asked = await read_model(backend, request, JobRequest)
        service = call_of(request).service

        def make() -> dict[str, Any]:
            message = submit_request(asked, idempotency_key)
            record = job_calls.submit(service, message, backend.limits.max_document_bytes)
            return shapes.job_object(job_calls.whole_job(service, record))

        try:
            return JSONResponse(await backend.call(make))
        except Exception as error:
            raise to_api_error(error, PARAMS) from error

    @router.get("/v1/jobs", summary="Jobs, the newest first.", response_model=shapes.JobPage)
    async def list_(
        request: Request,
        state: Annotated[list[str], Query(description="In one of these states.")] = [],  # noqa: B006
        label: Annotated[list[str], Query(description="With these labels, `key=value`.")] = [],  # noqa: B006
        page_size: Annotated[int, Query(ge=1, le=PAGE_SIZE)] = PAGE_SIZE,
        page_token: Annotated[str, Query(description="`next_page_token` of the page before.")] = "",
    ) -> Response:
        service = call_of(request).service
        found = list_request(state, _labels(label), page_size)
        found.page_token = page_token

        def page() -> dict[str, Any]:
            listed = job_calls.list_jobs(service, found)
            return {"jobs": [*map(shapes.job_object, listed.jobs)], "next_page_token": listed.next_page_token}

        return JSONResponse(await backend.call(page))

    @router.get("/v1/jobs/{job_id}", summary="A job with its answers so far.", response_model=JobData)
    async def get(request: Request, job_id: str) -> Response:
        return JSONResponse(await backend.call(_whole, call_of(request).service, job_id))

    @router.get("/v1/jobs/{job_id}/events", summary="Follow a job, after any token.", responses=_EVENTS)
    async def events(
        request: Request, job_id: str,
        after: Annotated[int | None, Query(ge=0, le=MAX_INT64, description="Number of a token.")] = None,
        last_event_id: Annotated[str, Header(description="The same, as browsers say it.")] = "",
    ) -> Response:  # fmt: skip
        call = call_of(request)
        call.become_stream()
        record = await backend.call(call.service.get, job_id)
        stream = await backend.call(call.service.stream, job_id, _first(after, last_event_id))
        job = follow(backend, request, record, ends_job=False, stream=stream)
        return EventStream(_events(backend, call.service, job), error_event, last=b"")

    @router.post("/v1/jobs/{job_id}/cancel", summary="End a job.", response_model=JobData)
    async def cancel(request: Request, job_id: str) -> Response:
        service = call_of(request).service
        await backend.call(service.cancel, check_id(job_id, "job"))
        return JSONResponse(await backend.call(_whole, service, job_id))

    @router.delete("/v1/jobs/{job_id}", summary="Forget an ended job.", response_model=shapes.Deleted)
    async def delete(request: Request, job_id: str) -> Response:
        await backend.call(call_of(request).service.delete, check_id(job_id, "job"))
        return JSONResponse({"id": job_id, "deleted": True})

    return router


def _whole(service: TenantService, job_id: str) -> dict[str, Any]:
    return shapes.job_object(job_calls.whole_job(service, service.get(check_id(job_id, "job"))))


def _labels(given: Sequence[str]) -> dict[str, str]:
    for one in given:
        if "=" not in one:
            raise refuse("label", f"{one[:60]!r}: must be key=value")
    return dict(one.split("=", 1) for one in given)


def _first(after: int | None, last_event_id: str) -> int:
    """Return the token after which a stream begins. Raises ApiError."""
    if after is not None or not last_event_id:
        return after or 0
    if not (last_event_id.isascii() and last_event_id.isdigit() and int(last_event_id[:20]) <= MAX_INT64):
        raise refuse("Last-Event-ID", f"{last_event_id[:60]!r}: must be the number of a token")
    return int(last_event_id)


async def _events(backend: Backend, service: TenantService, job: Followed) -> AsyncIterator[bytes]:
    """Yield the events of a job until it has ended, b"" where there is nothing new."""
    async for news in job.events():
        if isinstance(news, ProgressUpdate):
            yield shapes.progress_event(news)
        elif isinstance(news, JobRecord):
            yield await backend.call(_job_event, service, news)
        else:
            yield shapes.token_events(news) if news else b""


def _job_event(service: TenantService, record: JobRecord) -> bytes:
    is_last = record.state.is_final
    return shapes.job_event(job_calls.whole_job(service, record) if is_last else codec.encode_job(record), is_last)
