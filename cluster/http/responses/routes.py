"""Responses: made, read, followed, cancelled and deleted."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from cluster.http.core.backend import Backend
from cluster.http.core.body import read_model
from cluster.http.core.calls import call_of
from cluster.http.core.errors import ApiError, refuse
from cluster.http.core.following import EventStream, collect, follow, store, submit
from cluster.http.openai.chat import body_of
from cluster.http.responses.input_items import listed_items, page
from cluster.http.responses.names import split_names
from cluster.http.responses.request import ResponsesRequest, in_own_words, response_spec
from cluster.http.responses.response import poll_after_ms, progress_of, read_response, said_of, stored_response
from cluster.http.responses.stream import ResponseStream
from cluster.jobs.model import JobRecord
from protos.jobs.limits import MAX_INT64
from protos.jobs.validate import show

if TYPE_CHECKING:
    from cluster.jobs.tenants.service import TenantService

_MAX_ITEMS, _ITEMS = 100, 20  # of a page


def make_router(backend: Backend) -> APIRouter:
    """Return the routes."""
    router = APIRouter()

    async def stored(request: Request) -> tuple[TenantService, JobRecord]:
        """Return the service as the caller sees it, and the job of the response that is asked for."""
        service = call_of(request).service
        return service, await backend.call(stored_response, service, request.path_params["response_id"])

    async def shown(service: TenantService, record: JobRecord) -> Response:
        """Return a response as it is, and when to ask again."""
        body = await backend.call(read_response, service, backend, record)
        wait_ms = poll_after_ms(record, progress_of(service, record))
        return JSONResponse(body, headers={"openai-poll-after-ms": str(wait_ms)} if wait_ms is not None else {})

    @router.post("/v1/responses", summary="Make a response.", openapi_extra=body_of(ResponsesRequest))
    async def create(request: Request) -> Response:
        asked = await read_model(backend, request, ResponsesRequest)
        key = request.headers.get("idempotency-key", "")
        service = call_of(request).service
        make_spec = partial(response_spec, service, backend, asked, key)
        try:
            if asked.background and not asked.stream:
                return await shown(service, await store(backend, request, make_spec))
            call_of(request).become_stream()
            if asked.background:
                job = follow(backend, request, await store(backend, request, make_spec), ends_job=False)
            else:
                job = await submit(backend, request, make_spec)
        except ApiError:
            raise
        except Exception as error:
            raise in_own_words(error, asked) from error
        made = ResponseStream(backend, job)
        if asked.stream:
            return EventStream(made.stream(), made.error_event, last=b"")
        return JSONResponse(await collect(request, made.whole()))

    @router.get("/v1/responses/{response_id}", summary="Read a response.", openapi_extra=_QUERY)
    async def read(request: Request, response_id: str) -> Response:
        after = _integer(request, "starting_after", -1, -1, MAX_INT64)
        is_stream = _word(request, "stream", "false", ("true", "false", "1", "0")) in ("true", "1")
        if is_stream:
            call_of(request).become_stream()
        service, record = await stored(request)
        if not is_stream:
            return await shown(service, record)
        made = ResponseStream(backend, follow(backend, request, record, ends_job=False), after)
        return EventStream(made.stream(), made.error_event, last=b"")

    @router.post("/v1/responses/{response_id}/cancel", summary="End a response; one that has ended stays as it is.")
    async def cancel(request: Request, response_id: str) -> Response:
        service, record = await stored(request)
        return await shown(service, await backend.call(service.cancel, record.id))

    @router.delete("/v1/responses/{response_id}", summary="Forget a response that has ended.")
    async def delete(request: Request, response_id: str) -> dict[str, Any]:
        service, record = await stored(request)
        await backend.call(service.delete, record.id)
        return {"id": response_id, "object": "response", "deleted": True}

    @router.get("/v1/responses/{response_id}/input_items", summary="List the input.", openapi_extra=_PAGE_QUERY)
    async def input_items(request: Request, response_id: str) -> dict[str, Any]:
        limit = _integer(request, "limit", _ITEMS, 1, _MAX_ITEMS)
        order = _word(request, "order", "desc", ("asc", "desc"))
        _, record = await stored(request)
        said = said_of(record)
        items = listed_items(record, said["instructions"] or "", split_names(said["tools"]))
        return page(items, request.query_params.get("after", ""), limit, order == "desc")

    return router


def _integer(request: Request, name: str, default: int, low: int, high: int) -> int:
    value = request.query_params.get(name)
    if value is None:
        return default
    digits = value.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 20 and low <= int(value) <= high):
        raise refuse(name, f"{show(value)}: must be an integer from {low} to {high}")
    return int(value)


def _word(request: Request, name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = request.query_params.get(name, default).lower()
    if value not in allowed:
        raise refuse(name, f"{show(value)}: must be one of {', '.join(allowed)}")
    return value


def _parameters(*described: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return {"parameters": [{"name": name, "in": "query", "schema": schema} for name, schema in described]}


_QUERY = _parameters(("stream", {"type": "boolean"}), ("starting_after", {"type": "integer", "minimum": -1}))
_PAGE_QUERY = _parameters(
    ("limit", {"type": "integer", "minimum": 1, "maximum": _MAX_ITEMS, "default": _ITEMS}),
    ("order", {"type": "string", "enum": ["asc", "desc"]}), ("after", {"type": "string"}),
)  # fmt: skip
