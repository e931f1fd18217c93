"""The page at `/` and what it loads: the same bytes for everybody, without a key; data comes from the other routes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources

from fastapi import APIRouter, Request
from starlette.responses import Response

from cluster.http.core.backend import Backend

_TYPES = {
    "html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}  # fmt: skip
# the page runs its own scripts alone, talks to its own head alone, and cannot make markup of text
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY", "Cache-Control": "no-cache",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StaticFile:
    """One file of the page."""

    content: bytes
    media_type: str
    etag: str


def read_files() -> dict[str, StaticFile]:
    """Return the files of the page by their paths."""
    found = {}
    for file in (resources.files(__package__) / "static").iterdir():
        content, kind = file.read_bytes(), file.name.rpartition(".")[2]
        path = "/" if file.name == "index.html" else f"/page/{file.name}"
        found[path] = StaticFile(content, _TYPES[kind], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found


FILES = read_files()


def make_router(backend: Backend) -> APIRouter:
    """Return a route for each file."""
    router = APIRouter()
    for path in FILES:
        router.add_api_route(path, _serve, methods=["GET", "HEAD"], include_in_schema=False)
    return router


async def _serve(request: Request) -> Response:
    file = FILES[request.url.path]
    headers = _HEADERS | {"ETag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(None, 304, headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
