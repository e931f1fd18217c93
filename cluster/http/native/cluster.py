"""The state of the cluster."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from cluster.http.core.backend import Backend
from cluster.http.core.calls import call_of
from cluster.http.native.shapes import ClusterObject, cluster_object


def make_router(backend: Backend) -> APIRouter:
    """Return the route."""
    router = APIRouter(tags=["longreach"])

    @router.get("/v1/cluster", summary="The cluster, as `longreach status --json`.", response_model=ClusterObject)
    async def cluster(request: Request) -> Response:
        status = await backend.call(call_of(request).service.status)
        return JSONResponse(cluster_object(status, request.url.netloc))

    return router
