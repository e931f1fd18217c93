"""The application: all routes over one backend, behind the guard, with error objects and an OpenAPI document."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from cluster.access.keys import Keys
from cluster.http import probes
from cluster.http.anthropic import messages
from cluster.http.anthropic.messages_request import CountTokensRequest, MessagesRequest
from cluster.http.batches import batches
from cluster.http.batches.batches import BatchRequest
from cluster.http.core.backend import Backend
from cluster.http.core.errors import ApiError, refuse
from cluster.http.core.guard import Guard
from cluster.http.files import files
from cluster.http.native import cluster, documents, jobs
from cluster.http.native.documents import PinRequest
from cluster.http.native.job_request import JobRequest
from cluster.http.openai import chat, completions, tokens
from cluster.http.openai.chat_request import ChatRequest
from cluster.http.openai.completions import CompletionRequest
from cluster.http.openai.tokens import DetokenizeRequest, TokenizeRequest
from cluster.http.page import routes as page
from cluster.http.responses import routes as responses
from cluster.http.responses.request import ResponsesRequest
from protos.jobs.validate import show

# read by the routes themselves
_BODIES: tuple[type[BaseModel], ...] = (
    ChatRequest, CompletionRequest, ResponsesRequest, TokenizeRequest, DetokenizeRequest, MessagesRequest,
    CountTokensRequest, BatchRequest, JobRequest, PinRequest,
)  # fmt: skip
_CODES = {404: "not_found", 405: "method_not_allowed"}


def make_app(
    backend: Backend, keys: Keys | None, on_refused: Callable[[str, str], None] = lambda peer, path: None
) -> ASGIApp:
    """Return the application.

    Args:
        keys: those that give access; None: none is needed.
        on_refused: called with peer and path of each request without a valid key.
    """
    return Guard(make_routes(backend), backend, keys, on_refused)


def make_routes(backend: Backend) -> FastAPI:
    """Return all routes, as they are behind the guard."""
    app = FastAPI(
        title="Longreach", version=backend.runtime.version, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    for router in make_routers(backend):
        app.include_router(router)
    app.add_exception_handler(HTTPException, _show_http_error)
    app.add_exception_handler(RequestValidationError, _show_invalid)
    app.add_exception_handler(Exception, _pass_on)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def make_routers(backend: Backend) -> list[APIRouter]:
    """Return the routes of every protocol."""
    modules = (
        probes, page, tokens, chat, completions, responses, messages, files, batches, jobs, documents, cluster,
    )  # fmt: skip
    return [module.make_router(backend) for module in modules]


async def _pass_on(request: Request, error: Exception) -> Response:
    """Leave an error to the guard."""
    raise error


async def _show_invalid(request: Request, error: Exception) -> Response:
    """Refuse a parameter of a query, by its name."""
    assert isinstance(error, RequestValidationError)
    detail = error.errors()[0]
    name = str(detail["loc"][-1])
    shown = refuse(name, f"{show(detail['input'])}: {detail['msg']}")
    return JSONResponse(shown.body_for(request.url.path), shown.status)


async def _show_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = f"{request.method} {request.url.path}: {error.detail}"
    shown = ApiError(error.status_code, problem, code=_CODES.get(error.status_code))
    return JSONResponse(shown.body_for(request.url.path), shown.status, dict(error.headers or {}))


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for operation in (one for path in document["paths"].values() for one in path.values()):
            operation["responses"].pop("422", None)  # of the framework: ours is the 400 of every wrong request
        modes: Any = [(model, "validation") for model in _BODIES]
        _, schemas = models_json_schema(modes, ref_template="#/components/schemas/{model}")
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
        app.openapi_schema = document
    return app.openapi_schema
