"""Whether the head lives and serves, its version, and its metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from cluster.http.core.backend import Backend
from cluster.http.core.calls import call_of


def make_router(backend: Backend) -> APIRouter:
    """Return the routes. Those of health need no key and say nothing but whether."""
    router = APIRouter()

    @router.head("/health", include_in_schema=False)
    @router.get("/health", summary="Whether the process answers.")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready", summary="Whether requests are served; 503 where not.")
    async def ready() -> Response:
        is_ready = not backend.service.problem and not backend.service.is_draining
        status = "ready" if is_ready else "not ready"
        return JSONResponse({"status": status}, 200 if is_ready else 503, {} if is_ready else {"Retry-After": "5"})

    @router.get("/version", summary="The version of the head.")
    async def version() -> dict[str, str]:
        return {"version": backend.runtime.version}

    @router.get("/metrics", summary="Metrics for Prometheus.")
    async def metrics(request: Request) -> Response:
        call_of(request).check_admin()
        return Response(await backend.call(backend.metrics), media_type=CONTENT_TYPE_LATEST)

    return router
